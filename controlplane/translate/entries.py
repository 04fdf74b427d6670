"""ServiceEntry to WDS services and their endpoints, WorkloadEntry to a workload.

What needs a DNS proxy is refused, with a note: hosts without addresses, wildcards, resolution by DNS. So is what would
take over what is not its author's: names of the cluster's own services, addresses of its services and pods.

Where an endpoint is the address of a pod, the pod joins the service, so that it is reached by tunnel and under its
identity; any other endpoint is a workload without identity and tunnel (docs/decisions/0011-endpoints-of-services.md).
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from undermesh.api.core import IPAddress, Service, is_special, parse_address
from undermesh.api.entries import EntryEndpoint, EntryPort, ServiceEntry, WorkloadEntry
from undermesh.api.identity import ObjectKey
from undermesh.api.names import is_subdomain
from undermesh.controlplane.translate import services as svc
from undermesh.controlplane.translate.endpoints import Dependencies, Part, Surroundings
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import workload_pb2 as wds

_GROUP: Final = "networking.istio.io"
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Entry:
    """What one ServiceEntry publishes.

    Attributes:
        services: By resource name.
        ports: Those of TCP.
        notes: What of it is not published and why, one line each.
    """

    services: Mapping[str, wds.Service] = field(default_factory=dict)
    ports: tuple[EntryPort, ...] = ()
    notes: tuple[str, ...] = ()

    def offered(self, numbers: Mapping[str, int]) -> dict[str, wds.PortList]:
        """The ports of an endpoint that has numbers of its own for some, by service."""
        ports = [_port(port, numbers.get(port.name) or port.target_port or port.number) for port in self.ports]
        return {name: wds.PortList(ports=ports) for name in self.services}


def of_service_entry(entry: ServiceEntry, surroundings: Surroundings, settings: Settings) -> Entry:
    """What an entry publishes. Never raises for one that has its types right."""
    spec = entry.spec
    if refusal := _refusal(entry):
        return Entry(notes=(f"it is not published: {refusal}",))
    notes: list[str] = []
    addresses = [a for text in spec.addresses if (a := _address(text, surroundings, settings, notes)) is not None]
    hosts = [host for host in dict.fromkeys(spec.hosts) if _is_ours(host, entry, surroundings, settings, notes)]
    if spec.workload_selector is not None and spec.endpoints:
        notes.append("spec.endpoints: do not count beside spec.workloadSelector")
    ports = tuple(port for port in spec.ports if port.protocol.upper() != "UDP")
    if len(ports) < len(spec.ports):
        notes.append("spec.ports: UDP is not covered")
    if not addresses or not hosts:
        return Entry(notes=(*notes, "it is not published: nothing is left of it"))
    published = (
        wds.Service(
            name=entry.metadata.name,
            namespace=entry.metadata.namespace,
            hostname=host,
            addresses=addresses,
            ports=[_port(port, port.target_port or port.number) for port in ports],
            subject_alt_names=spec.subject_alt_names,
            load_balancing=wds.LoadBalancing(mode=wds.LoadBalancing.PASSTHROUGH) if spec.resolution == "NONE" else None,
        )
        for host in hosts
    )
    return Entry({f"{s.namespace}/{s.hostname}": s for s in published}, ports, tuple(notes))


def endpoints_of(entry: ServiceEntry, found: Entry, surroundings: Surroundings, settings: Settings) -> Part:
    """The endpoints that stand in an entry itself."""
    pods: dict[ObjectKey, Mapping[str, wds.PortList]] = {}
    others: dict[str, wds.Workload] = {}
    if not found.services or entry.spec.workload_selector is not None or entry.spec.resolution == "NONE":
        return Part(pods, others)
    for address, endpoint in _addressed(entry.spec.endpoints):
        offered = found.offered(endpoint.ports)
        if (owner := surroundings.owner(address)) is not None:
            pods.setdefault(owner.metadata.key, offered)
        else:
            uid = f"{_uid(entry, settings)}/{address}"
            workload = _workload(entry, endpoint, address, uid, settings)
            workload.network_mode = wds.HOST_NETWORK
            _offer(workload, offered)
            others.setdefault(uid, workload)
    return Part(pods, others)


def of_workload_entry(
    entry: WorkloadEntry,
    services: Iterable[Service],
    entries: Iterable[Entry],
    surroundings: Surroundings,
    settings: Settings,
) -> Part:
    """A WorkloadEntry as an endpoint of what selects it.

    Args:
        entry: The entry; one whose address is none gives nothing.
        services: Those of its namespace that select it.
        entries: What the ServiceEntries that select it publish.
        surroundings: What there is.
        settings: The mesh.
    """
    offered = {svc.resource_name(s, settings): p for s in services if (p := _service_ports(s, entry)) is not None}
    for found in entries:
        offered |= found.offered(entry.spec.ports)
    pods: dict[ObjectKey, Mapping[str, wds.PortList]] = {}
    others: dict[str, wds.Workload] = {}
    for address, endpoint in _addressed([entry.spec]):
        uid = _uid(entry, settings)
        workload = others[uid] = _workload(entry, endpoint, address, uid, settings)
        workload.service_account = endpoint.service_account
        if (owner := surroundings.owner(address)) is None:
            _offer(workload, offered)
        elif offered:
            pods[owner.metadata.key] = offered
    return Part(pods, others)


def dependencies(endpoints: Iterable[EntryEndpoint]) -> Dependencies:
    """What `endpoints_of` and `of_workload_entry` may look up for these endpoints."""
    return Dependencies(frozenset(address for address, _ in _addressed(endpoints)), frozenset(), frozenset())


def workload_entry_notes(entry: WorkloadEntry) -> tuple[str, ...]:
    """Why it is not published; empty: it is."""
    return () if list(_addressed([entry.spec])) else (_no_address("spec.address", entry.spec.address),)


def _refusal(entry: ServiceEntry) -> str:
    spec = entry.spec
    if spec.resolution not in ("NONE", "STATIC"):
        return f"spec.resolution {spec.resolution} needs a DNS proxy: use STATIC with the addresses"
    if not spec.addresses:
        return "without spec.addresses it needs a DNS proxy: give it an address"
    if set(spec.export_to) - {"*"}:
        return "spec.exportTo can only be *: other scopes are not supported"
    return ""


def _is_ours(host: str, entry: ServiceEntry, surroundings: Surroundings, settings: Settings, notes: list[str]) -> bool:
    refusal = ""
    if not is_subdomain(host):
        refusal = "wildcards need a DNS proxy" if host.startswith("*") else "expected a host name in lower case"
    elif host.endswith(f".svc.{settings.cluster_domain}"):
        refusal = "names of the cluster's own services cannot be taken"
    elif (first := surroundings.entry_of_host(entry.metadata.namespace, host)) not in (None, entry.metadata.key):
        refusal = f"ServiceEntry {first} has it already"
    if refusal:
        notes.append(f"spec.hosts: {host[:253]} is left out: {refusal}")
    return not refusal


def _address(text: str, surroundings: Surroundings, settings: Settings, notes: list[str]) -> wds.NetworkAddress | None:
    """An address or a range."""
    try:
        network: _Network = ipaddress.ip_network(text)
        parse_address(text.partition("/")[0])
    except ValueError:
        notes.append(_no_address("spec.addresses", text))
        return None
    single = network.prefixlen == network.max_prefixlen
    first = network.network_address
    if single and (is_special(first) or surroundings.taken(first)):
        notes.append(f"spec.addresses: {text} is left out: it belongs to a pod, to a service or to each node itself")
        return None
    return wds.NetworkAddress(
        network=settings.network, address=first.packed, length=None if single else network.prefixlen
    )


def _no_address(where: str, text: str) -> str:
    return f"{where}: {text[:253]!r} is left out: it is no IP address, and names need a DNS proxy"


def _addressed(endpoints: Iterable[EntryEndpoint]) -> Iterator[tuple[IPAddress, EntryEndpoint]]:
    """The endpoints with an address."""
    for endpoint in endpoints:
        try:
            address = parse_address(endpoint.address)
        except ValueError:
            continue
        if not is_special(address):
            yield address, endpoint


def _uid(entry: ServiceEntry | WorkloadEntry, settings: Settings) -> str:
    meta = entry.metadata
    return f"{settings.cluster}/{_GROUP}/{type(entry).__name__}/{meta.namespace}/{meta.name}"


def _workload(
    entry: ServiceEntry | WorkloadEntry, endpoint: EntryEndpoint, address: IPAddress, uid: str, settings: Settings
) -> wds.Workload:
    region, zone, subzone, *_ = (*endpoint.locality.split("/"), "", "", "")
    workload = wds.Workload(
        uid=uid,
        name=entry.metadata.name,
        namespace=entry.metadata.namespace,
        addresses=[address.packed],
        network=endpoint.network or settings.network,
        trust_domain=settings.trust_domain,
        cluster_id=settings.cluster,
        locality=wds.Locality(region=region, zone=zone, subzone=subzone) if endpoint.locality else None,
    )
    if endpoint.weight:
        workload.capacity.value = endpoint.weight
    return workload


def _offer(workload: wds.Workload, offered: Mapping[str, wds.PortList]) -> None:
    for name, ports in offered.items():
        workload.services[name].CopyFrom(ports)


def _port(port: EntryPort, target: int) -> wds.Port:
    protocol = svc.app_protocol(port.name, port.protocol)
    return wds.Port(service_port=port.number, target_port=target, app_protocol=protocol)


def _service_ports(service: Service, entry: WorkloadEntry) -> wds.PortList | None:
    """The service's ports with the entry's own numbers for their names, then for the names of target ports."""
    return svc.ports_with(service, lambda port: entry.spec.ports.get(port.name), entry.spec.ports.get)
