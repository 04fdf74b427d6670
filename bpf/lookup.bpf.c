// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Steering inside one pod's netns: picks the socket for each new TCP connection that reaches the pod's stack.
 * Loaded once per pod, with the pod's id as a constant, since sk_lookup programs cannot ask where they run.
 */
#include "common.bpf.h"

#define LO_IFINDEX 1

/* ztunnel's listeners for this pod, by enum listener_slot. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, LISTENER_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

const volatile __u32 pod_id = 0;

static __always_inline void flow_of_packet(struct flow *flow, const struct bpf_sk_lookup *ctx)
{
	__builtin_memset(flow, 0, sizeof(*flow));
	if (ctx->family == AF_INET) {
		address_from_ip4(&flow->source, ctx->remote_ip4);
		address_from_ip4(&flow->destination, ctx->local_ip4);
		END_OF_CONTEXT_READS();
	} else {
		address_from_ip6(&flow->source, CONTEXT_WORD(ctx->remote_ip6[0]),
				 CONTEXT_WORD(ctx->remote_ip6[1]), CONTEXT_WORD(ctx->remote_ip6[2]),
				 CONTEXT_WORD(ctx->remote_ip6[3]));
		address_from_ip6(&flow->destination, CONTEXT_WORD(ctx->local_ip6[0]),
				 CONTEXT_WORD(ctx->local_ip6[1]), CONTEXT_WORD(ctx->local_ip6[2]),
				 CONTEXT_WORD(ctx->local_ip6[3]));
	}
	flow->pod = pod_id;
	flow->source_port = bpf_ntohs(ctx->remote_port);
	flow->destination_port = ctx->local_port;
}

/* Fails closed: without the listener nothing passes. IPv4 clients try again, IPv6 ones are reset. */
static __always_inline int steer(struct bpf_sk_lookup *ctx, __u32 slot)
{
	struct bpf_sock *sk;
	long error;

	if (ctx->family == AF_INET6)
		slot += OUTBOUND_V6 - OUTBOUND_V4;
	sk = bpf_map_lookup_elem(&listeners, &slot);
	if (!sk) {
		count(COUNT_LISTENER_MISSING);
		return SK_DROP;
	}
	error = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return error ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int um_lookup(struct bpf_sk_lookup *ctx)
{
	struct attestation *attestation;
	struct flow flow;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	flow_of_packet(&flow, ctx);
	if (address_is_loopback(&flow.destination))
		return SK_PASS;
	if (bpf_map_lookup_elem(&captured, &flow))
		return steer(ctx, OUTBOUND_V4);
	/* Deliveries of ztunnel, and the pod talking to its own address. */
	if (ctx->ingress_ifindex == LO_IFINDEX)
		return SK_PASS;
	attestation = bpf_map_lookup_elem(&attested, &flow);
	if (attestation) {
		/* The caller sends nothing before it has seen this: whoever else answers has not set it. */
		attestation->passed = 1;
		count(COUNT_ATTESTED_PASSED);
		return SK_PASS;
	}
	if (bpf_map_lookup_elem(&probes, &flow)) {
		count(COUNT_PROBE_PASSED);
		return SK_PASS;
	}
	count(COUNT_INBOUND_STEERED);
	return steer(ctx, flow.destination_port == HBONE_PORT ? HBONE_V4 : PLAINTEXT_V4);
}

char _license[] SEC("license") = "Dual BSD/GPL";
