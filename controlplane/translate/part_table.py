"""What slices and entries give to services, and on what each rests."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from undermesh.api.core import IPAddress
from undermesh.api.identity import NodeName, ObjectKey, ObjectRef
from undermesh.controlplane.translate import endpoints
from undermesh.controlplane.translate.endpoints import Dependencies, Part
from undermesh.proto import workload_pb2 as wds

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)
_NOTHING = Dependencies(frozenset(), frozenset(), frozenset())


class Reverse(Generic[K, V]):
    """Objects by something that they name."""

    def __init__(self) -> None:
        self._objects: dict[K, set[V]] = {}

    def get(self, name: K) -> Iterable[V]:
        """Those that name it."""
        return self._objects.get(name, ())

    def naming(self, names: Iterable[K]) -> set[V]:
        """Those that name any of them."""
        return {obj for name in names for obj in self.get(name)}

    def replace(self, obj: V, before: Iterable[K], after: Iterable[K]) -> None:
        """What an object names has changed."""
        for name in before:
            self._objects[name].discard(obj)
            if not self._objects[name]:
                del self._objects[name]
        for name in after:
            self._objects.setdefault(name, set()).add(obj)


class Outcome(NamedTuple):
    """What a part's new state changes.

    Attributes:
        pods: Those whose endpoints it changes.
        removed: Uids of workloads of its own that are no more.
    """

    pods: set[ObjectKey]
    removed: frozenset[str]


class _Kept(NamedTuple):
    pods: Mapping[ObjectKey, Mapping[str, wds.PortList]]
    others: frozenset[str]
    rests_on: Dependencies


class PartTable:
    """Parts by the object that gives them, and those objects by pod, node and address."""

    def __init__(self) -> None:
        self._kept: dict[ObjectRef, _Kept] = {}
        self._of_pod: Reverse[ObjectKey, ObjectRef] = Reverse()
        self._naming: Reverse[ObjectKey, ObjectRef] = Reverse()
        self._on_node: Reverse[NodeName, ObjectRef] = Reverse()
        self._at_address: Reverse[bytes, ObjectRef] = Reverse()

    def put(self, ref: ObjectRef, part: Part | None, rests_on: Dependencies = _NOTHING) -> Outcome:
        """Keeps what an object gives now, and on what that rests; None: it gives nothing."""
        old = self._kept.pop(ref, _Kept({}, frozenset(), _NOTHING))
        # The workloads of its own are published and need not be held here too.
        new = (
            _Kept(part.pods, frozenset(part.others), rests_on) if part is not None else _Kept({}, frozenset(), _NOTHING)
        )
        if part is not None:
            self._kept[ref] = new
        self._of_pod.replace(ref, old.pods, new.pods)
        self._naming.replace(ref, old.rests_on.pods, new.rests_on.pods)
        self._on_node.replace(ref, old.rests_on.nodes, new.rests_on.nodes)
        self._at_address.replace(ref, _packed(old.rests_on.addresses), _packed(new.rests_on.addresses))
        changed = {pod for pod in old.pods.keys() | new.pods.keys() if old.pods.get(pod) != new.pods.get(pod)}
        return Outcome(changed, old.others - new.others)

    def given(self, pod: ObjectKey) -> dict[str, wds.PortList]:
        """A pod's ports by resource name of a service; of two objects the first by name holds."""
        ports: dict[str, wds.PortList] = {}
        for ref in sorted(self._of_pod.get(pod)):
            endpoints.join(ports, self._kept[ref].pods[pod])
        return ports

    def on_node(self, node: NodeName) -> set[ObjectRef]:
        """Those with an endpoint on a node."""
        return self._on_node.naming((node,))

    def naming(self, pod: ObjectKey) -> set[ObjectRef]:
        """Those with an endpoint that names a pod."""
        return self._naming.naming((pod,))

    def at_addresses(self, addresses: Iterable[bytes]) -> set[ObjectRef]:
        """Those with an endpoint at one of the addresses."""
        return self._at_address.naming(addresses)


def _packed(addresses: Iterable[IPAddress]) -> list[bytes]:
    return [address.packed for address in addresses]
