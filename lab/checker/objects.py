"""What the checker puts into a cluster: three namespaces, pods in which peers run, and services in front of them.

Pure: objects for kubectl. `mesh` is enrolled, `plain` is not, `flip` changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from undermesh.lab.checker.shapes import PORTS

MESH, FLIP, PLAIN = "check-mesh", "check-flip", "check-plain"
NAMESPACES = (MESH, FLIP, PLAIN)
ENROL_LABEL = "istio.io/dataplane-mode"
DENIED = "mallory"
"""The account that policies deny."""
CLOSED = "dave"
"""The pod for which a policy that cannot be read denies everything."""
CHURNING = "churn"
"""The pod that is replaced; it only serves."""
STAYS = "undermesh-check"
"""A label of the pods that a drain leaves alone."""
CONTROL_DIRECTORY = "/run/undermesh-check"
"""Where on a node the peers' sockets are."""
RACER, SINK, HOLDER = HELPERS = ("racer", "sink", "holder")
"""Pods that events make for a while."""
SINK_PORT = 9000
_PEER = "/opt/undermesh/python/undermesh/lab/checker/peer.py"


@dataclass(frozen=True)
class PodPlan:
    """One pod: its account has its name."""

    name: str
    namespace: str
    node: int
    """Which of the cluster's nodes."""
    group: str = ""


PODS = (
    PodPlan("alice", MESH, 0),
    PodPlan("bob", MESH, 0, "pair"),
    PodPlan("carol", MESH, 1, "pair"),
    PodPlan(CLOSED, MESH, 1),
    PodPlan(DENIED, MESH, 0),
    PodPlan(CHURNING, MESH, 1),
    PodPlan("flip1", FLIP, 0),
    PodPlan("flip2", FLIP, 1),
    PodPlan("plain1", PLAIN, 0),
    PodPlan("plain2", PLAIN, 1),
)


def world(nodes: Sequence[str], *, mesh: bool) -> list[dict[str, Any]]:
    """Every object, for the first two of these nodes; with the mesh one namespace is in it from the start."""
    enrolled = {MESH: {ENROL_LABEL: "ambient"}} if mesh else {}
    return [
        *(_object("v1", "Namespace", name, labels=enrolled.get(name)) for name in NAMESPACES),
        *(_object("v1", "ServiceAccount", one.name, one.namespace) for one in PODS),
        *(pod(one.name, nodes) for one in PODS),
        *_services(),
    ]


def pod(name: str, nodes: Sequence[str]) -> dict[str, Any]:
    """The pod of that name."""
    one = next(one for one in PODS if one.name == name)
    labels = {"app": one.name} | ({"group": one.group} if one.group else {})
    if name != CHURNING:
        labels[STAYS] = "stays"
    container = {
        "name": "peer",
        "image": "undermesh/lab",
        "command": ["python3", "-I", "-S", _PEER, f"/control/{one.name}.sock"],
        "volumeMounts": [{"name": "control", "mountPath": "/control"}],
    }
    spec = {
        "nodeName": nodes[one.node],
        "serviceAccountName": one.name,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 2,
        "containers": [container],
        "volumes": [{"name": "control", "hostPath": {"path": CONTROL_DIRECTORY, "type": "DirectoryOrCreate"}}],
    }
    return _object("v1", "Pod", one.name, one.namespace, labels, spec=spec)


def holder(namespace: str, node: str) -> dict[str, Any]:
    """A pod that does nothing, to hold an address."""
    container = {"name": "pause", "image": "busybox", "command": ["sleep", "infinity"]}
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    return _object("v1", "Pod", HOLDER, namespace, spec=spec)


def racer(token: str, sink: str, node: str) -> dict[str, Any]:
    """A pod in the mesh that sends a token to a sink from its first moment on, again and again."""
    loop = f"while :; do echo {token} | nc -w 2 {sink} {SINK_PORT} >/dev/null; sleep 0.05; done"
    container = {"name": "racer", "image": "busybox", "command": ["sh", "-c", loop]}
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [container]}
    return _object("v1", "Pod", RACER, MESH, spec=spec)


def sink(node: str) -> dict[str, Any]:
    """A pod in the mesh that takes what the racer sends, and writes a line to its log for each."""
    container = {
        "name": "sink",
        "image": "undermesh/lab",
        "command": ["python3", "-u", "-m", "http.server", str(SINK_PORT)],
    }
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 1, "containers": [container]}
    return _object("v1", "Pod", SINK, MESH, spec=spec)


def policy(name: str, rule: dict[str, Any], selector: dict[str, str] | None = None) -> dict[str, Any]:
    """An AuthorizationPolicy of the namespace in the mesh that denies by one rule."""
    spec: dict[str, Any] = {"action": "DENY", "rules": [rule]}
    if selector is not None:
        spec["selector"] = {"matchLabels": selector}
    return _object("security.istio.io/v1", "AuthorizationPolicy", name, MESH, spec=spec)


def _services() -> Iterator[dict[str, Any]]:
    selectors = {one.name: (one.namespace, {"app": one.name}) for one in PODS} | {"pair": (MESH, {"group": "pair"})}
    ports = [{"name": str(mode), "port": port, "targetPort": port} for mode, port in PORTS.items()]
    for name, (namespace, selector) in selectors.items():
        spec = {"selector": selector, "ipFamilyPolicy": "RequireDualStack", "ports": ports}
        yield _object("v1", "Service", name, namespace, spec=spec)


def _object(
    version: str, kind: str, name: str, namespace: str = "", labels: dict[str, str] | None = None, **rest: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if namespace:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}
