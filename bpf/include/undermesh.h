/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What the BPF programs and the agent share: the keys and values of the maps.
 * agent/bpf/layout.py mirrors these structs; tests compare both with the BTF of the objects.
 *
 * Addresses are 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (::ffff:a.b.c.d).
 * Ports and everything else are in host order.
 */
#pragma once

#define ENROLLED_MAX 8192
#define PODS_MAX 8192
#define DEVICES_MAX 65536
#define CAPTURED_MAX 262144
#define PROBES_MAX 65536
#define TRUSTED_MAX 64
#define VERDICTS_MAX 65536
#define ATTESTED_MAX 65536

struct address {
	__u8 bytes[16];
};

/* One TCP connection, as the pod `pod` takes part in it. */
struct flow {
	struct address source;
	struct address destination;
	__u32 pod;
	__u16 source_port;
	__u16 destination_port;
};

/* What of a pod is steered; flags of `enrolment`. */
enum enrolment_flags {
	ENROL_INBOUND = 1,  /* its sk_lookup steers: sockets of ours use the app's ports */
	ENROL_OUTBOUND = 2, /* new connections are captured */
};

/* Value of map `enrolled`, whose key is the netns cookie. */
struct enrolment {
	__u32 pod; /* the pod's id on this node, never 0 */
	__u32 flags;
};

/* Value of map `pods`, whose key is the pod's id: for people, and for an agent that takes over. */
struct pod {
	char uid[40];
	__u64 netns_cookie;
	__u64 netns_inode;
};

/* Key of map `pod_devices`: interfaces with a capture route; the value is 1. */
struct pod_device {
	__u32 pod;
	__u32 ifindex;
};

/* Key of map `probe_ports`: where the kubelet probes; the value is the pod's id. */
struct probe_port {
	struct address address;
	__u32 port;
};

/* How deep the cgroups of map `pod_cgroups` may lie; the cgroup root is level 0. */
#define MAX_PODS_LEVEL 8

/* Value of map `node` (one entry, key 0). */
struct node {
	__u64 netns_cookie; /* of the node's own netns: where the kubelet runs */
	__u64 reserved;
};

/* Key of maps `verdicts` and `attested_pairs`: what the pod `pod` dials. */
struct verdict_key {
	struct address destination;
	__u32 pod;
	__u32 port;
};

/*
 * Value of map `verdicts`: the caller may go straight to the app of pod `pod`, without a proxy. It holds for
 * connections from this very source address, and only in the generation of policy that it was found in.
 */
struct verdict {
	struct address source;
	__u64 generation;
	__u32 pod;
	__u32 reserved;
};

/* Value of map `lane` (one entry, key 0). */
struct lane {
	__u64 generation; /* the present one of policy; 0: the lane is off, no verdict holds */
};

/* Value of map `attested`, whose key is a flow with the destination's id as `pod`. */
struct attestation {
	__u64 cookie; /* of the caller's socket */
	__u32 pod;    /* the caller's id */
	__u32 passed; /* the destination's own program has let the SYN through */
};

/* Value of map `attested_pairs`: counts since the entry was made. Bytes are counted at a connection's end. */
struct pair_counts {
	__u64 opened;
	__u64 closed;
	__u64 failed;	/* never established */
	__u64 sent;	/* bytes from the caller to the destination */
	__u64 received; /* bytes from the destination to the caller */
};

/* Slots of a pod's `listeners` map; proto/node.proto numbers them alike. */
enum listener_slot {
	OUTBOUND_V4,
	PLAINTEXT_V4,
	HBONE_V4,
	OUTBOUND_V6,
	PLAINTEXT_V6,
	HBONE_V6,
	LISTENER_SLOTS,
};

/* Index into map `counters` (per CPU). */
enum counter {
	COUNT_CAPTURED,		/* connections sent to the outbound listener */
	COUNT_DEVICE_REFUSED,	/* connects through a device without a capture route */
	COUNT_MARK_REFUSED,	/* attempts to set one of our marks */
	COUNT_PROBE_PASSED,	/* probes let through to the app */
	COUNT_INBOUND_STEERED,	/* connections sent to an inbound listener */
	COUNT_LISTENER_MISSING, /* dropped: the slot of the listener was empty */
	COUNT_ATTESTED,		/* connections that went out attested, without a proxy */
	COUNT_ATTESTED_PASSED,	/* SYNs of attested connections let through to the app */
	COUNT_ATTESTED_FULL,	/* connections captured for want of room in map `attested` */
	COUNT_IMPOSTOR,		/* attested connections that somebody else answered: they were ended */
	COUNTERS,
};

#define HBONE_PORT 15008
