"""The whole translation: objects and the nodes' reports to resources."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.core import Service
from undermesh.api.entries import ServiceEntry
from undermesh.api.identity import NodeName, ObjectKey, ObjectRef
from undermesh.api.meta import selects
from undermesh.api.objects import Objects, ref
from undermesh.controlplane.translate import authorization, endpoints, entries, services, waypoints, workloads
from undermesh.controlplane.translate.authorization import Conversion
from undermesh.controlplane.translate.entries import Entry
from undermesh.controlplane.translate.peer_authentication import PeerAuthentications, Standing
from undermesh.controlplane.translate.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Resource,
    ResourceKey,
    encode,
)
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import report_pb2
from undermesh.proto import workload_pb2 as wds


@dataclass(frozen=True)
class Translation:
    """The outcome.

    Attributes:
        resources: What to publish. A workload never names a policy that is not among them.
        conversions: What became of each AuthorizationPolicy.
        standings: What became of each PeerAuthentication.
        notes: What of a service or an entry is not published, and why.
    """

    resources: Mapping[ResourceKey, Resource]
    conversions: Mapping[ObjectKey, Conversion]
    standings: Mapping[ObjectKey, Standing]
    notes: Mapping[ObjectRef, tuple[str, ...]]


def translate(objects: Objects, states: Mapping[str, int], settings: Settings) -> Translation:
    """Translate a consistent set of objects.

    Args:
        objects: A snapshot of a source.
        states: `PodState` (report.proto) by pod uid, as the nodes report it; a missing pod is PLAIN.
        settings: The mesh.
    """
    conversions = {
        key: authorization.convert(policy, settings) for key, policy in objects.authorization_policies.items()
    }
    resources: dict[ResourceKey, Resource] = {}
    for key, conversion in conversions.items():
        if conversion.authorization is not None:
            resources[ResourceKey(AUTHORIZATION_TYPE, str(key))] = encode(conversion.authorization)
    peer_authentications = PeerAuthentications.of(objects.peer_authentications.values(), settings)
    for key, denial in peer_authentications.authorizations().items():
        resources[ResourceKey(AUTHORIZATION_TYPE, str(key))] = encode(denial)
    surroundings = endpoints.SnapshotSurroundings(objects)
    notes: dict[ObjectRef, tuple[str, ...]] = {}
    by_namespace: defaultdict[str, list[Service]] = defaultdict(list)
    for service in filter(services.is_published, objects.services.values()):
        by_namespace[service.metadata.namespace].append(service)
        claimed, found = services.free_claims(service, surroundings.taken)
        waypoint = waypoints.of_service(service, objects.namespaces.get(service.metadata.namespace))
        notes[ref(service)] = (*found, waypoints.note(waypoint)) if waypoint is not None else found
        address = wds.Address(service=services.service_message(service, claimed, waypoint, settings))
        resources[ResourceKey(ADDRESS_TYPE, services.resource_name(service, settings))] = encode(address)
    by_home: defaultdict[str, list[AuthorizationPolicy]] = defaultdict(list)
    for key, policy in objects.authorization_policies.items():
        if conversions[key].authorization is not None:
            by_home[key.namespace].append(policy)
    given = endpoints.from_slices(objects, settings)
    selecting: defaultdict[str, list[tuple[ServiceEntry, Entry]]] = defaultdict(list)
    for key, entry in sorted(objects.service_entries.items()):
        made = entries.of_service_entry(entry, surroundings, settings)
        notes[ref(entry)] = made.notes
        for name, message in made.services.items():
            resources[ResourceKey(ADDRESS_TYPE, name)] = encode(wds.Address(service=message))
        given.add(entries.endpoints_of(entry, made, surroundings, settings))
        if entry.selector:
            selecting[key.namespace].append((entry, made))
    for key, item in sorted(objects.workload_entries.items()):
        notes[ref(item)] = entries.workload_entry_notes(item)
        own = services.selected_by(by_namespace[key.namespace], item.labels)
        chosen = [made for entry, made in selecting[key.namespace] if selects(entry.selector, item.labels)]
        given.add(entries.of_workload_entry(item, own, chosen, surroundings, settings))
    for uid, opaque in given.others.items():
        resources[ResourceKey(ADDRESS_TYPE, uid)] = encode(wds.Address(workload=opaque))
    for pod in filter(workloads.is_published, objects.pods.values()):
        homes = {pod.metadata.namespace, settings.root_namespace}
        candidates = [policy for home in homes for policy in by_home[home]]
        names = [str(p.metadata.key) for p in candidates if authorization.selects_pod(p, pod, settings)]
        of_pod = given.of_pods[pod.metadata.key]
        for entry, made in selecting[pod.metadata.namespace]:
            if selects(entry.selector, pod.metadata.labels):
                endpoints.join(of_pod, made.offered({}))
        workload = workloads.workload_message(
            pod,
            state=states.get(pod.metadata.uid, report_pb2.PLAIN),
            node=objects.nodes.get(NodeName(pod.spec.node_name)),
            services=services.selected_by(by_namespace[pod.metadata.namespace], pod.metadata.labels),
            given=of_pod,
            policies=[*names, *peer_authentications.names_for(pod)],
            settings=settings,
        )
        resources[ResourceKey(ADDRESS_TYPE, workload.uid)] = encode(wds.Address(workload=workload))
    return Translation(resources, conversions, peer_authentications.standings, {r: n for r, n in notes.items() if n})
