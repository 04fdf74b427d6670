"""What stands in a new cluster, and what each new namespace gets."""

from __future__ import annotations

import logging
from typing import Any

from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.registry import Registry
from undermesh.lab.apiserver.store import Change, Op
from undermesh.lab.apiserver.user import AUTHENTICATED, MASTERS, Write

log = logging.getLogger(__name__)

NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
_READ = ["get", "list", "watch"]
_WRITE = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_NAMESPACED = {
    "": [
        "configmaps",
        "endpoints",
        "persistentvolumeclaims",
        "pods",
        "replicationcontrollers",
        "serviceaccounts",
        "services",
    ],
    "apps": [
        "daemonsets",
        "deployments",
        "deployments/scale",
        "replicasets",
        "replicasets/scale",
        "statefulsets",
        "statefulsets/scale",
        "controllerrevisions",
    ],
    "batch": ["cronjobs", "jobs"],
    "autoscaling": ["horizontalpodautoscalers"],
    "policy": ["poddisruptionbudgets"],
    "networking.k8s.io": ["ingresses", "networkpolicies"],
    "discovery.k8s.io": ["endpointslices"],
    "coordination.k8s.io": ["leases"],
}


def _rules(verbs: list[str]) -> list[Object]:
    return [{"apiGroups": [group], "resources": names, "verbs": verbs} for group, names in _NAMESPACED.items()]


_VIEW = [
    *_rules(_READ),
    {
        "apiGroups": [""],
        "resources": ["events", "namespaces", "pods/log", "pods/status", "limitranges", "resourcequotas"],
        "verbs": _READ,
    },
]
_EDIT = [
    *_VIEW,
    *_rules(_WRITE),
    {"apiGroups": [""], "resources": ["secrets"], "verbs": _WRITE},
    {
        "apiGroups": [""],
        "resources": ["pods/exec", "pods/attach", "pods/portforward", "pods/eviction"],
        "verbs": ["create", "get"],
    },
    {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
]
_RBAC = "rbac.authorization.k8s.io"
CLUSTER_ROLES: dict[str, list[Object]] = {
    "cluster-admin": [
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ],
    "admin": [*_EDIT, {"apiGroups": [_RBAC], "resources": ["roles", "rolebindings"], "verbs": _WRITE}],
    "edit": _EDIT,
    "view": _VIEW,
    "system:basic-user": [
        {
            "apiGroups": ["authorization.k8s.io"],
            "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
            "verbs": ["create"],
        },
        {"apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"]},
    ],
    "system:discovery": [
        {
            "nonResourceURLs": [
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ],
            "verbs": ["get"],
        }
    ],
    "system:public-info-viewer": [
        {"nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"], "verbs": ["get"]}
    ],
    "system:service-account-issuer-discovery": [
        {"nonResourceURLs": ["/.well-known/openid-configuration", "/openid/v1/jwks"], "verbs": ["get"]}
    ],
    "system:auth-delegator": [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
    ],
    "system:node": [
        {"apiGroups": [""], "resources": ["nodes", "nodes/status", "pods", "pods/status", "events"], "verbs": ["*"]},
        {
            "apiGroups": [""],
            "resources": ["configmaps", "secrets", "services", "serviceaccounts", "namespaces"],
            "verbs": _READ,
        },
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"]},
        {"apiGroups": ["storage.k8s.io", "node.k8s.io"], "resources": ["*"], "verbs": _READ},
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
    ],
}
_BOUND = {
    "cluster-admin": [MASTERS],
    "system:basic-user": [AUTHENTICATED],
    "system:discovery": [AUTHENTICATED],
    "system:public-info-viewer": [AUTHENTICATED, "system:unauthenticated"],
    "system:service-account-issuer-discovery": ["system:serviceaccounts"],
    "system:node": ["system:nodes"],
}


