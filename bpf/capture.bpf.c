// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Node-wide capture: attached once to the cgroup2 root of the node.
 *
 * connect4/6 mark new TCP sockets of enrolled pods, so that policy routing sends them to lo, where the pod's
 * sk_lookup program (lookup.bpf.c) hands them to ztunnel. sockops has the last word, on the final 4-tuple:
 * other programs rewrite addresses after us, and TCP_FASTOPEN_CONNECT and MPTCP pass connect4/6 by or early.
 */
#include "common.bpf.h"

/* Netns cookies of the pods that are steered. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENROLLED_MAX);
	__type(key, __u64);
	__type(value, struct enrolment);
} enrolled SEC(".maps");

/* No program reads it: who a pod id is, for people and for an agent that takes over. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DEVICES_MAX);
	__type(key, struct pod_device);
	__type(value, __u32);
} pod_devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PROBES_MAX);
	__type(key, struct probe_port);
	__type(value, __u32);
} probe_ports SEC(".maps");

/* Ids of the cgroups of ztunnel and the agent: they alone may use our marks. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TRUSTED_MAX);
	__type(key, __u64);
	__type(value, __u32);
} trusted SEC(".maps");

/* Ids of the cgroups under which all pods live. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, TRUSTED_MAX);
	__type(key, __u64);
	__type(value, __u32);
} pod_cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node);
} node SEC(".maps");

/* Who may go straight to whom; written by the agent as ztunnel says. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, VERDICTS_MAX);
	__type(key, struct verdict_key);
	__type(value, struct verdict);
} verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lane);
} lane SEC(".maps");

/* Entries are made and taken out by the agent alone: no pod can fill it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, VERDICTS_MAX);
	__type(key, struct verdict_key);
	__type(value, struct pair_counts);
} attested_pairs SEC(".maps");

/* What we know of one attested socket. */
struct attested_socket {
	__u32 pod; /* the destination's id; 0: not attested any more */
	__u32 caller;
	__u32 established;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct attested_socket);
} attested_sockets SEC(".maps");

/* What we know of one socket. */
struct socket_state {
	__u32 own_mark; /* the app's, while ours stands in its place */
	__u8 trusted;	/* ztunnel's or the agent's: never captured */
	__u8 prober;	/* of the node's own netns, not of a pod */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_state);
} sockets SEC(".maps");

static __always_inline int is_our_mark(__u32 mark) { return mark >= MARK_BYPASS && mark <= MARK_ANSWER; }

static __always_inline int in_trusted_cgroup(void)
{
	__u64 id = bpf_get_current_cgroup_id();

	return bpf_map_lookup_elem(&trusted, &id) != NULL;
}

/* Every level, since user space cannot tell how deep a cgroup lies: a node that is itself a container sees
 * only what is below its own. */
static __always_inline int in_pod_cgroup(void)
{
	__u64 id;
	int level;

#pragma unroll
	for (level = 1; level <= MAX_PODS_LEVEL; level++) {
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			return 0;
		if (bpf_map_lookup_elem(&pod_cgroups, &id))
			return 1;
	}
	return 0;
}

/* The pod that `key` leads to without a proxy, from `source` if that is known; 0: none now. */
static __always_inline __u32 verdict_on(const struct verdict_key *key, const struct address *source)
{
	struct verdict *verdict = bpf_map_lookup_elem(&verdicts, key);
	struct lane *now;
	__u32 zero = 0;

	if (!verdict)
		return 0;
	now = bpf_map_lookup_elem(&lane, &zero);
	if (!now || !now->generation || verdict->generation != now->generation)
		return 0;
	if (source && !address_equal(&verdict->source, source))
		return 0;
	return verdict->pod;
}

/* === connect4, connect6 === */

