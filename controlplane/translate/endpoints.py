"""EndpointSlices to endpoints of services: on the pods that they name, or as workloads of their own.

Which slices count, and why the others do not: docs/decisions/0011-endpoints-of-services.md.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from undermesh.api.core import IPAddress, Node, Pod, Service, is_special, parse_address
from undermesh.api.endpoints import Endpoint, EndpointSlice
from undermesh.api.identity import NodeName, ObjectKey
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import services as svc
from undermesh.controlplane.translate import workloads
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import workload_pb2 as wds

_MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
_OF_THE_SELECTOR: Final = "endpointslice-controller.k8s.io"
_POD: Final = "Pod"


class Surroundings(Protocol):
    """What endpoints and claims are looked up in."""

    def owner(self, address: IPAddress) -> Pod | None:
        """The pod at an address; see `precedence`."""
        ...

    def pod(self, key: ObjectKey) -> Pod | None: ...
    def node(self, name: NodeName) -> Node | None: ...

    def taken(self, address: IPAddress) -> bool:
        """Whether Kubernetes gave an address to a pod or a service, so that nobody else can claim it."""
        ...

    def entry_of_host(self, namespace: str, host: str) -> ObjectKey | None:
        """The ServiceEntry to which a host name belongs: of several of a namespace the first by name."""
        ...


@dataclass(frozen=True)
class Part:
    """The endpoints that one object gives to services.

    Attributes:
        pods: Of the endpoints that are pods, their ports by resource name of a service.
        others: A workload for each endpoint that is no pod, by its uid.
    """

    pods: Mapping[ObjectKey, Mapping[str, wds.PortList]]
    others: Mapping[str, wds.Workload]


@dataclass
class Endpoints:
    """What the slices add.

    Attributes:
        of_pods: Pod -> service's resource name -> its ports there.
        others: A workload for each endpoint that is no pod, by its uid.
    """

    of_pods: defaultdict[ObjectKey, dict[str, wds.PortList]] = field(default_factory=lambda: defaultdict(dict))
    others: dict[str, wds.Workload] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Joins a part to those that come before it by name."""
        self.others |= part.others
        for pod, offered in part.pods.items():
            join(self.of_pods[pod], offered)


class Dependencies(NamedTuple):
    """What the endpoints of an object rest on, beside itself and its services."""

    addresses: frozenset[IPAddress]
    pods: frozenset[ObjectKey]
    nodes: frozenset[NodeName]


def from_slices(objects: Objects, settings: Settings) -> Endpoints:
    """The endpoints that the slices of a consistent set of objects give to its services.

    Slices are taken by name, so that the outcome does not depend on the order in which they came.
    """
    found = Endpoints()
    surroundings = SnapshotSurroundings(objects)
    for key, item in sorted(objects.endpoint_slices.items()):
        service = objects.services.get(ObjectKey(key.namespace, item.service))
        if service is None or (part := of_slice(item, service, surroundings, settings)) is None:
            continue
        found.add(part)
    return found


def of_slice(item: EndpointSlice, service: Service, surroundings: Surroundings, settings: Settings) -> Part | None:
    """What one slice gives to its service; None: the slice does not count."""
    if not counts(item, service) or (ports := svc.slice_ports(service, item)) is None:
        return None
    pods: dict[ObjectKey, Mapping[str, wds.PortList]] = {}
    others: dict[str, wds.Workload] = {}
    name = svc.resource_name(service, settings)
    offered = {name: ports}
    for endpoint in item.endpoints:
        address = _address(endpoint)
        if address is None:
            continue
        if (pod := _pod_of(endpoint, address, item, surroundings)) is not None:
            # A pod's health is one for all its services: what only this slice calls unready is left out of this one.
            if _ready(endpoint) or service.spec.publish_not_ready_addresses:
                pods[pod.metadata.key] = offered
        elif endpoint.target_ref is None or endpoint.target_ref.kind != _POD:
            workload = _workload(endpoint, address, item, surroundings, settings)
            workload.services[name].CopyFrom(ports)
            others.setdefault(workload.uid, workload)
    return Part(pods, others)


def counts(item: EndpointSlice, service: Service) -> bool:
    """Whether a slice of this service is read at all."""
    if item.address_type == "FQDN" or not svc.is_published(service):
        return False
    return not (service.spec.selector and item.metadata.labels.get(_MANAGED_BY) == _OF_THE_SELECTOR)


