"""Which pods belong in the mesh: the user's wish, from labels alone.

Precedence: the pod's labels come before the namespace's, and on each of them `undermesh.io/mesh` comes
before `istio.io/dataplane-mode`; the first label with a known value decides. A label whose value is not
known counts as absent and is named in the reason: a misspelt `disabled` must not take a pod out of a
meshed namespace.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from undermesh.api.core import Namespace, Pod

MESH_LABEL: Final = "undermesh.io/mesh"
ISTIO_LABEL: Final = "istio.io/dataplane-mode"
SYSTEM_NAMESPACE: Final = "undermesh-system"
EXCLUDED_NAMESPACES: Final = frozenset({"kube-system", SYSTEM_NAMESPACE})
UNINSTALL_ANNOTATION: Final = "undermesh.io/uninstall-by"
"""On the system namespace: undermesh is being taken off, no pod belongs in the mesh any more. The value is until when
connections in the mesh may live on, RFC 3339."""

_VALUES: Final[Mapping[str, Mapping[str, bool]]] = {
    MESH_LABEL: {"enabled": True, "disabled": False},
    ISTIO_LABEL: {"ambient": True, "none": False},
}
_SIDECAR_CONTAINER: Final = "istio-proxy"
_SIDECAR_ANNOTATION: Final = "sidecar.istio.io/status"
_AMBIENT_ANNOTATION: Final = "ambient.istio.io/redirection"


@dataclass(frozen=True)
class Enrolment:
    """The wish for one pod, and the reason in words for status and logs."""

    enrolled: bool
    reason: str


def desired_enrolment(
    pod: Pod, namespace: Namespace | None, *, excluded: frozenset[str] = EXCLUDED_NAMESPACES
) -> Enrolment:
    """Whether a pod is to be in the mesh.

    Args:
        pod: The pod.
        namespace: Its Namespace object; None counts as one without labels.
        excluded: Namespaces whose pods never are.
    """
    wish = _labelled(pod, namespace)
    if not wish.enrolled:
        return wish
    obstacle = _obstacle(pod, excluded)
    return Enrolment(False, obstacle) if obstacle else wish


def uninstall_by(namespaces: Mapping[str, Namespace]) -> float | None:
    """Until when connections in the mesh may live on, because undermesh is being uninstalled; None: it is not.

    Returns:
        Seconds since the epoch; infinity where the annotation's value is no time: then nothing is cut.
    """
    system = namespaces.get(SYSTEM_NAMESPACE)
    text = None if system is None else system.metadata.annotations.get(UNINSTALL_ANNOTATION)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return math.inf
    return moment.timestamp() if moment.tzinfo is not None else math.inf


def namespace_enrolled(namespace: Namespace) -> bool:
    """Whether a namespace's own labels put its pods into the mesh, those aside that have labels of their own."""
    found = (_VALUES[name].get(namespace.metadata.labels.get(name, "")) for name in _VALUES)
    return next((enrolled for enrolled in found if enrolled is not None), False)


def _labelled(pod: Pod, namespace: Namespace | None) -> Enrolment:
    ignored: list[str] = []
    for owner, name, value in _labels(pod, namespace):
        enrolled = _VALUES[name].get(value)
        if enrolled is not None:
            return Enrolment(enrolled, "; ".join([f"{owner} label {name}={value}", *ignored]))
        expected = " nor ".join(_VALUES[name])
        ignored.append(f"{owner} label {name}={value} is ignored: it is neither {expected}")
    return Enrolment(False, "; ".join(["no label enrols it", *ignored]))


def _labels(pod: Pod, namespace: Namespace | None) -> Iterator[tuple[str, str, str]]:
    owners = [("pod", pod.metadata.labels), ("namespace", namespace.metadata.labels if namespace else {})]
    for owner, labels in owners:
        for name in _VALUES:
            if name in labels:
                yield owner, name, labels[name]


def _obstacle(pod: Pod, excluded: frozenset[str]) -> str:
    """Why a labelled pod still cannot be enrolled; empty: nothing is in the way."""
    meta = pod.metadata
    if pod.finished:
        return f"the pod has finished (phase {pod.status.phase})"
    if meta.namespace in excluded:
        return f"namespace {meta.namespace} is never enrolled"
    if pod.spec.host_network:
        return "the pod uses the node's network (hostNetwork)"
    if any(container.name == _SIDECAR_CONTAINER for container in pod.containers):
        return f"the pod has a sidecar (container {_SIDECAR_CONTAINER})"
    if _SIDECAR_ANNOTATION in meta.annotations:
        return f"the pod has a sidecar (annotation {_SIDECAR_ANNOTATION})"
    if meta.annotations.get(_AMBIENT_ANNOTATION) == "enabled":
        return f"Istio's CNI agent already redirects the pod (annotation {_AMBIENT_ANNOTATION}=enabled)"
    return ""
