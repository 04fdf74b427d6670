// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Another project's programs in the pods' connect hooks: SERVICE:SERVICE_PORT becomes BACKEND:BACKEND_PORT.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

struct rewrite {
	__be32 from[4]; /* IPv4 in the last word */
	__be32 to[4];
	__u32 from_port; /* host order */
	__u32 to_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2); /* 0: IPv4, 1: IPv6 */
	__type(key, __u32);
	__type(value, struct rewrite);
} rewrites SEC(".maps");

SEC("cgroup/connect4")
int foreign_connect4(struct bpf_sock_addr *ctx)
{
	__u32 key = 0;
	struct rewrite *rewrite = bpf_map_lookup_elem(&rewrites, &key);

	if (!rewrite || ctx->user_ip4 != rewrite->from[3] || ctx->user_port != bpf_htons(rewrite->from_port))
		return 1;
	ctx->user_ip4 = rewrite->to[3];
	ctx->user_port = bpf_htons(rewrite->to_port);
	return 1;
}

SEC("cgroup/connect6")
int foreign_connect6(struct bpf_sock_addr *ctx)
{
	__u32 key = 1;
	struct rewrite *rewrite = bpf_map_lookup_elem(&rewrites, &key);

	if (!rewrite || ctx->user_ip6[0] != rewrite->from[0] || ctx->user_ip6[1] != rewrite->from[1] ||
	    ctx->user_ip6[2] != rewrite->from[2] || ctx->user_ip6[3] != rewrite->from[3] ||
	    ctx->user_port != bpf_htons(rewrite->from_port))
		return 1;
	ctx->user_ip6[0] = rewrite->to[0];
	ctx->user_ip6[1] = rewrite->to[1];
	ctx->user_ip6[2] = rewrite->to[2];
	ctx->user_ip6[3] = rewrite->to[3];
	ctx->user_port = bpf_htons(rewrite->to_port);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
