"""What the names of a cluster's zone have.

Rules: Kubernetes DNS specification 1.1.0, sections 2.3 to 2.6; pod names as CoreDNS has them with `pods insecure`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from undermesh.lab.client.resources import Object

SPECIFICATION = "1.1.0"
Labels = tuple[str, ...]
"""A name from left to right, in lower case, without the root."""


@dataclass(frozen=True)
class Record:
    """One record as (name, type, value in the format of zone files)."""

    name: str
    type: str
    value: str


@dataclass(frozen=True)
class Found:
    """What a name has: records of every type, or nothing; and what helps to use them."""

    exists: bool
    records: tuple[Record, ...] = ()
    additional: tuple[Record, ...] = ()


NOTHING = Found(False)
EMPTY = Found(True)


class Cluster(Protocol):
    """The objects that names are made from."""

    def service(self, namespace: str, name: str) -> Object | None:
        """The Service of that name."""
        ...

    def slices(self, namespace: str, service: str) -> Sequence[Object]:
        """The EndpointSlices of a Service."""
        ...

    def has_namespace(self, name: str) -> bool:
        """Whether there is such a namespace."""
        ...

    def services_at(self, address: str) -> Sequence[Object]:
        """The Services with that cluster IP."""
        ...

    def slices_at(self, address: str) -> Sequence[Object]:
        """The EndpointSlices with an endpoint of that address."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A ready endpoint of a headless Service."""

    address: str
    hostname: str
    """The first label of its name."""
    ports: tuple[tuple[str, str, int], ...]
    """Name, protocol in lower case, number."""

    @property
    def type(self) -> str:
        return address_type(self.address)


def address_type(address: str) -> str:
    """A or AAAA."""
    return "AAAA" if ":" in address else "A"


def is_headless(service: Object) -> bool:
    return bool(service["spec"].get("clusterIP") == "None")


def endpoints(slices: Iterable[Object]) -> list[Endpoint]:
    """The ready ones: those that are not ready are in only if the Service publishes them, and then marked ready."""
    found: dict[str, Endpoint] = {}
    for piece in slices:
        if piece.get("addressType") not in ("IPv4", "IPv6"):
            continue
        ports = tuple(
            (port.get("name") or "", (port.get("protocol") or "TCP").lower(), port["port"])
            for port in piece.get("ports") or ()
            if port.get("port")
        )
        for entry in piece.get("endpoints") or ():
            if (entry.get("conditions") or {}).get("ready") is False:
                continue
            for address in entry["addresses"]:
                hostname = (entry.get("hostname") or address.replace(".", "-").replace(":", "-")).lower()
                there = found.get(address)
                merged = tuple(dict.fromkeys((*there.ports, *ports))) if there else ports
                found[address] = Endpoint(address, hostname, merged)
    return list(found.values())