static __always_inline void set_mark(struct bpf_sock_addr *ctx, __u32 mark)
{
	bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

static __always_inline void release(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	struct socket_state *state;

	if (!is_our_mark(sk->mark))
		return;
	state = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	set_mark(ctx, state ? state->own_mark : 0);
}

/* Returns 0 to refuse the connect (EPERM), 1 to go on. */
static __always_inline int on_connect(struct bpf_sock_addr *ctx, const struct address *to, __u16 port)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *state;
	struct enrolment *enrolment;
	struct node *self;
	__u32 zero = 0;
	__u64 cookie;

	if (!sk || ctx->type != SOCK_STREAM)
		return 1;
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP)
		return 1;
	cookie = bpf_get_netns_cookie(ctx);
	enrolment = bpf_map_lookup_elem(&enrolled, &cookie);
	if (!enrolment) {
		self = bpf_map_lookup_elem(&node, &zero);
		if (self && self->netns_cookie == cookie && !in_pod_cgroup()) {
			state = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
			if (state)
				state->prober = 1;
			return 1;
		}
		release(ctx, sk);
		return 1;
	}
	if (in_trusted_cgroup()) {
		state = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
		if (!state)
			return 0;
		state->trusted = 1;
		return 1;
	}
	if (!(enrolment->flags & ENROL_OUTBOUND) || address_is_loopback(to)) {
		release(ctx, sk);
		return 1;
	}
	if (sk->bound_dev_if) {
		struct pod_device device = {.pod = enrolment->pod, .ifindex = sk->bound_dev_if};

		/* Without a capture route of its own the device would carry it out in plaintext. */
		if (!bpf_map_lookup_elem(&pod_devices, &device)) {
			count(COUNT_DEVICE_REFUSED);
			return 0;
		}
	} else {
		struct verdict_key key = {.destination = *to, .pod = enrolment->pod, .port = port};

		if (verdict_on(&key, NULL)) {
			release(ctx, sk);
			return 1;
		}
	}
	state = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		return 0;
	if (!is_our_mark(sk->mark))
		state->own_mark = sk->mark;
	set_mark(ctx, MARK_CAPTURE);
	return 1;
}

SEC("cgroup/connect4")
int um_connect4(struct bpf_sock_addr *ctx)
{
	struct address to;

	address_from_ip4(&to, ctx->user_ip4);
	return on_connect(ctx, &to, bpf_ntohs(ctx->user_port));
}

SEC("cgroup/connect6")
int um_connect6(struct bpf_sock_addr *ctx)
{
	struct address to;

	address_from_ip6(&to, CONTEXT_WORD(ctx->user_ip6[0]), CONTEXT_WORD(ctx->user_ip6[1]),
			 CONTEXT_WORD(ctx->user_ip6[2]), CONTEXT_WORD(ctx->user_ip6[3]));
	return on_connect(ctx, &to, bpf_ntohs(ctx->user_port));
}

/* === bind4, bind6 === */

/*
 * Connections that ztunnel accepted sit in the pod's bind table under the port they were made to. With
 * SO_REUSEADDR on both sides (ztunnel's listeners have it) an app may still bind that port.
 */
static __always_inline int on_bind(struct bpf_sock_addr *ctx)
{
	__u64 cookie;
	int one = 1;

	if (ctx->type != SOCK_STREAM || ctx->user_port == 0)
		return 1;
	cookie = bpf_get_netns_cookie(ctx);
	if (bpf_map_lookup_elem(&enrolled, &cookie))
		bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	return 1;
}

SEC("cgroup/bind4")
int um_bind4(struct bpf_sock_addr *ctx) { return on_bind(ctx); }

SEC("cgroup/bind6")
int um_bind6(struct bpf_sock_addr *ctx) { return on_bind(ctx); }

/* === setsockopt === */