def dependencies(item: EndpointSlice) -> Dependencies:
    """What `of_slice` may look up for this slice."""
    pods = (_target(endpoint, item) for endpoint in item.endpoints)
    return Dependencies(
        frozenset(address for endpoint in item.endpoints if (address := _address(endpoint)) is not None),
        frozenset(key for key in pods if key is not None),
        frozenset(NodeName(endpoint.node_name) for endpoint in item.endpoints if endpoint.node_name),
    )


def join(of_pod: dict[str, wds.PortList], offered: Mapping[str, wds.PortList]) -> None:
    """Adds the ports that one object gives a pod to those of objects with smaller names."""
    for name, ports in offered.items():
        of_pod[name] = svc.merged(of_pod.get(name), ports)


def holds_addresses(pod: Pod) -> bool:
    """Whether the pod is what is found at its addresses."""
    return workloads.is_published(pod) and not pod.spec.host_network


def precedence(pod: Pod) -> tuple[bool, ObjectKey]:
    """Where two pods hold one address, as while a CNI plugin gives it to the next, the greater one counts: the one
    that stays."""
    return not pod.metadata.deletion_timestamp, pod.metadata.key


class SnapshotSurroundings:
    """`Surroundings` in one state of all objects."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._owners: dict[IPAddress, Pod] | None = None
        self._given: set[IPAddress] | None = None

    def owner(self, address: IPAddress) -> Pod | None:
        if self._owners is None:
            self._owners = _owners(self._objects.pods.values())
        return self._owners.get(address)

    def taken(self, address: IPAddress) -> bool:
        if self._given is None:
            self._given = {
                a for s in filter(svc.is_published, self._objects.services.values()) for a in s.spec.addresses
            }
        return address in self._given or self.owner(address) is not None

    def entry_of_host(self, namespace: str, host: str) -> ObjectKey | None:
        entries = self._objects.service_entries.items()
        return min((key for key, e in entries if key.namespace == namespace and host in e.spec.hosts), default=None)

    def pod(self, key: ObjectKey) -> Pod | None:
        return self._objects.pods.get(key)

    def node(self, name: NodeName) -> Node | None:
        return self._objects.nodes.get(name)


def _owners(pods: Iterable[Pod]) -> dict[IPAddress, Pod]:
    owners: dict[IPAddress, Pod] = {}
    for pod in sorted(filter(holds_addresses, pods), key=precedence):
        owners |= dict.fromkeys(pod.addresses, pod)
    return owners


def _address(endpoint: Endpoint) -> IPAddress | None:
    """The first one: the others of an endpoint are its equals by the API's rule, and nobody writes any."""
    try:
        address = parse_address(endpoint.addresses[0])
    except (IndexError, ValueError):
        return None
    return None if is_special(address) else address


def _target(endpoint: Endpoint, item: EndpointSlice) -> ObjectKey | None:
    """The pod that an endpoint names; None: it names none."""
    target = endpoint.target_ref
    if target is None or target.kind != _POD:
        return None
    return ObjectKey(target.namespace or item.metadata.namespace, target.name)


def _pod_of(endpoint: Endpoint, address: IPAddress, item: EndpointSlice, surroundings: Surroundings) -> Pod | None:
    key = _target(endpoint, item)
    if key is None or endpoint.target_ref is None:
        return surroundings.owner(address)
    pod = surroundings.pod(key)
    if pod is None or endpoint.target_ref.uid not in ("", pod.metadata.uid) or address not in pod.addresses:
        return None
    return pod if workloads.is_published(pod) else None


def _workload(
    endpoint: Endpoint, address: IPAddress, item: EndpointSlice, surroundings: Surroundings, settings: Settings
) -> wds.Workload:
    """Nothing is known of who is there: no identity, no tunnel, and the address may be somebody else's too."""
    meta = item.metadata
    return wds.Workload(
        uid=f"{settings.cluster}/discovery.k8s.io/EndpointSlice/{meta.namespace}/{meta.name}/{address}",
        name=meta.name,
        namespace=meta.namespace,
        addresses=[address.packed],
        network=settings.network,
        trust_domain=settings.trust_domain,
        node=endpoint.node_name,
        status=wds.HEALTHY if _ready(endpoint) else wds.UNHEALTHY,
        cluster_id=settings.cluster,
        locality=workloads.locality(surroundings.node(NodeName(endpoint.node_name)), zone=endpoint.zone),
        network_mode=wds.HOST_NETWORK,
    )


def _ready(endpoint: Endpoint) -> bool:
    return endpoint.conditions.ready is not False
