"""What a kubelet asks of its container runtime, after the Container Runtime Interface (CRI)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol


class RuntimeFault(Exception):
    """The runtime could not do it. `reason` is what a pod's status shows (CreateContainerError,
    ErrImagePull, RunContainerError, ...), the text names the object and the cause."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class PortMapping:
    container_port: int
    host_port: int
    protocol: str = "TCP"
    host_ip: str = ""


@dataclass(frozen=True)
class SandboxConfig:
    """A pod's sandbox: its network namespace, shared IPC and UTS namespaces, and parent cgroup."""

    namespace: str
    name: str
    uid: str
    hostname: str
    cgroup_parent: str
    """Relative to the cgroup root as the kubelet's systemd driver names it, for example
    kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with underscores>.slice."""
    host_network: bool = False
    host_pid: bool = False
    host_ipc: bool = False
    share_process_namespace: bool = False
    sysctls: Mapping[str, str] = field(default_factory=dict)
    port_mappings: Sequence[PortMapping] = ()


@dataclass(frozen=True)
class SandboxStatus:
    id: str
    namespace: str
    name: str
    uid: str
    ready: bool
    """Its network was set up and not yet taken down."""
    addresses: tuple[str, ...]
    """From the CNI result; empty with hostNetwork."""
    netns: str
    """Path of the network namespace; empty with hostNetwork."""


@dataclass(frozen=True)
class Mount:
    """A bind mount of a path of the node into a container."""

    source: str
    target: str
    read_only: bool = False
    propagation: str = "None"
    """As in the pod's mountPropagation: None, HostToContainer or Bidirectional."""


@dataclass(frozen=True)
class Security:
    """The effective security context of a container (pod's and container's merged)."""

    user: int | None = None
    """None: the image's, which is root."""
    group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    privileged: bool = False
    add_capabilities: tuple[str, ...] = ()
    """Without CAP_; ALL is one."""
    drop_capabilities: tuple[str, ...] = ()
    allow_privilege_escalation: bool = True
    read_only_root: bool = False
    unmasked_proc: bool = False


@dataclass(frozen=True)
class Resources:
    cpu_shares: int = 0
    """cgroup v1 shares as the kubelet computes them from the request; 0: unset."""
    cpu_quota: int = 0
    """Microseconds per 100 ms; 0: no limit."""
    memory_limit: int = 0
    """Bytes; 0: no limit."""
    oom_score_adj: int = 0


@dataclass(frozen=True)
class ContainerConfig:
    name: str
    attempt: int
    """0 for the first; counts restarts."""
    image: str
    command: tuple[str, ...] = ()
    """Replaces the image's entry point; empty: the image's."""
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    mounts: tuple[Mount, ...] = ()
    security: Security = field(default_factory=Security)
    resources: Resources = field(default_factory=Resources)
    stdin: bool = False
    tty: bool = False
    target: str = ""
    """Name of the container whose processes it sees; empty: its own."""
    log_path: Path = Path("/dev/null")
    """Written in the CRI log format, for example
    /var/log/pods/<namespace>_<name>_<uid>/<container>/<attempt>.log."""


class ContainerState(Enum):
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True)
class ContainerStatus:
    id: str
    """Shown as containerd://<id>."""
    sandbox: str
    name: str
    attempt: int
    image: str
    image_id: str
    state: ContainerState
    started_at: float = 0.0
    """Seconds since the epoch; so is finished_at."""
    finished_at: float = 0.0
    exit_code: int = 0
    """128 + signal if a signal ended it, as every runtime says it."""
    reason: str = ""
    """Completed, Error, OOMKilled; StartError: it never ran; Unknown: nobody saw its end."""
    log_path: Path = Path("/dev/null")


@dataclass(frozen=True)
class ExecResult:
    exit_code: int
    output: bytes
    """Both streams, as they came; at most 10 KiB."""


class ExecStreams(Protocol):
    """The client's end of a command, as undermesh.lab.apiserver.kubelets.Session gives it."""

    async def read_stdin(self) -> bytes: ...

    async def write_stdout(self, data: bytes) -> None: ...

    async def write_stderr(self, data: bytes) -> None: ...

    def resizes(self) -> AsyncIterator[tuple[int, int]]:
        """(columns, rows) whenever the terminal changes."""
        ...


class Runtime(Protocol):
    """One node's runtime. Every call raises RuntimeFault. State is on disk: a new process finds all of it."""

    async def run_sandbox(self, config: SandboxConfig) -> SandboxStatus:
        """Make the namespaces and call CNI ADD; what was made is unmade if that fails."""
        ...

    async def stop_sandbox(self, sandbox: str) -> None:
        """Kill what runs in it, call CNI DEL, remove the namespaces. Nothing happens if it is gone."""
        ...

    async def remove_sandbox(self, sandbox: str) -> None:
        """Forget a stopped sandbox and its containers."""
        ...

    async def list_sandboxes(self, uid: str = "") -> list[SandboxStatus]:
        """All, or those of the pod with that uid."""
        ...

    async def create_container(self, sandbox: str, config: ContainerConfig) -> str:
        """Prepare a container; its id."""
        ...

    async def start_container(self, container: str) -> None: ...

    async def stop_container(self, container: str, grace: float) -> None:
        """SIGTERM, after `grace` seconds SIGKILL; returns when it has ended."""
        ...

    async def remove_container(self, container: str) -> None:
        """Forget an ended container; its log stays."""
        ...

    async def list_containers(self, sandboxes: Collection[str] | None = None) -> list[ContainerStatus]:
        """All, or those of these sandboxes."""
        ...

    def exits(self) -> asyncio.Queue[str]:
        """Ids of containers that ended, as they end."""
        ...

    async def exec_sync(self, container: str, command: Sequence[str], seconds: float) -> ExecResult:
        """Run a command to its end. RuntimeFault("DeadlineExceeded") after `seconds`; 0: no limit."""
        ...

    async def execute(
        self, container: str, command: Sequence[str], streams: ExecStreams, *, stdin: bool, tty: bool
    ) -> int:
        """Run a command with the client's streams; its exit code. Cancelling kills it."""
        ...

    async def attach(self, container: str, streams: ExecStreams, *, stdin: bool) -> None:
        """Join the streams of the container's first process until it ends."""
        ...
