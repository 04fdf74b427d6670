"""Service addresses on the lab's nodes, as kube-proxy in nftables mode makes them, and the hostPorts of pods.

`ports`, `rules`, `hostports` and `ruleset` are pure: objects of the API -> text for nft. `node` runs nft in a
node's network namespace, `proxy` follows the API server. Left out: SCTP, node ports on loopback addresses,
loadBalancerSourceRanges, healthCheckNodePort and topology hints.
"""
