"""The kinds that the server knows without a CustomResourceDefinition, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
CREATE_ONLY = ("create",)


@dataclass(frozen=True)
class Kind:
    """One kind in one version, as discovery shows it and as the paths name it."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    counts_generations: bool = False
    """Whether metadata.generation grows with each change of the spec."""
    model: str = ""
    """`module.Class` of the built-in schema; empty for kinds of a CustomResourceDefinition."""
    singular: str = ""
    storage_version: str = ""
    """Empty: this version is the stored one."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """Under what the objects are stored and authorised: `pods`, `deployments.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def list_kind(self) -> str:
        return f"{self.kind}List"

    @property
    def singular_name(self) -> str:
        return self.singular or self.kind.lower()

    @property
    def has_status(self) -> bool:
        return "status" in self.subresources

    @property
    def virtual(self) -> bool:
        """Whether requests are answered and nothing is stored (reviews)."""
        return self.verbs == CREATE_ONLY


@dataclass(frozen=True)
class Subresource:
    """What discovery says of a subresource: its kind when it differs from the parent's, and its verbs."""

    verbs: tuple[str, ...]
    group: str = ""
    version: str = ""
    kind: str = ""


SUBRESOURCES = {
    "status": Subresource(("get", "patch", "update")),
    "scale": Subresource(("get", "patch", "update"), "autoscaling", "v1", "Scale"),
    "finalize": Subresource(("update",)),
    "ephemeralcontainers": Subresource(("get", "patch", "update")),
    "log": Subresource(("get",)),
    "exec": Subresource(("create", "get"), kind="PodExecOptions", version="v1"),
    "attach": Subresource(("create", "get"), kind="PodAttachOptions", version="v1"),
    "portforward": Subresource(("create", "get"), kind="PodPortForwardOptions", version="v1"),
    "binding": Subresource(("create",), kind="Binding", version="v1"),
    "eviction": Subresource(("create",), "policy", "v1", "Eviction"),
    "token": Subresource(("create",), "authentication.k8s.io", "v1", "TokenRequest"),
    "approval": Subresource(("get", "patch", "update")),
}

_ALL = ("all",)
_S = ("status",)
_POD_PARTS = ("status", "ephemeralcontainers", "log", "exec", "attach", "portforward", "binding", "eviction")
_RBAC = "rbac.authorization.k8s.io"
_AUTHORIZATION = "authorization.k8s.io"
_AUTHENTICATION = "authentication.k8s.io"


def _core(kind: str, plural: str, short: str = "", **more: Any) -> Kind:
    names = tuple(short.split())
    return Kind("", "v1", kind, plural, short_names=names, model=f"core_v1.{kind}", **more)


def _of(group: str, version: str, module: str, kind: str, plural: str, short: str = "", **more: Any) -> Kind:
    names = tuple(short.split())
    return Kind(group, version, kind, plural, short_names=names, model=f"{module}.{kind}", **more)


def _review(group: str, module: str, kind: str, namespaced: bool = False) -> Kind:
    return _of(group, "v1", module, kind, kind.lower() + "s", namespaced=namespaced, verbs=CREATE_ONLY)


BUILT_IN: tuple[Kind, ...] = (
    _core("ConfigMap", "configmaps", "cm"),
    _core("Endpoints", "endpoints", "ep"),
    _core("Event", "events", "ev"),
    _core("LimitRange", "limitranges", "limits"),
    _core("Namespace", "namespaces", "ns", namespaced=False, subresources=("status", "finalize")),
    _core("Node", "nodes", "no", namespaced=False, subresources=_S),
    _core("PersistentVolume", "persistentvolumes", "pv", namespaced=False, subresources=_S),
    _core("PersistentVolumeClaim", "persistentvolumeclaims", "pvc", subresources=_S),
    _core("Pod", "pods", "po", categories=_ALL, subresources=_POD_PARTS, counts_generations=True),
    _core("PodTemplate", "podtemplates", counts_generations=True),
    _core(
        "ReplicationController",
        "replicationcontrollers",
        "rc",
        categories=_ALL,
        subresources=("status", "scale"),
        counts_generations=True,
    ),
    _core("ResourceQuota", "resourcequotas", "quota", subresources=_S),
    _core("Secret", "secrets"),
    _core("Service", "services", "svc", categories=_ALL, subresources=_S),
    _core("ServiceAccount", "serviceaccounts", "sa", subresources=("token",)),
    _of("apps", "v1", "apps_v1", "ControllerRevision", "controllerrevisions"),
    _of(
        "apps",
        "v1",
        "apps_v1",
        "DaemonSet",
        "daemonsets",
        "ds",
        categories=_ALL,
        subresources=_S,
        counts_generations=True,
    ),
    _of(
        "apps",
        "v1",
        "apps_v1",
        "Deployment",
        "deployments",
        "deploy",
        categories=_ALL,
        subresources=("status", "scale"),
        counts_generations=True,
    ),
    _of(
        "apps",
        "v1",
        "apps_v1",
        "ReplicaSet",
        "replicasets",
        "rs",
        categories=_ALL,
        subresources=("status", "scale"),
        counts_generations=True,
    ),
    _of(
        "apps",
        "v1",
        "apps_v1",
        "StatefulSet",
        "statefulsets",
        "sts",
        categories=_ALL,
        subresources=("status", "scale"),
        counts_generations=True,
    ),
    _of(
        "batch",
        "v1",
        "batch_v1",
        "CronJob",
        "cronjobs",
        "cj",
        categories=_ALL,
        subresources=_S,
        counts_generations=True,
    ),
    _of("batch", "v1", "batch_v1", "Job", "jobs", categories=_ALL, subresources=_S, counts_generations=True),
    _of(
        "autoscaling",
        "v2",
        "autoscaling_v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        "hpa",
        categories=_ALL,
        subresources=_S,
    ),
    _of(
        "autoscaling",
        "v1",
        "autoscaling_v1",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        "hpa",
        categories=_ALL,
        subresources=_S,
        storage_version="v2",
    ),
    _of(
        "policy",
        "v1",
        "policy_v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        "pdb",
        subresources=_S,
        counts_generations=True,
    ),
    _of(
        "networking.k8s.io",
        "v1",
        "networking_v1",
        "NetworkPolicy",
        "networkpolicies",
        "netpol",
        counts_generations=True,
    ),
    _of(
        "networking.k8s.io",
        "v1",
        "networking_v1",
        "Ingress",
        "ingresses",
        "ing",
        subresources=_S,
        counts_generations=True,
    ),
    _of(
        "networking.k8s.io",
        "v1",
        "networking_v1",
        "IngressClass",
        "ingressclasses",
        namespaced=False,
        counts_generations=True,
    ),
    _of("discovery.k8s.io", "v1", "discovery_v1", "EndpointSlice", "endpointslices", counts_generations=True),
    _of("coordination.k8s.io", "v1", "coordination_v1", "Lease", "leases"),
    _of("events.k8s.io", "v1", "events_v1", "Event", "events", "ev"),
    _of(_RBAC, "v1", "rbac_v1", "ClusterRole", "clusterroles", namespaced=False),
    _of(_RBAC, "v1", "rbac_v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    _of(_RBAC, "v1", "rbac_v1", "Role", "roles"),
    _of(_RBAC, "v1", "rbac_v1", "RoleBinding", "rolebindings"),
    _of("storage.k8s.io", "v1", "storage_v1", "StorageClass", "storageclasses", "sc", namespaced=False),
    _of("storage.k8s.io", "v1", "storage_v1", "CSINode", "csinodes", namespaced=False),
    _of("storage.k8s.io", "v1", "storage_v1", "CSIDriver", "csidrivers", namespaced=False),
    _of(
        "storage.k8s.io", "v1", "storage_v1", "VolumeAttachment", "volumeattachments", namespaced=False, subresources=_S
    ),
    _of(
        "scheduling.k8s.io",
        "v1",
        "scheduling_v1",
        "PriorityClass",
        "priorityclasses",
        "pc",
        namespaced=False,
        counts_generations=True,
    ),
    _of("node.k8s.io", "v1", "node_v1", "RuntimeClass", "runtimeclasses", namespaced=False),
    _of(
        "apiextensions.k8s.io",
        "v1",
        "apiextensions_v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        "crd crds",
        namespaced=False,
        categories=("api-extensions",),
        subresources=_S,
        counts_generations=True,
    ),
    _of(
        "apiregistration.k8s.io",
        "v1",
        "apiregistration_v1",
        "APIService",
        "apiservices",
        namespaced=False,
        categories=("api-extensions",),
        subresources=_S,
    ),
    _of(
        "admissionregistration.k8s.io",
        "v1",
        "admissionregistration_v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
        namespaced=False,
        categories=("api-extensions",),
        counts_generations=True,
    ),
    _of(
        "admissionregistration.k8s.io",
        "v1",
        "admissionregistration_v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        namespaced=False,
        categories=("api-extensions",),
        counts_generations=True,
    ),
    _review(_AUTHENTICATION, "authentication_v1", "TokenReview"),
    _review(_AUTHENTICATION, "authentication_v1", "SelfSubjectReview"),
    _review(_AUTHORIZATION, "authorization_v1", "SubjectAccessReview"),
    _review(_AUTHORIZATION, "authorization_v1", "SelfSubjectAccessReview"),
    _review(_AUTHORIZATION, "authorization_v1", "SelfSubjectRulesReview"),
    _review(_AUTHORIZATION, "authorization_v1", "LocalSubjectAccessReview", namespaced=True),
)
"""Events are stored once, in the form of the core group; events.k8s.io shows the same objects."""
