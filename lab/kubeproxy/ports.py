"""What is to be balanced: one record for each port, protocol and address family of a Service."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from undermesh.lab.client.resources import Object

PROTOCOLS = ("TCP", "UDP")
_AFFINITY_SECONDS = 10800
"""The API's default of sessionAffinityConfig.clientIP.timeoutSeconds."""


@dataclass(frozen=True, order=True)
class Backend:
    """One address and port that answers for a Service."""

    address: str
    port: int
    node: str
    """Empty if it is on none."""
    ready: bool
    draining: bool
    """It ends but still serves: used when there is nothing else."""


@dataclass(frozen=True, kw_only=True)
class ServicePort:
    """One port of a Service in one address family."""

    namespace: str
    service: str
    port_name: str
    family: int
    """4 or 6"""
    protocol: str
    """tcp or udp"""
    port: int
    cluster_ip: str
    external_ips: tuple[str, ...]
    load_balancer_ips: tuple[str, ...]
    node_port: int
    """0 if there is none."""
    affinity_seconds: int
    """0: no affinity."""
    external_local: bool
    internal_local: bool
    backends: tuple[Backend, ...]

    @property
    def identity(self) -> str:
        """Unique among all, fit for names in nftables."""
        return f"{self.namespace}/{self.service}/{self.protocol}/{self.port_name or self.port}/{self.family}"


def family_of(address: str) -> int:
    """4 or 6. Raises ValueError for what is no address."""
    return ipaddress.ip_address(address).version


def is_balanced(service: Object) -> bool:
    """Whether the Service has a cluster IP: headless ones and external names are DNS' job."""
    spec = service["spec"]
    return spec.get("type") != "ExternalName" and spec.get("clusterIP", "None") not in ("", "None")


def service_ports(service: Object, slices: Iterable[Object]) -> list[ServicePort]:
    """The ports of a Service, from it and its EndpointSlices; empty if it has no cluster IP."""
    if not is_balanced(service):
        return []
    metadata, spec = service["metadata"], service["spec"]
    kept = list(slices)
    balancers = [
        entry["ip"]
        for entry in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
        if entry.get("ip") and entry.get("ipMode", "VIP") == "VIP"
    ]
    found = []
    for cluster_ip in spec.get("clusterIPs") or [spec["clusterIP"]]:
        family = family_of(cluster_ip)
        for port in spec.get("ports") or ():
            if port.get("protocol", "TCP") not in PROTOCOLS:
                continue
            found.append(
                ServicePort(
                    namespace=metadata["namespace"],
                    service=metadata["name"],
                    port_name=port.get("name") or "",
                    family=family,
                    protocol=port.get("protocol", "TCP").lower(),
                    port=port["port"],
                    cluster_ip=cluster_ip,
                    external_ips=_of_family(spec.get("externalIPs") or (), family),
                    load_balancer_ips=_of_family(balancers, family),
                    node_port=port.get("nodePort") or 0,
                    affinity_seconds=_affinity(spec),
                    external_local=spec.get("externalTrafficPolicy") == "Local",
                    internal_local=spec.get("internalTrafficPolicy") == "Local",
                    backends=tuple(sorted(set(_backends(kept, port, family)))),
                )
            )
    return found


def _of_family(addresses: Iterable[str], family: int) -> tuple[str, ...]:
    return tuple(address for address in addresses if family_of(address) == family)


def _affinity(spec: Object) -> int:
    if spec.get("sessionAffinity") != "ClientIP":
        return 0
    config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
    return int(config.get("timeoutSeconds") or _AFFINITY_SECONDS)


def _backends(slices: Iterable[Object], port: Object, family: int) -> Iterator[Backend]:
    name, protocol = port.get("name") or "", port.get("protocol", "TCP")
    for piece in slices:
        if piece.get("addressType") != f"IPv{family}":
            continue
        numbers = [
            entry["port"]
            for entry in piece.get("ports") or ()
            if (entry.get("name") or "") == name and entry.get("protocol", "TCP") == protocol and entry.get("port")
        ]
        for endpoint in piece.get("endpoints") or ():
            conditions = endpoint.get("conditions") or {}
            ready = conditions.get("ready") is not False
            draining = bool(conditions.get("serving", ready) and conditions.get("terminating"))
            if ready or draining:
                for number in numbers:
                    address = str(ipaddress.ip_address(endpoint["addresses"][0]))
                    yield Backend(address, number, endpoint.get("nodeName") or "", ready, draining)


@dataclass(frozen=True)
class Choice:
    """The backends that one node uses. https://kep.k8s.io/1669 says when those that end are used."""

    everywhere: tuple[Backend, ...]
    here: tuple[Backend, ...]


def choose(backends: Iterable[Backend], node: str) -> Choice:
    """Ready ones, or if there are none those that end and still serve; the same again for those on the node."""
    kept = tuple(backends)
    return Choice(_usable(kept), _usable(tuple(backend for backend in kept if backend.node == node)))


def _usable(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    return tuple(b for b in backends if b.ready) or tuple(b for b in backends if b.draining)