class Zone:
    """The names below one cluster domain, such as cluster.local."""

    def __init__(self, domain: str, cluster: Cluster) -> None:
        self.domain = domain.strip(".").lower()
        self._suffix: Labels = tuple(self.domain.split("."))
        self._cluster = cluster
        self._below: dict[str, Callable[[Labels], Found]] = {"svc": self._service, "pod": self._pod}

    def origin(self, name: Labels) -> str:
        """The zone that answers for a name: the cluster's, a reverse one, or, for all the rest, the root."""
        if self._inside(name):
            return self.domain
        for reverse in ("in-addr.arpa", "ip6.arpa"):
            if name[-2:] == tuple(reverse.split(".")):
                return reverse
        return ""

    def find(self, name: Labels) -> Found:
        """Everything that a name has, whatever was asked for."""
        if self._inside(name):
            return self._find_inside(name[: -len(self._suffix)])
        if name[-1:] == ("arpa",):
            return self._reverse(name)
        return NOTHING if name else EMPTY

    def _inside(self, name: Labels) -> bool:
        return name[-len(self._suffix) :] == self._suffix

    def _find_inside(self, name: Labels) -> Found:
        if not name:
            return Found(True, (Record(self.domain, "NS", f"ns.dns.{self.domain}."),))
        if name == ("dns-version",):
            return Found(True, (Record(self._full(name), "TXT", f'"{SPECIFICATION}"'),))
        below = self._below.get(name[-1])
        if below is None:
            return NOTHING
        rest = name[:-1]
        if not rest:
            return EMPTY
        if not self._cluster.has_namespace(rest[-1]):
            return NOTHING
        return EMPTY if len(rest) == 1 else below(rest)

    def _full(self, name: Labels) -> str:
        return ".".join((*name, self.domain))

    def _pod(self, name: Labels) -> Found:
        """`name` ends in the namespace: a-b-c-d.ns. The address is not looked up, only read."""
        if len(name) != 2:
            return NOTHING
        for separator in (".", ":"):
            try:
                address = str(ipaddress.ip_address(name[0].replace("-", separator)))
            except ValueError:
                continue
            return Found(True, (Record(self._full((*name, "pod")), address_type(address), address),))
        return NOTHING

    def _service(self, name: Labels) -> Found:
        """`name` ends in the service and its namespace."""
        namespace, service_name = name[-1], name[-2]
        service = self._cluster.service(namespace, service_name)
        if service is None:
            return NOTHING
        full = self._full((service_name, namespace, "svc"))
        before = name[:-2]
        if service["spec"].get("type") == "ExternalName":
            return self._external(service, full) if not before else NOTHING
        if is_headless(service):
            return self._headless(full, before, endpoints(self._cluster.slices(namespace, service_name)))
        return self._balanced(service, full, before)

    def _external(self, service: Object, full: str) -> Found:
        target = service["spec"].get("externalName", "").strip(".")
        return Found(True, (Record(full, "CNAME", f"{target}."),)) if target else EMPTY

    def _balanced(self, service: Object, full: str, before: Labels) -> Found:
        spec = service["spec"]
        addresses = [a for a in spec.get("clusterIPs") or [spec.get("clusterIP", "")] if a]
        records = tuple(Record(full, address_type(address), address) for address in addresses)
        if not before:
            return Found(True, records)
        ports = [
            ((port.get("name") or ""), (port.get("protocol") or "TCP").lower(), port["port"])
            for port in spec.get("ports") or ()
        ]
        return _srv(full, before, [(*port, full) for port in ports], records)

    def _headless(self, full: str, before: Labels, ready: list[Endpoint]) -> Found:
        if not before:
            return Found(True, tuple(Record(full, endpoint.type, endpoint.address) for endpoint in ready))
        if len(before) == 1 and not before[0].startswith("_"):
            own = [endpoint for endpoint in ready if endpoint.hostname == before[0]]
            name = f"{before[0]}.{full}"
            return Found(True, tuple(Record(name, e.type, e.address) for e in own)) if own else NOTHING
        targets = [(*port, f"{e.hostname}.{full}") for e in ready for port in e.ports]
        return _srv(full, before, targets, tuple(Record(f"{e.hostname}.{full}", e.type, e.address) for e in ready))

    def _reverse(self, name: Labels) -> Found:
        address = reverse_address(name)
        if address is None:
            return EMPTY if name in (("arpa",), ("in-addr", "arpa"), ("ip6", "arpa")) else NOTHING
        full = ".".join(name)
        targets = dict.fromkeys(self._names_of(address))
        records = tuple(Record(full, "PTR", f"{target}.") for target in targets)
        return Found(True, records) if records else NOTHING

    def _names_of(self, address: str) -> Iterator[str]:
        for service in self._cluster.services_at(address):
            metadata = service["metadata"]
            yield self._full((metadata["name"], metadata["namespace"], "svc"))
        for piece in self._cluster.slices_at(address):
            metadata = piece["metadata"]
            owner = (metadata.get("labels") or {}).get("kubernetes.io/service-name", "")
            owning = self._cluster.service(metadata["namespace"], owner)
            if owning is not None and is_headless(owning):
                for endpoint in endpoints([piece]):
                    if endpoint.address == address:
                        yield self._full((endpoint.hostname, owner, metadata["namespace"], "svc"))


def _srv(full: str, before: Labels, ports: Iterable[tuple[str, str, int, str]], addresses: Iterable[Record]) -> Found:
    """SRV records of _port._protocol; the protocol alone is an empty name, if there is such a port."""
    named = [port for port in ports if port[0]]
    if len(before) == 1:
        return EMPTY if before[0] in {f"_{protocol}" for _, protocol, _, _ in named} else NOTHING
    if len(before) != 2:
        return NOTHING
    matching = [port for port in named if (f"_{port[0]}", f"_{port[1]}") == before]
    if not matching:
        return NOTHING
    targets = {port[3] for port in matching}
    weight = max(1, 100 // len(matching))
    values = dict.fromkeys(f"0 {weight} {number} {target}." for _, _, number, target in matching)
    name = ".".join((*before, full))
    return Found(
        True,
        tuple(Record(name, "SRV", value) for value in values),
        tuple(record for record in addresses if record.name in targets),
    )


def reverse_address(name: Labels) -> str | None:
    """The address that a name below in-addr.arpa or ip6.arpa stands for; None if it is not a whole one."""
    digits = name[-3::-1]
    try:
        if name[-2:] == ("in-addr", "arpa") and len(digits) == 4:
            return str(ipaddress.IPv4Address(".".join(digits)))
        if name[-2:] == ("ip6", "arpa") and len(digits) == 32 and all(len(digit) == 1 for digit in digits):
            text = "".join(digits)
            return str(ipaddress.IPv6Address(":".join(text[i : i + 4] for i in range(0, 32, 4))))
    except ValueError:
        pass
    return None
