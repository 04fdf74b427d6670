"""One pod as the runtime has it: its sandboxes, its containers by name, how they ended."""

from __future__ import annotations

from collections.abc import Iterable

from undermesh.lab.client import Object
from undermesh.lab.kubelet import config, logs, pods
from undermesh.lab.runtime.types import ContainerState, ContainerStatus, Runtime, SandboxStatus

_MOST_MESSAGE = 4096
_MOST_OF_LOG, _LINES_OF_LOG = 2048, 80


class Local:
    """What `refresh` found."""

    def __init__(self, runtime: Runtime, uid: str) -> None:
        self._runtime = runtime
        self._uid = uid
        self.sandboxes: list[SandboxStatus] = []
        self.containers: dict[str, ContainerStatus] = {}
        """By name, the latest attempt; `before` has the one before that."""
        self.before: dict[str, ContainerStatus] = {}
        self.messages: dict[str, str] = {}
        """Termination messages by container id."""
        self._all: list[ContainerStatus] = []

    @property
    def sandbox(self) -> SandboxStatus | None:
        """The one that is ready."""
        return next((sandbox for sandbox in self.sandboxes if sandbox.ready), None)

    def running(self) -> list[ContainerStatus]:
        return [status for status in self._all if status.state is ContainerState.RUNNING]

    def old_attempts(self) -> list[ContainerStatus]:
        """What nobody will ask for: all but the last two attempts of each container."""
        kept = {status.id for status in (*self.containers.values(), *self.before.values())}
        return [status for status in self._all if status.id not in kept and status.state is ContainerState.EXITED]

    async def refresh(self, pod: Object) -> None:
        """Ask the runtime. Raises RuntimeFault."""
        self.sandboxes = await self._runtime.list_sandboxes(self._uid)
        ids = {sandbox.id for sandbox in self.sandboxes}
        self._all = await self._runtime.list_containers(ids)
        self.containers, self.before = latest(self._all)
        for status in self._all:
            if status.state is ContainerState.EXITED and status.id not in self.messages:
                self.messages[status.id] = _message(pod, status)


def latest(statuses: Iterable[ContainerStatus]) -> tuple[dict[str, ContainerStatus], dict[str, ContainerStatus]]:
    """By name, the latest attempt of each container and the one before. Pure."""
    newest: dict[str, ContainerStatus] = {}
    before: dict[str, ContainerStatus] = {}
    for status in sorted(statuses, key=lambda found: found.attempt):
        if status.name in newest:
            before[status.name] = newest[status.name]
        newest[status.name] = status
    return newest, before


def _message(pod: Object, status: ContainerStatus) -> str:
    """What a container left in its termination log, or at the end of its log if it asked for that."""
    try:
        with config.termination_log(pod, status.name, status.attempt).open("rb") as file:
            text = file.read(_MOST_MESSAGE)
    except FileNotFoundError:
        text = b""
    container = next((found for found in pods.all_containers(pod) if found["name"] == status.name), {})
    falls_back = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    if not text and falls_back and status.exit_code != 0:
        lines = logs.last_lines(status.log_path, _LINES_OF_LOG)
        text = b"".join(lines)[-_MOST_OF_LOG:]
    return text.decode(errors="replace")
