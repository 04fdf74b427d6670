"""The row of a pod: its ready count, the one word for its state, and its restarts."""

from __future__ import annotations

from typing import Any

from undermesh.lab.apiserver.ages import age
from undermesh.lab.apiserver.errors import Object

_NONE = "<none>"


def _ended(state: Object) -> str:
    """The reason of a terminated container."""
    if state.get("reason"):
        return str(state["reason"])
    if state.get("signal"):
        return f"Signal:{state['signal']}"
    return f"ExitCode:{state.get('exitCode', 0)}"


def _restartable(obj: Object) -> set[str]:
    """Names of init containers that go on running beside the others."""
    found = obj["spec"].get("initContainers") or ()
    return {container["name"] for container in found if container.get("restartPolicy") == "Always"}


def _initializing(obj: Object, statuses: list[Object], sidecars: set[str]) -> str | None:
    """The word while init containers are not done."""
    total = len(obj["spec"].get("initContainers") or ())
    for index, status in enumerate(statuses):
        state = status.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting")
        if ended is not None and ended.get("exitCode", 0) == 0:
            continue
        if status["name"] in sidecars and status.get("started"):
            continue
        if ended is not None:
            return f"Init:{_ended(ended)}"
        if waiting is not None and waiting.get("reason") not in (None, "", "PodInitializing"):
            return f"Init:{waiting['reason']}"
        return f"Init:{index}/{total}"
    return None


def _container_word(statuses: list[Object], word: str) -> tuple[str, bool]:
    """The word that the containers give, the first one having the last say, and whether one runs and is ready."""
    running = False
    for status in reversed(statuses):
        state = status.get("state") or {}
        waiting, ended = state.get("waiting"), state.get("terminated")
        if waiting is not None and waiting.get("reason"):
            word = waiting["reason"]
        elif ended is not None:
            word = _ended(ended)
        elif status.get("ready") and "running" in state:
            running = True
    return word, running


def _restarts(statuses: list[Object]) -> str:
    count = sum(status.get("restartCount", 0) for status in statuses)
    times = [
        finished
        for status in statuses
        if (finished := ((status.get("lastState") or {}).get("terminated") or {}).get("finishedAt"))
    ]
    return f"{count} ({age(max(times))} ago)" if count and times else str(count)


def _state(obj: Object, sidecars: set[str]) -> str:
    status = obj.get("status") or {}
    word = status.get("reason") or status.get("phase", "Unknown")
    if any(
        c["type"] == "PodScheduled" and c.get("reason") == "SchedulingGated" for c in status.get("conditions") or ()
    ):
        word = "SchedulingGated"
    early = _initializing(obj, status.get("initContainerStatuses") or [], sidecars)
    initialized = any(c["type"] == "Initialized" and c["status"] == "True" for c in status.get("conditions") or ())
    if early is not None and not initialized:
        word = early
    else:
        word, running = _container_word(status.get("containerStatuses") or [], word)
        if word == "Completed" and running:
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
            word = "Running" if ready else "NotReady"
    if obj["metadata"].get("deletionTimestamp"):
        if status.get("reason") == "NodeLost":
            return "Unknown"
        if status.get("phase") not in ("Succeeded", "Failed"):
            return "Terminating"
    return str(word)


def pod_row(obj: Object) -> list[Any]:
    """The cells of a pod."""
    status, spec = obj.get("status") or {}, obj["spec"]
    sidecars = _restartable(obj)
    containers = status.get("containerStatuses") or []
    helpers = [s for s in status.get("initContainerStatuses") or () if s["name"] in sidecars]
    ready = sum(bool(s.get("ready")) and "running" in (s.get("state") or {}) for s in containers)
    ready += sum(bool(s.get("ready")) and bool(s.get("started")) for s in helpers)
    total = len(spec.get("containers") or ()) + len(sidecars)
    addresses = status.get("podIPs") or ()
    gates = spec.get("readinessGates") or ()
    passed = sum(
        any(c["type"] == gate["conditionType"] and c["status"] == "True" for c in status.get("conditions") or ())
        for gate in gates
    )
    return [
        obj["metadata"]["name"],
        f"{ready}/{total}",
        _state(obj, sidecars),
        _restarts(
            [*(status.get("initContainerStatuses") or ()), *containers] if not containers else [*helpers, *containers]
        ),
        age(obj["metadata"].get("creationTimestamp")),
        addresses[0]["ip"] if addresses else status.get("podIP") or _NONE,
        spec.get("nodeName") or _NONE,
        status.get("nominatedNodeName") or _NONE,
        f"{passed}/{len(gates)}" if gates else _NONE,
    ]
