/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What every BPF object of undermesh includes: kernel headers, shared maps, address helpers. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "marks.h"
#include "undermesh.h"

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262
#define SOL_SOCKET 1
#define SO_REUSEADDR 2
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define TCP_FIN_WAIT2 5
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10
#define TCP_CLOSING 11

/* Ends a branch that reads the context: clang would else merge its last reads with those of the other branch
 * by computing the address, and the verifier refuses computed context addresses. */
#define END_OF_CONTEXT_READS() asm volatile("" ::: "memory")

/* Reads one 32-bit context field on its own: clang would else join two of them into a 64-bit read. */
#define CONTEXT_WORD(field) (*(volatile __u32 *)&(field))

/* 4-tuples of open captured connections: the outbound listener is theirs, and nobody else's. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, CAPTURED_MAX);
	__type(key, struct flow);
	__type(value, __u64); /* socket cookie */
} captured SEC(".maps");

/* 4-tuples of open probes of the kubelet: they pass straight to the app. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, PROBES_MAX);
	__type(key, struct flow);
	__type(value, __u64); /* socket cookie */
} probes SEC(".maps");

/*
 * Open connections from pod to pod without a proxy: the destination's program passes them to the app. No LRU:
 * nobody can push out what belongs to another; where there is no room, ztunnel takes the connection.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, ATTESTED_MAX);
	__type(key, struct flow);
	__type(value, struct attestation);
} attested SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

static __always_inline void address_from_ip4(struct address *to, __be32 ip4)
{
	__u32 *words = (__u32 *)to->bytes;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = ip4;
}

static __always_inline void address_from_ip6(struct address *to, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u32 *words = (__u32 *)to->bytes;

	words[0] = a;
	words[1] = b;
	words[2] = c;
	words[3] = d;
}

static __always_inline int address_equal(const struct address *a, const struct address *b)
{
	const __u64 *x = (const __u64 *)a->bytes, *y = (const __u64 *)b->bytes;

	return x[0] == y[0] && x[1] == y[1];
}

/* ::1, 127/8, and the unspecified addresses, which connect() takes for loopback. */
static __always_inline int address_is_loopback(const struct address *address)
{
	const __u32 *words = (const __u32 *)address->bytes;

	if (words[0] || words[1])
		return 0;
	if (words[2] == bpf_htonl(0xffff))
		return words[3] == 0 || (bpf_ntohl(words[3]) >> 24) == 127;
	return words[2] == 0 && (words[3] == 0 || words[3] == bpf_htonl(1));
}
