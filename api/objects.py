"""A consistent set of objects, and the kinds there are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.core import Namespace, Node, Pod, Service, ServiceAccount
from undermesh.api.endpoints import EndpointSlice
from undermesh.api.entries import ServiceEntry, WorkloadEntry
from undermesh.api.identity import NodeName, ObjectKey, ObjectRef
from undermesh.api.peer_authentication import PeerAuthentication

Object = (
    Namespace
    | Node
    | ServiceAccount
    | Pod
    | Service
    | AuthorizationPolicy
    | EndpointSlice
    | PeerAuthentication
    | ServiceEntry
    | WorkloadEntry
)

_NETWORKING: Final = tuple(f"networking.istio.io/{version}" for version in ("v1", "v1beta1", "v1alpha3"))


@dataclass(frozen=True)
class Kind:
    """How a kind is written: `apiVersion` values that are read, and whether it lives in a namespace."""

    type: type[Object]
    api_versions: tuple[str, ...]
    namespaced: bool


KINDS: Final[Mapping[str, Kind]] = {
    "Namespace": Kind(Namespace, ("v1",), namespaced=False),
    "Node": Kind(Node, ("v1",), namespaced=False),
    "ServiceAccount": Kind(ServiceAccount, ("v1",), namespaced=True),
    "Pod": Kind(Pod, ("v1",), namespaced=True),
    "Service": Kind(Service, ("v1",), namespaced=True),
    "AuthorizationPolicy": Kind(
        AuthorizationPolicy, ("security.istio.io/v1", "security.istio.io/v1beta1"), namespaced=True
    ),
    "EndpointSlice": Kind(EndpointSlice, ("discovery.k8s.io/v1",), namespaced=True),
    "PeerAuthentication": Kind(
        PeerAuthentication, ("security.istio.io/v1", "security.istio.io/v1beta1"), namespaced=True
    ),
    "ServiceEntry": Kind(ServiceEntry, _NETWORKING, namespaced=True),
    "WorkloadEntry": Kind(WorkloadEntry, _NETWORKING, namespaced=True),
}


def ref(obj: Object) -> ObjectRef:
    """Kind, namespace and name of an object."""
    return ObjectRef(type(obj).__name__, obj.metadata.key)


@dataclass(frozen=True)
class Objects:
    """One state of everything a source knows; compares by content. Fields stand in the order of KINDS."""

    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    nodes: Mapping[NodeName, Node] = field(default_factory=dict)
    service_accounts: Mapping[ObjectKey, ServiceAccount] = field(default_factory=dict)
    pods: Mapping[ObjectKey, Pod] = field(default_factory=dict)
    services: Mapping[ObjectKey, Service] = field(default_factory=dict)
    authorization_policies: Mapping[ObjectKey, AuthorizationPolicy] = field(default_factory=dict)
    endpoint_slices: Mapping[ObjectKey, EndpointSlice] = field(default_factory=dict)
    peer_authentications: Mapping[ObjectKey, PeerAuthentication] = field(default_factory=dict)
    service_entries: Mapping[ObjectKey, ServiceEntry] = field(default_factory=dict)
    workload_entries: Mapping[ObjectKey, WorkloadEntry] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[Object]) -> "Objects":
        """Sort objects by kind; of two with the same kind and key the later one stays."""
        tables: dict[type, dict[object, Any]] = {kind.type: {} for kind in KINDS.values()}
        for obj in sorted(objects, key=ref):
            key = obj.metadata.key
            tables[type(obj)][key if key.namespace else key.name] = obj
        return cls(*(tables[kind.type] for kind in KINDS.values()))  # type: ignore[arg-type]

    def namespace_of(self, pod: Pod) -> Namespace | None:
        """The pod's Namespace object; None where the source has none, as if it bore no label."""
        return self.namespaces.get(pod.metadata.namespace)

    def pods_on(self, node: str) -> tuple[Pod, ...]:
        """The pods that are assigned to a node, by namespace and name."""
        found = (pod for pod in self.pods.values() if pod.spec.node_name == node)
        return tuple(sorted(found, key=lambda pod: pod.metadata.key))
