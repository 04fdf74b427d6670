"""A pod's status, exactly as the kubelet reports it. Pure. Source: kubernetes pkg/kubelet/kubelet_pods.go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods
from undermesh.lab.kubelet.conditions import conditions, with_times
from undermesh.lab.kubelet.qos import qos_class
from undermesh.lab.runtime.types import ContainerState, ContainerStatus


@dataclass(frozen=True)
class Waiting:
    """Why a container does not run: ErrImagePull, CrashLoopBackOff, ..."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Verdict:
    """The kubelet ended the pod itself: DeadlineExceeded."""

    reason: str
    message: str


@dataclass(frozen=True)
class Observed:
    """A pod as it is on the node."""

    containers: Mapping[str, ContainerStatus] = field(default_factory=dict)
    """By name, the latest attempt."""
    before: Mapping[str, ContainerStatus] = field(default_factory=dict)
    """By name, the attempt before that."""
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    """By name, what keeps a container from being started."""
    ready: frozenset[str] = frozenset()
    """Ids of containers that may get traffic; `started`: whose startup probe has passed."""
    started: frozenset[str] = frozenset()
    messages: Mapping[str, str] = field(default_factory=dict)
    """Termination messages by id."""
    sandbox_ready: bool = False
    addresses: tuple[str, ...] = ()
    """The pod's; `node_addresses`: the node's."""
    node_addresses: tuple[str, ...] = ()
    start_time: float = 0.0
    ended: bool = False
    """Nothing of it runs any more, and nothing will."""
    verdict: Verdict | None = None


def pod_status(pod: Object, seen: Observed, now: float) -> Object:
    """status, with null for what is to be taken away."""
    before = pod.get("status") or {}
    earlier = _by_name(before)
    init = [_container_status(pod, container, seen, earlier, is_init=True) for container in pods.init_containers(pod)]
    regular = [_container_status(pod, container, seen, earlier, is_init=False) for container in pods.containers(pod)]
    phase = _final(before) or ("Failed" if seen.verdict else phase_of(pod, init, regular, ended=seen.ended))
    ephemeral = [_ephemeral_status(pod, container, seen) for container in pods.ephemeral_containers(pod)]
    wanted = conditions(pod, phase, regular, init, seen.sandbox_ready)
    status: Object = {
        "phase": phase,
        "conditions": with_times(wanted, before.get("conditions") or (), pods.time_of(now)),
        "hostIP": seen.node_addresses[0],
        "hostIPs": [{"ip": address} for address in seen.node_addresses],
        "startTime": before.get("startTime") or pods.time_of(seen.start_time),
        "containerStatuses": regular,
        "qosClass": before.get("qosClass") or qos_class(pod),
    }
    if init:
        status["initContainerStatuses"] = init
    if ephemeral:
        status["ephemeralContainerStatuses"] = ephemeral
    if seen.verdict:
        status |= {"reason": seen.verdict.reason, "message": seen.verdict.message}
    if seen.addresses:
        status["podIP"] = seen.addresses[0]
        status["podIPs"] = _addresses(seen.addresses, before)
    return status


def phase_of(pod: Object, init: Sequence[Object], regular: Sequence[Object], *, ended: bool) -> str:
    """Pending, Running, Succeeded or Failed.

    Args:
        ended: as in Observed; then even a container with restartPolicy Always has ended for good.
    """
    policy = pods.restart_policy(pod)
    if _init_failed(pod, init, policy):
        return "Failed"
    running = sum(1 for status in regular if status["state"].get("running"))
    ends = [_end(status) for status in regular if not status["state"].get("running")]
    stopped = [end for end in ends if end is not None]
    if not ended and (len(stopped) < len(ends) or (_initializing(pod, init) and not running and not stopped)):
        return "Pending"
    if running:
        return "Running"
    succeeded = len(stopped) == len(regular) and all(end["exitCode"] == 0 for end in stopped)
    if ended:
        return "Succeeded" if succeeded else "Failed"
    if policy == "Always":
        return "Running"
    if succeeded:
        return "Succeeded"
    return "Failed" if policy == "Never" else "Running"


def _end(status: Object) -> Object | None:
    """How a container that does not run has ended, if it ever ran."""
    last = (status.get("lastState") or {}).get("terminated")
    found: Object | None = status["state"].get("terminated") or last
    return found


