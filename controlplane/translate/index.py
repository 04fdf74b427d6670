"""The translation kept up to date: a change touches what is derived from it and nothing else.

`take` notes what a new state of the objects makes stale, `derive` makes exactly that anew, with the same functions
as `snapshot.translate`, whose result for the same state is its specification.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.changes import changes
from undermesh.api.core import IPAddress, Namespace, Node, Pod, Service
from undermesh.api.endpoints import EndpointSlice
from undermesh.api.entries import ServiceEntry, WorkloadEntry
from undermesh.api.identity import NodeName, ObjectKey, ObjectRef, workload_uid
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import authorization, endpoints, entries, services, waypoints, workloads
from undermesh.controlplane.translate.claims import Claims
from undermesh.controlplane.translate.endpoints import Dependencies, Part
from undermesh.controlplane.translate.entries import Entry
from undermesh.controlplane.translate.faults import Fault, note
from undermesh.controlplane.translate.part_table import PartTable, Reverse
from undermesh.controlplane.translate.peer_authentication import PeerAuthentications
from undermesh.controlplane.translate.pod_table import PodTable
from undermesh.controlplane.translate.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Resource,
    ResourceKey,
    Update,
    encode,
)
from undermesh.controlplane.translate.selectors import Labelled, Selectors
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import workload_pb2 as wds

K = TypeVar("K", ObjectKey, NodeName, str)
T = TypeVar("T")

# Of policies that select in all namespaces; no namespace has this name.
_EVERYWHERE = ""


class Index:
    """The state of a mesh, and what of it is stale. After an exception it must be thrown away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._objects = Objects()
        self._pods = PodTable()
        self._parts = PartTable()
        self._claims = Claims()
        self._slices_of: Reverse[ObjectKey, ObjectRef] = Reverse()
        self._entries_of_host: Reverse[tuple[str, str], ObjectKey] = Reverse()
        self._workload_entries = Labelled()
        self._entries: dict[ObjectKey, Entry] = {}
        self._entry_selectors: Selectors[ObjectKey] = Selectors()
        self._services: Selectors[ObjectKey] = Selectors()
        self._policies: Selectors[ObjectKey] = Selectors()
        self._peer_authentications = PeerAuthentications(settings)
        self._stale_pods: set[ObjectKey] = set()
        self._stale_services: set[ObjectKey] = set()
        self._stale_entries: set[ObjectKey] = set()
        self._stale_parts: set[ObjectRef] = set()
        self._fresh: dict[ResourceKey, Resource | None] = {}
        self._complete = True
        self._notes: dict[ObjectRef, tuple[str, ...]] = {}
        self._faults: dict[ObjectRef, Exception] = {}
        self._faulty: set[ObjectRef] = set()

    def take(self, objects: Objects) -> None:
        """Takes the next consistent set of objects in.

        Raises:
            Fault: one of them cannot be taken in.
        """
        before, self._objects = self._objects, objects
        # Pods last: at the first state nothing needs to look for those that a service or a policy selects.
        for node in changes(before.nodes, objects.nodes):
            self._follow("Node", self._node, *node)
        for namespace in changes(before.namespaces, objects.namespaces):
            self._follow("Namespace", self._namespace, *namespace)
        for policy in changes(before.authorization_policies, objects.authorization_policies):
            self._follow("AuthorizationPolicy", self._policy, *policy)
        self._take_peer_authentications(before)
        for service in changes(before.services, objects.services):
            self._follow("Service", self._service, *service)
        for entry in changes(before.service_entries, objects.service_entries):
            self._follow("ServiceEntry", self._service_entry, *entry)
        for workload in changes(before.workload_entries, objects.workload_entries):
            self._follow("WorkloadEntry", self._workload_entry, *workload)
        for item in changes(before.endpoint_slices, objects.endpoint_slices):
            self._follow("EndpointSlice", self._slice, *item)
        for pod in changes(before.pods, objects.pods):
            self._follow("Pod", self._pod, *pod)

    def _follow(
        self, kind: str, handle: Callable[[K, T | None, T | None], None], key: K, before: T | None, after: T | None
    ) -> None:
        try:
            handle(key, before, after)
        except Exception as error:
            raise Fault(ObjectRef(kind, key if isinstance(key, ObjectKey) else ObjectKey("", str(key)))) from error

    def reported(self, uids: Iterable[str]) -> None:
        """The nodes' reports of these pods have changed."""
        self._stale_pods |= {key for uid in uids if (key := self._pods.by_uid.get(uid)) is not None}

    def derive(self, state_of: Callable[[Pod], int]) -> Update:
        """All that has become stale, made anew. The first one holds everything.

        Args:
            state_of: `PodState` (report.proto) as the pod's node reports it.
        """
        self._derive_entries()
        for ref in self._stale_parts:
            self._derive_part(ref)
        for key in self._stale_services:
            self._derive_service(key)
        for key in self._stale_pods:
            self._derive_pod(key, state_of)
        update = Update(self._fresh, self._complete)
        self._fresh, self._complete = {}, False
        for stale in (self._stale_entries, self._stale_parts, self._stale_services, self._stale_pods):
            stale.clear()
        return update

    def take_notes(self) -> Mapping[ObjectRef, tuple[str, ...]]:
        """How what is in force differs from what objects say, for those that have changed since the last call."""
        notes, self._notes = self._notes, {}
        return notes

    def take_faults(self) -> Mapping[ObjectRef, Exception]:
        """Objects that could not be translated and are left out, since the last call."""
        faults, self._faults = self._faults, {}
        return faults

    def _failed(self, ref: ObjectRef, error: Exception) -> None:
        self._faulty.add(ref)
        self._faults[ref] = error
        self._notes[ref] = (note(error),)

    def _mended(self, ref: ObjectRef) -> None:
        if ref in self._faulty:
            self._faulty.discard(ref)
            if ref.kind == "ServiceEntry":
                self._notes[ref] = self._entries.get(ref.key, Entry()).notes
            elif ref.kind != "WorkloadEntry":
                self._notes[ref] = ()

    # The `Surroundings` of endpoints and claims.

    def owner(self, address: IPAddress) -> Pod | None:
        """The pod at an address."""
        found = (self._objects.pods[key] for key in self._pods.at_address.get(address.packed, ()))
        return max(found, key=endpoints.precedence, default=None)

    def taken(self, address: IPAddress) -> bool:
        """Whether Kubernetes gave the address to a pod or a service."""
        return self._claims.given(address) or address.packed in self._pods.at_address

    def entry_of_host(self, namespace: str, host: str) -> ObjectKey | None:
        """The ServiceEntry to which a host name belongs."""
        return min(self._entries_of_host.get((namespace, host)), default=None)

    def pod(self, key: ObjectKey) -> Pod | None:
        """A pod by its name."""
        return self._objects.pods.get(key)

    def node(self, name: NodeName) -> Node | None:
        """A node by its name."""
        return self._objects.nodes.get(name)

    # What each change makes stale.

    def _node(self, name: NodeName, before: Node | None, after: Node | None) -> None:
        if workloads.locality(before) == workloads.locality(after) and _zone(before) == _zone(after):
            return
        self._stale_pods |= self._pods.on_node.get(name, set())
        self._stale_parts |= self._parts.on_node(name)

    def _namespace(self, name: str, before: Namespace | None, after: Namespace | None) -> None:
        if waypoints.differ(before, after):
            self._stale_services |= {key for key in self._objects.services if key.namespace == name}

    def _policy(self, key: ObjectKey, before: AuthorizationPolicy | None, after: AuthorizationPolicy | None) -> None:
        made: Resource | None = None
        selector: Mapping[str, str] = {}
        if after is None:
            self._notes[ObjectRef("AuthorizationPolicy", key)] = ()
        else:
            conversion = authorization.convert(after, self._settings)
            self._notes[ObjectRef("AuthorizationPolicy", key)] = conversion.notes
            if conversion.authorization is not None:
                made = encode(conversion.authorization)
                selector = after.spec.selector.match_labels if after.spec.selector else {}
        self._fresh[ResourceKey(AUTHORIZATION_TYPE, str(key))] = made
        everywhere = key.namespace == self._settings.root_namespace
        if (former := self._policies.selector(key)) != selector:
            for labels in (former, selector):
                self._stale_pods |= self._pods.labelled.selected(labels, None if everywhere else key.namespace)
            self._policies.put(key, _EVERYWHERE if everywhere else key.namespace, selector)

    def _take_peer_authentications(self, before: Objects) -> None:
        """They decide together, and are few: all are read anew, and the pods looked at that they may concern."""
        changed = [key for key, _, _ in changes(before.peer_authentications, self._objects.peer_authentications)]
        if not changed:
            return
        former = self._peer_authentications
        fresh = PeerAuthentications.of(self._objects.peer_authentications.values(), self._settings)
        self._peer_authentications = fresh
        standings = {**dict.fromkeys(former.standings), **fresh.standings}
        for key, standing in standings.items():
            self._notes[ObjectRef("PeerAuthentication", key)] = standing.notes if standing is not None else ()
        old, new = former.authorizations(), fresh.authorizations()
        for key in (old.keys() | new.keys()) - {key for key, made in new.items() if old.get(key) == made}:
            made = encode(new[key]) if key in new else None
            self._fresh[ResourceKey(AUTHORIZATION_TYPE, str(key))] = made
        namespaces = {key.namespace for key in changed}
        everywhere = self._settings.root_namespace in namespaces
        for namespace in list(self._pods.in_namespace) if everywhere else namespaces:
            for key in self._pods.in_namespace.get(namespace, ()):
                pod = before.pods[key]
                if former.names_for(pod) != fresh.names_for(pod):
                    self._stale_pods.add(key)

    def _service(self, key: ObjectKey, before: Service | None, after: Service | None) -> None:
        self._stale_services.add(key)
        self._judge_anew(self._claims.service(ObjectRef("Service", key), before, after))
        if before is not None and after is not None and before.spec == after.spec:
            return
        published = after is not None and services.is_published(after)
        selector = after.spec.selector if after is not None and published else {}
        for labels in (self._services.selector(key), selector):
            self._selected(key.namespace, labels)
        self._services.put(key, key.namespace, selector)
        self._stale_parts |= self._slices_of.naming((key,))

    def _service_entry(self, key: ObjectKey, before: ServiceEntry | None, after: ServiceEntry | None) -> None:
        self._stale_entries.add(key)
        self._claims.entry(ObjectRef("ServiceEntry", key), before, after)
        old, new = _hosts(key, before), _hosts(key, after)
        self._stale_entries |= self._entries_of_host.naming({*old, *new})
        self._entries_of_host.replace(key, old, new)
        selector = after.selector if after is not None else {}
        if (former := self._entry_selectors.selector(key)) != selector:
            for labels in (former, selector):
                self._selected(key.namespace, labels)
            self._entry_selectors.put(key, key.namespace, selector)

    def _workload_entry(self, key: ObjectKey, before: WorkloadEntry | None, after: WorkloadEntry | None) -> None:
        self._stale_parts.add(ObjectRef("WorkloadEntry", key))
        if before is not None:
            self._workload_entries.remove(key, before.labels)
        if after is not None:
            self._workload_entries.put(key, after.labels)

    def _slice(self, key: ObjectKey, before: EndpointSlice | None, after: EndpointSlice | None) -> None:
        ref = ObjectRef("EndpointSlice", key)
        self._stale_parts.add(ref)
        self._slices_of.replace(ref, _service_of(before), _service_of(after))

    def _pod(self, key: ObjectKey, before: Pod | None, after: Pod | None) -> None:
        self._stale_pods.add(key)
        if _standing(before) != _standing(after):
            self._stale_parts |= self._parts.naming(key)
        gone, come = self._pods.replace(before, after)
        if (gone, before and endpoints.precedence(before)) != (come, after and endpoints.precedence(after)):
            self._stale_parts |= self._parts.at_addresses({*gone, *come})
        self._judge_anew(self._claims.at(gone ^ come))

    def _judge_anew(self, claims: Iterable[ObjectRef]) -> None:
        for kind, key in claims:
            (self._stale_services if kind == "Service" else self._stale_entries).add(key)

    def _selected(self, namespace: str, labels: Mapping[str, str]) -> None:
        """What a selector selects has to be made anew."""
        self._stale_pods |= self._pods.labelled.selected(labels, namespace)
        entries_ = self._workload_entries.selected(labels, namespace)
        self._stale_parts |= {ObjectRef("WorkloadEntry", key) for key in entries_}

    # The derivation.

    def _derive_entries(self) -> None:
        """All removals before all additions: a host name may go from one entry to another."""
        made: dict[ObjectKey, Entry] = {}
        for key in self._stale_entries:
            entry = self._objects.service_entries.get(key)
            found = self._entry(key, entry) if entry is not None else Entry()
            former, made[key] = self._entries.pop(key, Entry()), found
            self._notes[ObjectRef("ServiceEntry", key)] = found.notes
            self._fresh |= {ResourceKey(ADDRESS_TYPE, name): None for name in former.services}
            if entry is not None:
                self._entries[key] = found
            if (former.services.keys(), former.ports) != (found.services.keys(), found.ports):
                self._selected(key.namespace, self._entry_selectors.selector(key))
            # Its own endpoints.
            self._stale_parts.add(ObjectRef("ServiceEntry", key))
        for found in made.values():
            for name, message in found.services.items():
                self._fresh[ResourceKey(ADDRESS_TYPE, name)] = encode(wds.Address(service=message))

    def _entry(self, key: ObjectKey, entry: ServiceEntry) -> Entry:
        try:
            return entries.of_service_entry(entry, self, self._settings)
        except Exception as error:  # noqa: BLE001
            self._failed(ObjectRef("ServiceEntry", key), error)
            return Entry(notes=(note(error),))

    def _derive_part(self, ref: ObjectRef) -> None:
        try:
            made = self._part(ref)
            self._mended(ref)
        except Exception as error:  # noqa: BLE001
            made = None
            self._failed(ref, error)
        outcome = self._parts.put(ref, *made) if made is not None else self._parts.put(ref, None)
        self._stale_pods |= outcome.pods
        self._fresh |= {ResourceKey(ADDRESS_TYPE, uid): None for uid in outcome.removed}
        for uid, workload in made[0].others.items() if made is not None else ():
            self._fresh[ResourceKey(ADDRESS_TYPE, uid)] = encode(wds.Address(workload=workload))

    def _part(self, ref: ObjectRef) -> tuple[Part, Dependencies] | None:
        """The endpoints that an object gives, and what they rest on; None: it gives none."""
        if ref.kind == "EndpointSlice":
            return self._slice_part(ref.key)
        if ref.kind == "ServiceEntry":
            return self._entry_part(ref.key)
        return self._workload_entry_part(ref.key)

    def _slice_part(self, key: ObjectKey) -> tuple[Part, Dependencies] | None:
        item = self._objects.endpoint_slices.get(key)
        service = self._objects.services.get(ObjectKey(key.namespace, item.service)) if item is not None else None
        if item is None or service is None:
            return None
        part = endpoints.of_slice(item, service, self, self._settings)
        return (part, endpoints.dependencies(item)) if part is not None else None

    def _entry_part(self, key: ObjectKey) -> tuple[Part, Dependencies] | None:
        entry = self._objects.service_entries.get(key)
        if entry is None:
            return None
        part = entries.endpoints_of(entry, self._entries[key], self, self._settings)
        return part, entries.dependencies(entry.spec.endpoints)

    def _workload_entry_part(self, key: ObjectKey) -> tuple[Part, Dependencies] | None:
        entry = self._objects.workload_entries.get(key)
        self._notes[ObjectRef("WorkloadEntry", key)] = entries.workload_entry_notes(entry) if entry is not None else ()
        if entry is None:
            return None
        own = [self._objects.services[name] for name in self._services.matching(key.namespace, entry.labels)]
        chosen = [self._entries[name] for name in self._entry_selectors.matching(key.namespace, entry.labels)]
        part = entries.of_workload_entry(entry, own, chosen, self, self._settings)
        return part, entries.dependencies([entry.spec])

    def _derive_service(self, key: ObjectKey) -> None:
        try:
            made, notes = self._service_resource(key)
        except Exception as error:  # noqa: BLE001
            made, notes = None, (note(error),)
            self._failed(ObjectRef("Service", key), error)
        self._notes[ObjectRef("Service", key)] = notes
        self._fresh[ResourceKey(ADDRESS_TYPE, services.name_of(key, self._settings))] = made

    def _service_resource(self, key: ObjectKey) -> tuple[Resource | None, tuple[str, ...]]:
        service = self._objects.services.get(key)
        made = None
        notes: tuple[str, ...] = ()
        if service is not None and services.is_published(service):
            claimed, notes = services.free_claims(service, self.taken)
            waypoint = waypoints.of_service(service, self._objects.namespaces.get(key.namespace))
            if waypoint is not None:
                notes = (*notes, waypoints.note(waypoint))
            message = services.service_message(service, claimed, waypoint, self._settings)
            made = encode(wds.Address(service=message))
        return made, notes

    def _derive_pod(self, key: ObjectKey, state_of: Callable[[Pod], int]) -> None:
        pod = self._objects.pods.get(key)
        made = None
        try:
            if pod is not None and workloads.is_published(pod):
                made = encode(wds.Address(workload=self._workload(pod, state_of(pod))))
            self._mended(ObjectRef("Pod", key))
        except Exception as error:  # noqa: BLE001
            self._failed(ObjectRef("Pod", key), error)
        self._fresh[ResourceKey(ADDRESS_TYPE, workload_uid(self._settings.cluster, *key))] = made

    def _workload(self, pod: Pod, state: int) -> wds.Workload:
        key, labels = pod.metadata.key, pod.metadata.labels
        policies = [*self._policies.matching(key.namespace, labels), *self._policies.matching(_EVERYWHERE, labels)]
        given = self._parts.given(key)
        for name in self._entry_selectors.matching(key.namespace, labels):
            endpoints.join(given, self._entries[name].offered({}))
        return workloads.workload_message(
            pod,
            state=state,
            node=self._objects.nodes.get(NodeName(pod.spec.node_name)),
            services=[self._objects.services[name] for name in self._services.matching(key.namespace, labels)],
            given=given,
            policies=[*map(str, policies), *self._peer_authentications.names_for(pod)],
            settings=self._settings,
        )


def _zone(node: Node | None) -> str | None:
    """Whether a node names its zone decides if a slice's own word counts."""
    return node.metadata.labels.get(workloads.ZONE_LABEL) if node is not None else None


def _standing(pod: Pod | None) -> object:
    """All that a slice which names the pod asks of it."""
    if pod is None or not workloads.is_published(pod):
        return None
    return pod.metadata.uid, pod.status.pod_ips


def _hosts(key: ObjectKey, entry: ServiceEntry | None) -> set[tuple[str, str]]:
    return {(key.namespace, host) for host in entry.spec.hosts} if entry is not None else set()


def _service_of(item: EndpointSlice | None) -> tuple[ObjectKey, ...]:
    return (ObjectKey(item.metadata.namespace, item.service),) if item is not None and item.service else ()
