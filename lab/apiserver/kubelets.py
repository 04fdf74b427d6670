"""What the API server asks of the nodes: logs, commands in containers, connections to pods.

Whoever runs the lab's nodes implements `Kubelet` and hands `Kubelets` to the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from undermesh.lab.apiserver.errors import Object


@dataclass(frozen=True)
class LogOptions:
    """What part of a container's log is wanted."""

    container: str
    follow: bool = False
    previous: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    limit_bytes: int | None = None
    since_seconds: int | None = None
    since_time: str = ""


@dataclass(frozen=True)
class ExecOptions:
    """A command for a container, and which streams the client wants."""

    container: str
    command: tuple[str, ...] = ()
    """Empty: attach to the container's main process."""
    stdin: bool = False
    stdout: bool = True
    stderr: bool = True
    tty: bool = False


@dataclass(frozen=True)
class TerminalSize:
    width: int
    height: int


class Session(Protocol):
    """The client's end of an exec, as the kubelet sees it."""

    async def read_stdin(self) -> bytes:
        """The next bytes for the process; empty when the client has no more."""
        ...

    async def write_stdout(self, data: bytes) -> None: ...

    async def write_stderr(self, data: bytes) -> None: ...

    def sizes(self) -> AsyncIterator[TerminalSize]:
        """Each new size of the client's terminal."""
        ...


class KubeletError(Exception):
    """The node cannot do what was asked; the text goes to the client. `code` is the HTTP status."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


class Kubelet(Protocol):
    """One node. Every call gets the pod as stored; each may raise KubeletError."""

    def logs(self, pod: Object, options: LogOptions) -> AsyncIterator[bytes]:
        """The log in pieces; ends when the log does, or with `follow` when the container does."""
        ...

    async def execute(self, pod: Object, options: ExecOptions, session: Session) -> int:
        """Run a command with the session's streams; its exit code. Cancelled when the client goes away."""
        ...

    async def connect(self, pod: Object, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a port on the pod's loopback address."""
        ...


class Kubelets(Protocol):
    """Finds the kubelet of a node."""

    def find(self, node: str) -> Kubelet | None: ...


class NoKubelets:
    """A server without nodes."""

    def find(self, node: str) -> Kubelet | None:
        return None


class KubeletTable:
    """Kubelets of the same process, by node name."""

    def __init__(self) -> None:
        self._nodes: dict[str, Kubelet] = {}

    def add(self, node: str, kubelet: Kubelet) -> None:
        self._nodes[node] = kubelet

    def remove(self, node: str) -> None:
        self._nodes.pop(node, None)

    def find(self, node: str) -> Kubelet | None:
        return self._nodes.get(node)


def container_of(pod: Object, name: str) -> str:
    """The container that a request means; the only one, or the annotated default, when it names none.

    Raises KubeletError.
    """
    names = _names(pod, "containers")
    everything: Sequence[str] = [*names, *_names(pod, "initContainers"), *_names(pod, "ephemeralContainers")]
    pod_name = pod["metadata"]["name"]
    if name:
        if name not in everything:
            raise KubeletError(f"container {name} is not valid for pod {pod_name}")
        return name
    if len(everything) == 1:
        return everything[0]
    raise KubeletError(f"a container name must be specified for pod {pod_name}, choose one of: [{' '.join(names)}]")


def _names(pod: Object, group: str) -> list[str]:
    return [container["name"] for container in pod["spec"].get(group) or ()]