/* Returns 0 to refuse (EPERM), 1 to go on. */
static __always_inline int on_set_mark(struct bpf_sockopt *ctx)
{
	__u32 *value = ctx->optval, *end = ctx->optval_end;
	struct bpf_sock *sk = ctx->sk;
	__u64 cookie;

	if (!sk || (void *)(value + 1) > (void *)end)
		return 1; /* shorter than a mark: the kernel answers EINVAL */
	cookie = bpf_get_netns_cookie(ctx);
	if (!bpf_map_lookup_elem(&enrolled, &cookie))
		return 1;
	if (in_trusted_cgroup())
		return 1;
	/* Another mark would send the rest of a captured connection, or the answers to a delivery, past
	 * ztunnel. */
	if (is_our_mark(*value) || sk->mark == MARK_CAPTURE || sk->mark == MARK_DELIVERY) {
		count(COUNT_MARK_REFUSED);
		return 0;
	}
	if (sk->state == TCP_LISTEN)
		*value = 0; /* as on_listen() does */
	return 1;
}

SEC("cgroup/setsockopt")
int um_setsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->level == SOL_SOCKET && ctx->optname == SO_MARK) {
		if (!on_set_mark(ctx))
			return 0;
		/* The kernel must use the copy that was checked, not read the caller's memory again. */
		if (ctx->optlen > (int)sizeof(__u32))
			ctx->optlen = sizeof(__u32);
		return 1;
	}
	/* Longer than the kernel copies for us: let it use the caller's buffer. */
	if (ctx->optlen > 4096)
		ctx->optlen = 0;
	return 1;
}

/* === sockops === */

static __always_inline void flow_of_socket(struct flow *flow, const struct bpf_sock_ops *ops, __u32 pod)
{
	__builtin_memset(flow, 0, sizeof(*flow));
	if (ops->family == AF_INET) {
		address_from_ip4(&flow->source, ops->local_ip4);
		address_from_ip4(&flow->destination, ops->remote_ip4);
		END_OF_CONTEXT_READS();
	} else {
		address_from_ip6(&flow->source, CONTEXT_WORD(ops->local_ip6[0]),
				 CONTEXT_WORD(ops->local_ip6[1]), CONTEXT_WORD(ops->local_ip6[2]),
				 CONTEXT_WORD(ops->local_ip6[3]));
		address_from_ip6(&flow->destination, CONTEXT_WORD(ops->remote_ip6[0]),
				 CONTEXT_WORD(ops->remote_ip6[1]), CONTEXT_WORD(ops->remote_ip6[2]),
				 CONTEXT_WORD(ops->remote_ip6[3]));
	}
	flow->pod = pod;
	flow->source_port = ops->local_port;
	flow->destination_port = bpf_ntohl(ops->remote_port);
}

