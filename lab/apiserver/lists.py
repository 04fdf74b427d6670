"""Which lists of the built-in kinds merge, and by what; which structs and maps have one owner.

The API reference gives each field's patch strategy and key; OpenAPI calls them x-kubernetes-patch-merge-key,
x-kubernetes-list-type, x-kubernetes-list-map-keys and x-kubernetes-map-type. What is not named here is atomic
(lists) or granular (structs, maps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ListRule:
    """`keys`: of server-side apply, () for a set. `merge_key`: of strategic merge."""

    keys: tuple[str, ...]
    merge_key: str = ""
    merges: bool = False
    retains_keys: bool = False
    key_defaults: tuple[tuple[str, Any], ...] = ()
    applies: bool = True
    """False: server-side apply takes the list as one value though strategic merge merges it."""


def _by(key: str, **more: Any) -> ListRule:
    return ListRule((key,), key, **more)


_TCP = (("protocol", "TCP"),)
_CONDITIONS = _by("type")
_ONLY_APPLY_CONDITIONS = ListRule(("type",))

LISTS: dict[str, ListRule] = {
    "ObjectMeta.finalizers": ListRule((), merges=True),
    "ObjectMeta.ownerReferences": _by("uid"),
    "PodSpec.containers": _by("name"),
    "PodSpec.initContainers": _by("name"),
    "PodSpec.ephemeralContainers": _by("name"),
    "PodSpec.volumes": _by("name", retains_keys=True),
    "PodSpec.imagePullSecrets": _by("name", key_defaults=(("name", ""),)),
    "PodSpec.hostAliases": _by("ip"),
    "PodSpec.topologySpreadConstraints": ListRule(("topologyKey", "whenUnsatisfiable"), "topologyKey"),
    "PodSpec.schedulingGates": _by("name"),
    "PodSpec.resourceClaims": _by("name", retains_keys=True),
    "Container.ports": ListRule(("containerPort", "protocol"), "containerPort", key_defaults=_TCP),
    "Container.env": _by("name"),
    "Container.volumeMounts": _by("mountPath"),
    "Container.volumeDevices": _by("devicePath"),
    "EphemeralContainer.ports": ListRule(("containerPort", "protocol"), "containerPort", key_defaults=_TCP),
    "EphemeralContainer.env": _by("name"),
    "EphemeralContainer.volumeMounts": _by("mountPath"),
    "EphemeralContainer.volumeDevices": _by("devicePath"),
    "ResourceRequirements.claims": ListRule(("name",)),
    "ContainerStatus.volumeMounts": _by("mountPath"),
    "PodStatus.conditions": _CONDITIONS,
    "PodStatus.podIPs": _by("ip"),
    "PodStatus.hostIPs": ListRule((), "ip", applies=False),
    "PodStatus.resourceClaimStatuses": _by("name", retains_keys=True),
    "ServiceSpec.ports": ListRule(("port", "protocol"), "port", key_defaults=_TCP),
    "ServiceStatus.conditions": _CONDITIONS,
    "ServiceAccount.secrets": _by("name"),
    "NodeSpec.podCIDRs": ListRule((), merges=True),
    "NodeStatus.addresses": _by("type"),
    "NodeStatus.conditions": _CONDITIONS,
    "NamespaceStatus.conditions": _CONDITIONS,
    "PersistentVolumeClaimStatus.conditions": _CONDITIONS,
    "ReplicationControllerStatus.conditions": _CONDITIONS,
    "DeploymentStatus.conditions": _CONDITIONS,
    "ReplicaSetStatus.conditions": _CONDITIONS,
    "DaemonSetStatus.conditions": _CONDITIONS,
    "StatefulSetStatus.conditions": _CONDITIONS,
    "JobStatus.conditions": ListRule((), "type", applies=False),
    "HorizontalPodAutoscalerStatus.conditions": _CONDITIONS,
    "PodDisruptionBudgetStatus.conditions": _CONDITIONS,
    "CustomResourceDefinitionStatus.conditions": _ONLY_APPLY_CONDITIONS,
    "APIServiceStatus.conditions": _CONDITIONS,
    "MutatingWebhookConfiguration.webhooks": _by("name"),
    "ValidatingWebhookConfiguration.webhooks": _by("name"),
    "JSONSchemaProps.required": ListRule((), applies=False),
    "TopologySelectorTerm.matchLabelExpressions": ListRule((), applies=False),
    "CSINodeSpec.drivers": _by("name"),
    "Endpoint.addresses": ListRule(()),
    "UncountedTerminatedPods.failed": ListRule(()),
    "UncountedTerminatedPods.succeeded": ListRule(()),
}

ATOMIC_STRUCTS = frozenset(
    {
        "ConfigMapKeySelector",
        "CrossVersionObjectReference",
        "EndpointAddress",
        "EndpointPort",
        "FileKeySelector",
        "LabelSelector",
        "LocalObjectReference",
        "NodeSelector",
        "ServiceBackendPort",
        "NodeSelectorTerm",
        "ObjectFieldSelector",
        "ObjectReference",
        "OwnerReference",
        "ResourceFieldSelector",
        "RoleRef",
        "ScopeSelector",
        "SecretKeySelector",
        "SecretReference",
        "Subject",
        "TopologySelectorTerm",
        "TypedLocalObjectReference",
    }
)

ATOMIC_MAPS = frozenset(
    {"PodSpec.nodeSelector", "ServiceSpec.selector", "ReplicationControllerSpec.selector", "Scheduling.nodeSelector"}
)

STRING_MAPS = frozenset(
    {
        "ObjectMeta.labels",
        "ObjectMeta.annotations",
        "ConfigMap.data",
        "Secret.data",
        "Secret.stringData",
        "ConfigMap.binaryData",
        "LabelSelector.matchLabels",
        "PodSpec.nodeSelector",
        "ServiceSpec.selector",
        "ReplicationControllerSpec.selector",
        "StorageClass.parameters",
    }
)
"""Maps whose values are strings; the models only say that they are maps."""

QUANTITY_MAPS = frozenset(
    {
        "ResourceRequirements.limits",
        "ResourceRequirements.requests",
        "NodeStatus.capacity",
        "NodeStatus.allocatable",
        "PodSpec.overhead",
        "VolumeResourceRequirements.requests",
        "VolumeResourceRequirements.limits",
        "PersistentVolumeSpec.capacity",
    }
)
