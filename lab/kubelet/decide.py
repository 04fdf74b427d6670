"""What is to be done for a pod, from its spec and what the runtime reports. Pure.

Source: kubernetes pkg/kubelet/kuberuntime/kuberuntime_manager.go computePodActions and
kuberuntime_container.go computeInitContainerActions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods
from undermesh.lab.runtime.types import ContainerState, ContainerStatus

DEFINITION = "definition"
"""In place of a probe: the container's image was changed."""


@dataclass(frozen=True)
class View:
    """A pod as it is on the node."""

    sandbox: str = ""
    """The id of the sandbox that is ready; empty if there is none."""
    containers: Mapping[str, ContainerStatus] = field(default_factory=dict)
    """By name, the latest attempt of each container, in whatever sandbox."""
    started: frozenset[str] = frozenset()
    """Ids of running containers whose startup probe, if any, has passed."""
    unhealthy: Mapping[str, str] = field(default_factory=dict)
    """Id of a running container that must not go on -> which probe says so: liveness or startup."""

    def current(self, name: str) -> ContainerStatus | None:
        """The container's latest attempt in the ready sandbox, if it was ever started there."""
        status = self.containers.get(name)
        if status is None or status.sandbox != self.sandbox or status.state is ContainerState.CREATED:
            return None
        return status


@dataclass(frozen=True)
class Start:
    """Make and start a container."""

    name: str
    attempt: int
    failed_at: float | None = None
    """When the attempt before ended: a restart waits for its back-off."""


@dataclass(frozen=True)
class Kill:
    """End a container that fails a probe."""

    name: str
    id: str
    probe: str


@dataclass(frozen=True)
class Plan:
    """The next steps."""

    new_sandbox: bool = False
    """Make one first, then decide again."""
    start: tuple[Start, ...] = ()
    kill: tuple[Kill, ...] = ()
    finished: bool = False
    """Nothing will ever run again: end what still runs and report the outcome."""


def plan(pod: Object, view: View) -> Plan:
    """Decide."""
    if not view.sandbox:
        needed = _needs_sandbox(pod, view)
        return Plan(new_sandbox=needed, finished=not needed)
    initialized = any(view.current(container["name"]) for container in pods.containers(pod))
    start, kill, go_on, failed = _init_steps(pod, view, initialized)
    if failed:
        return Plan(finished=True)
    start += _ephemeral_steps(pod, view)
    if go_on:
        regular = [_step(pod, container, view) for container in pods.containers(pod)]
        start += [step for step in regular if isinstance(step, Start)]
        kill += [step for step in regular if isinstance(step, Kill)]
        if all(step is _DONE for step in regular):
            return Plan(finished=True)
    return Plan(start=tuple(start), kill=tuple(kill))


def restarts(pod: Object, container: Object, exit_code: int) -> bool:
    """Whether a container that ended is started again."""
    policy = container.get("restartPolicy") or pods.restart_policy(pod)
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


class _Done:
    """A container has ended for good."""


_DONE = _Done()


def _needs_sandbox(pod: Object, view: View) -> bool:
    """A pod whose containers have all run for good gets no new sandbox."""
    seen = [view.containers.get(container["name"]) for container in pods.containers(pod)]
    if not view.containers:
        return True
    policies = {container.get("restartPolicy") or pods.restart_policy(pod) for container in pods.containers(pod)}
    if policies == {"Never"}:
        return False
    return any(
        status is None or restarts(pod, container, status.exit_code)
        for container, status in zip(pods.containers(pod), seen, strict=True)
    )


def _init_steps(pod: Object, view: View, initialized: bool) -> tuple[list[Start], list[Kill], bool, bool]:
    """Steps, whether the pod's own containers may run, and whether one failed for good."""
    start: list[Start] = []
    kill: list[Kill] = []
    for container in pods.init_containers(pod):
        sidecar = pods.is_sidecar(container)
        if initialized and not sidecar:
            continue
        step = _step(pod, container, view)
        status = view.current(container["name"])
        if isinstance(step, Start):
            start.append(step)
        elif isinstance(step, Kill):
            kill.append(step)
        elif step is _DONE and status is not None and status.exit_code != 0:
            return start, kill, False, True
        if not initialized and not _lets_pass(sidecar, step, status, view):
            return start, kill, False, False
    return start, kill, True, False


def _ephemeral_steps(pod: Object, view: View) -> list[Start]:
    """Each is started once, whatever the other containers do, and never again."""
    seen = ((container["name"], view.containers.get(container["name"])) for container in pods.ephemeral_containers(pod))
    return [
        Start(name, _next_attempt(view, name))
        for name, status in seen
        if status is None or status.state is ContainerState.CREATED
    ]


def _lets_pass(sidecar: bool, step: object, status: ContainerStatus | None, view: View) -> bool:
    if sidecar:
        return step is None and status is not None and status.id in view.started
    return step is _DONE


def _step(pod: Object, container: Object, view: View) -> Start | Kill | _Done | None:
    """None: it runs, leave it."""
    name = container["name"]
    status = view.current(name)
    if status is None:
        return Start(name, _next_attempt(view, name))
    if status.state is ContainerState.RUNNING:
        probe = view.unhealthy.get(status.id)
        return Kill(name, status.id, probe) if probe else None
    # An init container that succeeded is done whatever the pod's policy.
    succeeded_init = status.exit_code == 0 and not pods.is_sidecar(container) and _is_init(pod, name)
    if succeeded_init or not restarts(pod, _policy_of(pod, container), status.exit_code):
        return _DONE
    return Start(name, status.attempt + 1, status.finished_at)


def _policy_of(pod: Object, container: Object) -> Object:
    """Init containers are tried again unless the policy is Never."""
    if _is_init(pod, container["name"]) and not container.get("restartPolicy"):
        return {"restartPolicy": "Never" if pods.restart_policy(pod) == "Never" else "OnFailure"}
    return container


def _is_init(pod: Object, name: str) -> bool:
    return any(container["name"] == name for container in pods.init_containers(pod))


def _next_attempt(view: View, name: str) -> int:
    """Attempts are counted over all sandboxes of the pod."""
    before = view.containers.get(name)
    return 0 if before is None else before.attempt + 1