class Bootstrap:
    """Creates what is missing at the start, and the parts of new namespaces."""

    def __init__(self, registry: Registry, catalog: Catalog, root_certificate: str) -> None:
        self._registry = registry
        self._catalog = catalog
        self._root = root_certificate

    def create(self) -> None:
        """The first objects of a cluster; those that exist stay as they are."""
        for name in NAMESPACES:
            self._ensure("", "namespaces", "", {"metadata": {"name": name}})
        labels = {"kubernetes.io/bootstrapping": "rbac-defaults"}
        for name, rules in CLUSTER_ROLES.items():
            self._ensure(_RBAC, "clusterroles", "", {"metadata": {"name": name, "labels": labels}, "rules": rules})
        for name, groups in _BOUND.items():
            subjects = [{"kind": "Group", "apiGroup": _RBAC, "name": group} for group in groups]
            role = {"apiGroup": _RBAC, "kind": "ClusterRole", "name": name}
            body = {"metadata": {"name": name, "labels": labels}, "roleRef": role, "subjects": subjects}
            self._ensure(_RBAC, "clusterrolebindings", "", body)
        for name, value in (("system-cluster-critical", 2000000000), ("system-node-critical", 2000001000)):
            self._ensure("scheduling.k8s.io", "priorityclasses", "", {"metadata": {"name": name}, "value": value})

    def publish(self, address: str, port: int, cluster_ip: str) -> None:
        """The Service `kubernetes`, with this server as its endpoint."""
        labels = {"component": "apiserver", "provider": "kubernetes"}
        ports = [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]
        self._ensure(
            "",
            "services",
            "default",
            {
                "metadata": {"name": "kubernetes", "labels": labels},
                "spec": {"clusterIP": cluster_ip, "ports": ports},
            },
        )
        family = "IPv6" if ":" in address else "IPv4"
        kind = self._catalog.find("discovery.k8s.io", "v1", "endpointslices")
        body: Object = {
            "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family,
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        }
        self._ensure("discovery.k8s.io", "endpointslices", "default", body)
        old = self._catalog.find("", "v1", "endpoints")
        subsets = [{"addresses": [{"ip": address}], "ports": body["ports"]}]
        mirrored = {"endpointslice.kubernetes.io/skip-mirror": "true"}
        self._ensure(
            "", "endpoints", "default", {"metadata": {"name": "kubernetes", "labels": mirrored}, "subsets": subsets}
        )
        if old is not None:
            self._registry.mutate(old, ("default", "kubernetes"), lambda obj: obj.update({"subsets": subsets}))
        if kind is not None:
            parts = {"endpoints": body["endpoints"], "ports": body["ports"]}
            self._registry.mutate(kind, ("default", "kubernetes"), lambda obj: obj.update(parts))

    def observe(self, resource: str, change: Change) -> None:
        """Called after each write: a new namespace gets its parts, a deleted part comes back."""
        if resource == "namespaces" and change.op is Op.ADDED:
            self._equip(change.key[1])
        elif change.op is Op.DELETED and (resource, change.key[1]) in (
            ("serviceaccounts", "default"),
            ("configmaps", "kube-root-ca.crt"),
        ):
            found = self._registry.store.get("namespaces", ("", change.key[0]))
            if found is not None and not found.obj["metadata"].get("deletionTimestamp"):
                self._equip(change.key[0])

    def _equip(self, namespace: str) -> None:
        self._ensure("", "serviceaccounts", namespace, {"metadata": {"name": "default"}})
        annotation = {"kubernetes.io/description": "The root certificate of this cluster's API server."}
        body = {"metadata": {"name": "kube-root-ca.crt", "annotations": annotation}, "data": {"ca.crt": self._root}}
        self._ensure("", "configmaps", namespace, body)

    def _ensure(self, group: str, plural: str, namespace: str, body: Any) -> None:
        kind = self._catalog.find(group, "v1", plural)
        if kind is None:
            raise RuntimeError(f"{plural}.{group} is not a kind of this server")
        if self._registry.store.get(kind.resource, (namespace, body["metadata"]["name"])) is None:
            self._registry.create(kind, namespace, body, Write())
