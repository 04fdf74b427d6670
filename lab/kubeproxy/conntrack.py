"""Which tracked UDP flows lead nowhere after a change of rules.

Only a flow's first packet meets the rules. TCP clients find out that their backend is gone; a UDP client that
keeps its port would send into the void until the flow expires.
"""

from __future__ import annotations

from collections.abc import Iterable

from undermesh.lab.kubeproxy.ports import ServicePort


def stale_flows(old: Iterable[ServicePort], new: Iterable[ServicePort]) -> list[tuple[str, ...]]:
    """Arguments of conntrack(8), one call each: flows to backends that went, and those of a port that had none."""
    now = {port.identity: port for port in new}
    calls: list[tuple[str, ...]] = []
    for before in old:
        if before.protocol != "udp":
            continue
        after = now.get(before.identity)
        kept = {(b.address, b.port) for b in after.backends} if after else set()
        had = {(b.address, b.port) for b in before.backends}
        gone = sorted({address for address, _ in had - kept})
        for flow in _flows(before):
            if not had and kept:
                calls.append(flow)
            calls += [(*flow, "--dst-nat", backend) for backend in gone]
    return calls


def _flows(port: ServicePort) -> list[tuple[str, ...]]:
    """The calls that forget all flows to the port, one for each way to it."""
    base = ("-D", "-f", f"ipv{port.family}", "-p", "udp")
    addresses = (port.cluster_ip, *port.external_ips, *port.load_balancer_ips)
    found: list[tuple[str, ...]] = [
        (*base, "--orig-dst", address, "--orig-port-dst", str(port.port)) for address in addresses
    ]
    if port.node_port:
        found.append((*base, "--orig-port-dst", str(port.node_port)))
    return found