static __always_inline void set_socket_mark(struct bpf_sock_ops *ops, __u32 mark)
{
	bpf_setsockopt(ops, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

static __always_inline void record(struct bpf_sock_ops *ops, void *map, const struct flow *flow)
{
	__u64 cookie = bpf_get_socket_cookie(ops);

	bpf_map_update_elem(map, flow, &cookie, BPF_ANY);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void on_node_connect(struct bpf_sock_ops *ops, struct bpf_sock *sk, __u64 cookie)
{
	struct socket_state *state;
	struct probe_port port = {};
	struct flow flow;
	struct node *self;
	__u32 zero = 0;
	__u32 *pod;

	self = bpf_map_lookup_elem(&node, &zero);
	if (!self || self->netns_cookie != cookie)
		return;
	state = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	if (!state || !state->prober)
		return;
	flow_of_socket(&flow, ops, 0);
	port.address = flow.destination;
	port.port = flow.destination_port;
	pod = bpf_map_lookup_elem(&probe_ports, &port);
	if (!pod)
		return;
	flow.pod = *pod;
	record(ops, &probes, &flow);
}

static __always_inline void key_of_flow(struct verdict_key *key, const struct flow *flow, __u32 caller)
{
	key->destination = flow->destination;
	key->pod = caller;
	key->port = flow->destination_port;
}

/*
 * Lets the connection go to the other pod itself: notes its 4-tuple, for that pod's program. Returns 0 where
 * ztunnel has to take it. The verdict is asked once more behind the note: who takes a verdict back looks at
 * the notes afterwards, so one of both sees the other.
 */
static __always_inline int attest(struct bpf_sock_ops *ops, struct bpf_sock *sk, const struct flow *flow)
{
	struct attestation attestation = {.cookie = bpf_get_socket_cookie(ops), .pod = flow->pod};
	struct attested_socket *socket;
	struct flow to = *flow;
	struct verdict_key key;

	if (is_our_mark(sk->mark) || sk->bound_dev_if)
		return 0;
	key_of_flow(&key, flow, flow->pod);
	to.pod = verdict_on(&key, &flow->source);
	if (!to.pod)
		return 0;
	socket = bpf_sk_storage_get(&attested_sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!socket)
		return 0;
	if (bpf_map_update_elem(&attested, &to, &attestation, BPF_ANY)) {
		count(COUNT_ATTESTED_FULL);
		return 0;
	}
	if (verdict_on(&key, &flow->source) != to.pod) {
		bpf_map_delete_elem(&attested, &to);
		return 0;
	}
	socket->pod = to.pod;
	socket->caller = flow->pod;
	socket->established = 0;
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	count(COUNT_ATTESTED);
	return 1;
}

static __always_inline void on_pod_connect(struct bpf_sock_ops *ops, struct bpf_sock *sk,
					   const struct enrolment *enrolment)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	struct flow flow;

	if (state && state->trusted)
		return;
	flow_of_socket(&flow, ops, enrolment->pod);
	if (address_is_loopback(&flow.destination)) {
		if (is_our_mark(sk->mark))
			set_socket_mark(ops, state ? state->own_mark : 0);
		return;
	}
	if (address_equal(&flow.source, &flow.destination)) {
		/* By way of lo, or it would look like fresh inbound; its sk_lookup then passes it to the app.
		 */
		if (sk->mark != MARK_CAPTURE)
			set_socket_mark(ops, MARK_CAPTURE);
		return;
	}
	if (!(enrolment->flags & ENROL_OUTBOUND))
		return;
	if (attest(ops, sk, &flow))
		return;
	if (sk->bound_dev_if) {
		struct pod_device device = {.pod = enrolment->pod, .ifindex = sk->bound_dev_if};
		char none[1] = "";

		if (!bpf_map_lookup_elem(&pod_devices, &device))
			bpf_setsockopt(ops, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none));
	}
	if (sk->mark != MARK_CAPTURE)
		set_socket_mark(ops, MARK_CAPTURE);
	count(COUNT_CAPTURED);
	record(ops, &captured, &flow);
}

static __always_inline void on_tcp_connect(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct enrolment *enrolment;
	__u64 cookie;

	if (!sk)
		return;
	cookie = bpf_get_netns_cookie(ops);
	enrolment = bpf_map_lookup_elem(&enrolled, &cookie);
	if (enrolment)
		on_pod_connect(ops, sk, enrolment);
	else
		on_node_connect(ops, sk, cookie);
}

/* A mark on a listener wins over tcp_fwmark_accept, and the answers to a delivery would leave the pod. */
static __always_inline void on_listen(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	__u64 cookie;

	if (!sk || sk->mark == 0 || sk->mark == MARK_BYPASS)
		return;
	cookie = bpf_get_netns_cookie(ops);
	if (bpf_map_lookup_elem(&enrolled, &cookie))
		set_socket_mark(ops, 0);
}

/* Only what this very socket has put there: another may have the 4-tuple by now. */
static __always_inline void forget(struct bpf_sock_ops *ops, void *map, const struct flow *flow)
{
	__u64 *owner = bpf_map_lookup_elem(map, flow);

	if (owner && *owner == bpf_get_socket_cookie(ops))
		bpf_map_delete_elem(map, flow);
}

/*
 * Somebody else has answered than the pod that was meant: not a byte may go there. What is sent from here on
 * comes to ztunnel's listener, which knows no such connection: it is reset.
 */
static __always_inline void end_impostor(struct bpf_sock_ops *ops, const struct flow *to, __u32 caller)
{
	struct flow flow = *to;

	flow.pod = caller;
	record(ops, &captured, &flow);
	set_socket_mark(ops, MARK_CAPTURE);
	count(COUNT_IMPOSTOR);
}

/* The handshake is done, and nothing but that was sent. */
static __always_inline void on_established(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct attestation *attestation;
	struct attested_socket *socket;
	struct pair_counts *counts;
	struct verdict_key key;
	struct flow flow;

	if (!sk)
		return;
	socket = bpf_sk_storage_get(&attested_sockets, sk, NULL, 0);
	if (!socket || !socket->pod)
		return;
	flow_of_socket(&flow, ops, socket->pod);
	attestation = bpf_map_lookup_elem(&attested, &flow);
	if (!attestation || !attestation->passed || attestation->cookie != bpf_get_socket_cookie(ops)) {
		end_impostor(ops, &flow, socket->caller);
		return;
	}
	socket->established = 1;
	key_of_flow(&key, &flow, socket->caller);
	counts = bpf_map_lookup_elem(&attested_pairs, &key);
	if (counts)
		__sync_fetch_and_add(&counts->opened, 1);
}

/* The kernel counts SYN and FIN as a byte each. Where a reset met a FIN under way, one too many is taken off.
 */
static __always_inline void count_closed(struct bpf_sock_ops *ops, struct pair_counts *counts)
{
	__u64 sent = ops->bytes_acked, received = ops->bytes_received;
	__u32 before = ops->args[0];

	if (sent)
		sent--;
	if (sent && (before == TCP_FIN_WAIT2 || before == TCP_LAST_ACK || before == TCP_CLOSING))
		sent--;
	if (received && (before == TCP_CLOSE_WAIT || before == TCP_LAST_ACK || before == TCP_CLOSING ||
			 before == TCP_FIN_WAIT2))
		received--;
	__sync_fetch_and_add(&counts->sent, sent);
	__sync_fetch_and_add(&counts->received, received);
	__sync_fetch_and_add(&counts->closed, 1);
}

static __always_inline void on_attested_close(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct attestation *attestation;
	struct attested_socket *socket;
	struct pair_counts *counts;
	struct verdict_key key;
	struct flow flow;

	if (!sk)
		return;
	socket = bpf_sk_storage_get(&attested_sockets, sk, NULL, 0);
	if (!socket || !socket->pod)
		return;
	flow_of_socket(&flow, ops, socket->pod);
	attestation = bpf_map_lookup_elem(&attested, &flow);
	if (attestation && attestation->cookie == bpf_get_socket_cookie(ops))
		bpf_map_delete_elem(&attested, &flow);
	key_of_flow(&key, &flow, socket->caller);
	counts = bpf_map_lookup_elem(&attested_pairs, &key);
	if (counts && socket->established)
		count_closed(ops, counts);
	else if (counts)
		__sync_fetch_and_add(&counts->failed, 1);
	socket->pod = 0;
}

static __always_inline void on_close(struct bpf_sock_ops *ops)
{
	struct enrolment *enrolment;
	struct probe_port port = {};
	struct flow flow;
	__u64 cookie;
	__u32 *pod;

	on_attested_close(ops);
	cookie = bpf_get_netns_cookie(ops);
	enrolment = bpf_map_lookup_elem(&enrolled, &cookie);
	if (enrolment) {
		flow_of_socket(&flow, ops, enrolment->pod);
		forget(ops, &captured, &flow);
		return;
	}
	flow_of_socket(&flow, ops, 0);
	port.address = flow.destination;
	port.port = flow.destination_port;
	pod = bpf_map_lookup_elem(&probe_ports, &port);
	if (pod) {
		flow.pod = *pod;
		forget(ops, &probes, &flow);
	}
}

SEC("sockops")
int um_sockops(struct bpf_sock_ops *ops)
{
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_tcp_connect(ops);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB: /* of a caller too, when both have called */
		on_established(ops);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_listen(ops);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] == TCP_CLOSE)
			on_close(ops);
		break;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
