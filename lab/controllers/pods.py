"""Reading pods: whether they run, are ready and available, and which of them to delete first."""

from __future__ import annotations

from undermesh.lab.client import Object, times
from undermesh.lab.controllers.objects import annotations_of, condition, deleting, is_true, status_of

_COST = "controller.kubernetes.io/pod-deletion-cost"
_PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


def node_of(pod: Object) -> str:
    """The node it is bound to, or nothing."""
    node: str = pod["spec"].get("nodeName") or ""
    return node


def phase_of(pod: Object) -> str:
    phase: str = status_of(pod).get("phase") or "Pending"
    return phase


def ended(pod: Object) -> bool:
    """Whether its containers have ended for good."""
    return phase_of(pod) in ("Succeeded", "Failed")


def active(pod: Object) -> bool:
    """Whether it counts as a replica."""
    return not ended(pod) and not deleting(pod)


def ready(pod: Object) -> bool:
    return is_true(pod, "Ready")


def available_in(pod: Object, min_ready_seconds: int) -> float | None:
    """Seconds until it has been ready long enough: 0 when it has, None when it is not ready."""
    found = condition(pod, "Ready")
    if found is None or found["status"] != "True":
        return None
    since = found.get("lastTransitionTime")
    if not min_ready_seconds or not since:
        return 0.0
    return max(0.0, min_ready_seconds - times.seconds_since(since))


def available(pod: Object, min_ready_seconds: int) -> bool:
    return available_in(pod, min_ready_seconds) == 0.0


def next_available(pods: list[Object], min_ready_seconds: int) -> float | None:
    """Seconds until the next ready pod becomes available; None when none will by time alone."""
    waits = [wait for pod in pods if (wait := available_in(pod, min_ready_seconds))]
    return min(waits) if waits else None


def restarts(pod: Object) -> int:
    return sum(found.get("restartCount", 0) for found in status_of(pod).get("containerStatuses") or ())


def deletion_order(pod: Object, on_same_node: int) -> tuple[object, ...]:
    """Sorts the pods of a ReplicaSet: the first are deleted first.

    `on_same_node`: how many of its pods the node has. Rule: k8s.io/kubernetes/pkg/controller ActivePodsWithRanks.
    """
    since = (condition(pod, "Ready") or {}).get("lastTransitionTime", "")
    return (
        bool(node_of(pod)),
        _PHASES.get(phase_of(pod), 2),
        ready(pod),
        _cost(pod),
        -on_same_node,
        _Later(since if ready(pod) else ""),
        -restarts(pod),
        _Later(pod["metadata"].get("creationTimestamp", "")),
    )


class _Later:
    """Sorts later times first."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __lt__(self, other: _Later) -> bool:
        return self.text > other.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Later) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def _cost(pod: Object) -> int:
    try:
        return int(annotations_of(pod).get(_COST, "0"))
    except ValueError:
        return 0
