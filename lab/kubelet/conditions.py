"""A pod's conditions. Pure. Source: kubernetes pkg/kubelet/status/generate.go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods


def conditions(
    pod: Object, phase: str, statuses: Sequence[Object], init_statuses: Sequence[Object], sandbox_ready: bool
) -> list[Object]:
    """The conditions that the kubelet owns, without times.

    Args:
        statuses: containerStatuses; `init_statuses`: initContainerStatuses.
    """
    containers = _containers_ready(pod, phase, statuses, init_statuses)
    return [
        _condition("PodReadyToStartContainers", sandbox_ready),
        _initialized(pod, phase, init_statuses),
        _ready(pod, containers),
        containers,
    ]


def with_times(wanted: Iterable[Object], before: Iterable[Object], now: str) -> list[Object]:
    """Each with the time when its status last changed."""
    known = {condition["type"]: condition for condition in before}
    return [{**condition, "lastTransitionTime": _since(condition, known, now)} for condition in wanted]


def _since(condition: Object, known: dict[str, Object], now: str) -> str:
    before = known.get(condition["type"])
    if before is None or before["status"] != condition["status"]:
        return now
    return str(before.get("lastTransitionTime") or now)


def _condition(kind: str, status: bool, reason: str | None = None, message: str | None = None) -> Object:
    # null takes away what was there before.
    return {
        "type": kind,
        "status": "True" if status else "False",
        "lastProbeTime": None,
        "reason": reason,
        "message": message,
    }


def _initialized(pod: Object, phase: str, statuses: Sequence[Object]) -> Object:
    if phase == "Succeeded":
        return _condition("Initialized", True, "PodCompleted")
    by_name = {status["name"]: status for status in statuses}
    waiting = [
        container["name"]
        for container in pods.init_containers(pod)
        if not _passed(container, by_name.get(container["name"]))
    ]
    started = any(status.get("started") for status in (pod.get("status") or {}).get("containerStatuses") or ())
    if waiting and not started:
        text = f"containers with incomplete status: [{' '.join(waiting)}]"
        return _condition("Initialized", False, "ContainersNotInitialized", text)
    return _condition("Initialized", True)


def _passed(container: Object, status: Object | None) -> bool:
    if status is None:
        return False
    if pods.is_sidecar(container):
        return bool(status.get("started"))
    return (status["state"].get("terminated") or {}).get("exitCode") == 0


def _containers_ready(pod: Object, phase: str, statuses: Sequence[Object], init_statuses: Sequence[Object]) -> Object:
    if phase == "Succeeded":
        return _condition("ContainersReady", False, "PodCompleted")
    if phase == "Failed":
        return _condition("ContainersReady", False, "PodFailed")
    ready = {status["name"] for status in (*statuses, *init_statuses) if status["ready"]}
    needed = [c for c in pods.init_containers(pod) if pods.is_sidecar(c)] + pods.containers(pod)
    unready = [container["name"] for container in needed if container["name"] not in ready]
    if unready:
        text = f"containers with unready status: [{' '.join(unready)}]"
        return _condition("ContainersReady", False, "ContainersNotReady", text)
    return _condition("ContainersReady", True)


def _ready(pod: Object, containers: Object) -> Object:
    if containers["status"] != "True":
        return {**containers, "type": "Ready"}
    stored = {found["type"]: found["status"] for found in (pod.get("status") or {}).get("conditions") or ()}
    problems = []
    for gate in pod["spec"].get("readinessGates") or ():
        kind = gate["conditionType"]
        if kind not in stored:
            problems.append(f'corresponding condition of pod readiness gate "{kind}" does not exist.')
        elif stored[kind] != "True":
            problems.append(f'the status of pod readiness gate "{kind}" is not "True", but {stored[kind]}')
    if problems:
        return _condition("Ready", False, "ReadinessGatesNotReady", ", ".join(problems))
    return _condition("Ready", True)
