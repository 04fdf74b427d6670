"""The whole translation: objects and the nodes' reports to resources."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.core import Service
from undermesh.api.identity import NodeName, ObjectKey
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import authorization, services, workloads
from undermesh.controlplane.translate.authorization import Conversion
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
    """

    resources: Mapping[ResourceKey, Resource]
    conversions: Mapping[ObjectKey, Conversion]


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
    by_namespace: defaultdict[str, list[Service]] = defaultdict(list)
    for service in filter(services.is_published, objects.services.values()):
        by_namespace[service.metadata.namespace].append(service)
        address = wds.Address(service=services.service_message(service, settings))
        resources[ResourceKey(ADDRESS_TYPE, services.resource_name(service, settings))] = encode(address)
    by_home: defaultdict[str, list[AuthorizationPolicy]] = defaultdict(list)
    for key, policy in objects.authorization_policies.items():
        if conversions[key].authorization is not None:
            by_home[key.namespace].append(policy)
    for pod in filter(workloads.is_published, objects.pods.values()):
        homes = {pod.metadata.namespace, settings.root_namespace}
        policies = [policy for home in homes for policy in by_home[home]]
        workload = workloads.workload_message(
            pod,
            state=states.get(pod.metadata.uid, report_pb2.PLAIN),
            node=objects.nodes.get(NodeName(pod.spec.node_name)),
            services=services.selected_by(by_namespace[pod.metadata.namespace], pod.metadata.labels),
            policies=[str(p.metadata.key) for p in policies if authorization.selects_pod(p, pod, settings)],
            settings=settings,
        )
        resources[ResourceKey(ADDRESS_TYPE, workload.uid)] = encode(wds.Address(workload=workload))
    return Translation(resources, conversions)