def _init_failed(pod: Object, init: Sequence[Object], policy: str) -> bool:
    if policy != "Never":
        return False
    sidecars = {container["name"] for container in pods.init_containers(pod) if pods.is_sidecar(container)}
    return any(
        (status["state"].get("terminated") or {}).get("exitCode", 0) != 0
        for status in init
        if status["name"] not in sidecars
    )


def _initializing(pod: Object, init: Sequence[Object]) -> bool:
    sidecars = {container["name"] for container in pods.init_containers(pod) if pods.is_sidecar(container)}
    return any(
        not status["started"]
        if status["name"] in sidecars
        else (status["state"].get("terminated") or {}).get("exitCode") != 0
        for status in init
    )


def _container_status(
    pod: Object, container: Object, seen: Observed, earlier: Mapping[str, Object], *, is_init: bool
) -> Object:
    name = container["name"]
    found = seen.containers.get(name)
    if found is not None and found.state is ContainerState.CREATED:
        found = seen.before.get(name) or found
    last = seen.before.get(name)
    waiting = seen.waiting.get(name)
    state, last_state = _states(pod, found, last, waiting, seen, is_init=is_init)
    running = "running" in state
    done_init = is_init and (state.get("terminated") or {}).get("exitCode") == 0
    return {
        "name": name,
        "image": container["image"],
        "imageID": found.image_id if found else "",
        "state": state,
        "lastState": last_state,
        "ready": bool(found and running and found.id in seen.ready) or done_init,
        "started": bool(found and running and found.id in seen.started),
        "restartCount": found.attempt if found else earlier.get(name, {}).get("restartCount", 0),
        **({"containerID": f"containerd://{found.id}"} if found else {}),
    }


def _ephemeral_status(pod: Object, container: Object, seen: Observed) -> Object:
    """It has no probes and no restarts, and traffic does not wait for it."""
    found = _container_status(pod, container, seen, {}, is_init=False)
    del found["started"]
    return {**found, "ready": False}


def _states(
    pod: Object,
    found: ContainerStatus | None,
    last: ContainerStatus | None,
    waiting: Waiting | None,
    seen: Observed,
    *,
    is_init: bool,
) -> tuple[Object, Object]:
    """state and lastState."""
    if found is None or found.state is ContainerState.CREATED:
        why = waiting or Waiting("PodInitializing" if is_init or pods.init_containers(pod) else "ContainerCreating")
        return _waiting(why), {}
    last_state = {"terminated": _terminated(last, seen)} if last else {}
    if found.state is ContainerState.RUNNING:
        return {"running": {"startedAt": pods.time_of(found.started_at)}}, last_state
    if waiting is not None:
        return _waiting(waiting), {"terminated": _terminated(found, seen)}
    return {"terminated": _terminated(found, seen)}, last_state


def _waiting(why: Waiting) -> Object:
    return {"waiting": {"reason": why.reason, **({"message": why.message} if why.message else {})}}


def _terminated(status: ContainerStatus, seen: Observed) -> Object:
    message = seen.messages.get(status.id)
    return {
        "exitCode": status.exit_code,
        "reason": status.reason or ("Completed" if status.exit_code == 0 else "Error"),
        **({"message": message} if message else {}),
        **({"startedAt": pods.time_of(status.started_at)} if status.started_at else {}),
        "finishedAt": pods.time_of(status.finished_at),
        "containerID": f"containerd://{status.id}",
    }


def _by_name(status: Object) -> dict[str, Object]:
    groups = ("containerStatuses", "initContainerStatuses")
    return {found["name"]: found for group in groups for found in status.get(group) or ()}


def _final(before: Object) -> str:
    """A pod that has ended stays so."""
    phase = str(before.get("phase") or "")
    return phase if phase in ("Succeeded", "Failed") else ""


def _addresses(addresses: Sequence[str], before: Object) -> list[Object]:
    """The list is merged by address: those of an earlier sandbox have to be taken away."""
    gone = [found["ip"] for found in before.get("podIPs") or () if found["ip"] not in addresses]
    return [{"ip": address} for address in addresses] + [{"$patch": "delete", "ip": address} for address in gone]
