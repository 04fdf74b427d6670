"""The chains and elements of one Service on one node.

An address of the Service leads to an entry chain, which decides about masquerading and local policies, that one
to a chain that chooses a backend, and that one to the backend's own chain, which translates the address.
"""

from __future__ import annotations

from collections.abc import Iterable

from undermesh.lab.kubeproxy.ports import Backend, Choice, ServicePort, choose
from undermesh.lab.kubeproxy.ruleset import ADDRESS_TYPE, HEADER, Element, Fragment

_REFUSE = "goto refuse"
_DISCARD = "goto discard"


def service_fragment(ports: Iterable[ServicePort], node: str) -> Fragment:
    """What all ports of one Service put into the table of a node."""
    chains: dict[str, tuple[str, ...]] = {}
    sets: dict[str, str] = {}
    elements: dict[Element, str] = {}
    for port in ports:
        builder = _Builder(port, choose(port.backends, node))
        chains.update(builder.chains())
        sets.update(builder.sets())
        elements.update(builder.elements())
    return Fragment(chains, sets, elements)


class _Builder:
    """One port of one Service on one node."""

    def __init__(self, port: ServicePort, choice: Choice) -> None:
        self._port = port
        self._all = choice.everywhere
        self._here = choice.here
        self._header = HEADER[port.family]

    def elements(self) -> dict[Element, str]:
        port = self._port
        found: dict[Element, str] = {(f"cluster_ips{port.family}", port.cluster_ip): ""}
        self._put(found, [port.cluster_ip], self._internal_verdict(), "internal")
        self._put(found, [*port.external_ips, *port.load_balancer_ips], self._external_verdict(), "external")
        if port.node_port:
            verdict = self._external_verdict()
            kind = "refused_node_ports" if verdict else "node_ports"
            key = f"{port.protocol} . {port.node_port}"
            found[f"{kind}{port.family}", key] = verdict or f"goto {self._name('external')}"
            if verdict == _DISCARD and self._all:
                found[f"node_ports{port.family}", key] = f"goto {self._name('external')}"
        return found

    def _put(self, found: dict[Element, str], addresses: list[str], verdict: str, entry: str) -> None:
        port = self._port
        for address in addresses:
            key = f"{address} . {port.protocol} . {port.port}"
            if verdict:
                found[f"refused{port.family}", key] = verdict
            if not verdict or (entry == "external" and self._all):
                found[f"services{port.family}", key] = f"goto {self._name(entry)}"

    def _internal_verdict(self) -> str:
        """Empty if the cluster IP leads somewhere."""
        if not self._all:
            return _REFUSE
        return _DISCARD if self._port.internal_local and not self._here else ""

    def _external_verdict(self) -> str:
        """Empty if outside clients are let in; nodes and pods are, whatever the policy, if there is any backend."""
        if not self._all:
            return _REFUSE
        return _DISCARD if self._port.external_local and not self._here else ""

    def sets(self) -> dict[str, str]:
        port = self._port
        if not port.affinity_seconds:
            return {}
        kind = f"type {ADDRESS_TYPE[port.family]}; flags dynamic,timeout; timeout {port.affinity_seconds}s;"
        return {self._backend_name("affinity", backend): kind for backend in self._backends()}

    def chains(self) -> dict[str, tuple[str, ...]]:
        port = self._port
        if not self._all:
            return {}
        found = {self._backend_name("backend", backend): self._translate(backend) for backend in self._backends()}
        found[self._name("all")] = self._balance(self._all)
        if self._here and (port.external_local or port.internal_local):
            found[self._name("here")] = self._balance(self._here)
        if not self._internal_verdict():
            found[self._name("internal")] = self._internal()
        if port.external_ips or port.load_balancer_ips or port.node_port:
            found[self._name("external")] = self._external()
        return found

    def _internal(self) -> tuple[str, ...]:
        port = self._port
        outside = f"{self._header} saddr != @pod_cidrs{port.family} jump masquerade_later"
        return (outside, f"goto {self._name('here' if port.internal_local else 'all')}")

    def _external(self) -> tuple[str, ...]:
        """Under the policy Local, pods and the node itself reach every backend all the same, as with kube-proxy."""
        port, everywhere = self._port, self._name("all")
        if not port.external_local:
            return ("jump masquerade_later", f"goto {everywhere}")
        return (
            f"{self._header} saddr @pod_cidrs{port.family} goto {everywhere}",
            "fib saddr type local jump masquerade_later",
            f"fib saddr type local goto {everywhere}",
            *((f"goto {self._name('here')}",) if self._here else ()),
        )

    def _balance(self, backends: tuple[Backend, ...]) -> tuple[str, ...]:
        rules = []
        if self._port.affinity_seconds:
            for backend in backends:
                known = self._backend_name("affinity", backend)
                rules.append(f"{self._header} saddr @{known} goto {self._backend_name('backend', backend)}")
        numbered = ", ".join(f"{n} : goto {self._backend_name('backend', b)}" for n, b in enumerate(backends))
        rules.append(f"numgen random mod {len(backends)} vmap {{ {numbered} }}")
        return tuple(rules)

    def _translate(self, backend: Backend) -> tuple[str, ...]:
        port, header = self._port, self._header
        address = f"[{backend.address}]" if port.family == 6 else backend.address
        rules = [f"{header} saddr {backend.address} jump masquerade_later"]
        if port.affinity_seconds:
            rules.append(f"update @{self._backend_name('affinity', backend)} {{ {header} saddr }}")
        rules.append(f"meta l4proto {port.protocol} dnat {header} to {address}:{backend.port}")
        return tuple(rules)

    def _backends(self) -> list[Backend]:
        used = dict.fromkeys(self._all)
        if self._port.external_local or self._port.internal_local:
            used.update(dict.fromkeys(self._here))
        return list(used)

    def _name(self, kind: str) -> str:
        return f"{kind}-{self._port.identity}"

    def _backend_name(self, kind: str, backend: Backend) -> str:
        return f"{kind}-{self._port.identity}/{backend.address.replace(':', '.')}/{backend.port}"
