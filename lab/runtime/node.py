"""The runtime that a kubelet of the lab uses: sandboxes, CNI, and containers by crun under the node's shim.

    runtime = NodeRuntime(build)
    await runtime.start()            # finds what earlier processes left
    sandbox = await runtime.run_sandbox(config)
    container = await runtime.create_container(sandbox.id, container_config)
    await runtime.start_container(container)

What must outlive a reboot of the node is in `state`, all else in `run`: directories of containers and sandboxes,
the shim's socket. As in containerd a container is only made known at creation; crun sees it when it is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from undermesh.lab.build import Build
from undermesh.lab.runtime import attaching, capabilities, cni, execution, oci, records, sandboxes, shimmed
from undermesh.lab.runtime.containers import CGROUPS, Containers, node_devices
from undermesh.lab.runtime.images import Images
from undermesh.lab.runtime.pause import Pause
from undermesh.lab.runtime.shimclient import ShimClient
from undermesh.lab.runtime.types import (
    ContainerConfig,
    ContainerState,
    ContainerStatus,
    ExecResult,
    ExecStreams,
    Mount,
    Runtime,
    RuntimeFault,
    SandboxConfig,
    SandboxStatus,
)

log = logging.getLogger(__name__)

STATE = Path("/var/lib/undermesh-lab")
RUN = Path("/run/undermesh-lab")
CNI_CONF = Path("/etc/cni/net.d")
CNI_CACHE = Path("/var/lib/cni/results")
CNI_BIN = Path("/opt/cni/bin")

_CONTROLLERS = ("cpu", "memory")
_SYS_RESOURCE = "SYS_RESOURCE"


class NodeRuntime(Runtime):
    """types.Runtime of one node, to be used inside the node's namespaces by one process at a time.

    Args:
        build: the build directory; the product's and the lab's images are made of it.
        state: records that outlive a reboot of the node.
        run: what goes with the node; on a file system that can hold an overlay's upper layer, as tmpfs.
    """

    def __init__(
        self,
        build: Path,
        *,
        state: Path = STATE,
        run: Path = RUN,
        cni_conf: Path = CNI_CONF,
        cni_bin: Path = CNI_BIN,
        cni_cache: Path = CNI_CACHE,
    ) -> None:
        self._state = state
        self._run = run
        self._records = records.Records(state / "sandboxes")
        self._sandboxes: dict[str, records.Sandbox] = {}
        self._cni = cni.Cni(cni_conf, (cni_bin, Build(build).programs), cni_cache)
        self._shim = ShimClient(run, build.absolute() / "py")
        self._images = Images(build, run / "images")
        facts = node_facts()
        self._containers = Containers(state, run, self._shim, self._images, facts)
        self._pause = Pause(run, self._shim, self._images, facts)
        self._watching: asyncio.Task[None] | None = None
        self._boot = ""

    async def start(self) -> None:
        """Find the shim or start it, and learn what is there. Raises RuntimeFault."""
        for name in ("sandboxes", "containers", "images", "crun"):
            (self._run / name).mkdir(parents=True, exist_ok=True)
        sandboxes.prepare()
        self._boot = _boot_id(self._run / "boot")
        self._load()
        connected = asyncio.Event()

        async def found() -> None:
            await self._containers.reconcile()
            connected.set()

        self._watching = asyncio.create_task(self._shim.watch(self._containers.note_exit, found))
        try:
            async with asyncio.timeout(10):
                await connected.wait()
        except TimeoutError as error:
            raise RuntimeFault("ShimUnavailable", f"no shim after 10 s; see {self._run}/shim.log") from error

    async def close(self) -> None:
        """Stop watching; shim and containers go on."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    def network_fault(self) -> str | None:
        """Why the node has no network for pods (its Ready condition says so), or None."""
        return self._cni.fault()

    async def run_sandbox(self, config: SandboxConfig) -> SandboxStatus:
        sandboxes.check_sysctls(config)
        sandbox = records.Sandbox(id=secrets.token_hex(32), config=config, created_at=time.time(), boot=self._boot)
        if not config.host_network:
            sandbox.netns = sandboxes.new_netns_path()
        self._save(sandbox)
        try:
            await asyncio.to_thread(self._make, sandbox)
            if config.share_process_namespace and not config.host_pid:
                await self._pause.start(sandbox, self._namespaces(sandbox))
            if not config.host_network:
                sandbox.addresses = cni.addresses(await self._cni.add(_attachment(sandbox)))
        except (cni.CniError, OSError, RuntimeFault) as error:
            await self._unmake(sandbox)
            self._forget(sandbox)
            what = "setup network for sandbox" if isinstance(error, cni.CniError) else "create sandbox"
            raise RuntimeFault("FailedCreatePodSandBox", f'failed to {what} "{sandbox.id}": {error}') from error
        sandbox.ready = True
        self._save(sandbox)
        return sandbox.status()

    async def stop_sandbox(self, sandbox: str) -> None:
        known = self._sandboxes.get(sandbox)
        if known is None:
            return
        if known.ready:
            known.ready = False
            self._save(known)
        for container in self._containers.of(sandbox):
            await self._containers.stop(container.id, 0)
        if not known.config.host_network:
            try:
                await self._cni.delete(_attachment(known))
            except cni.CniError as error:
                raise RuntimeFault(
                    "KillPodSandboxError", f'failed to destroy network for sandbox "{sandbox}": {error}'
                ) from error
        await self._unmake(known)
        known.netns = ""
        self._save(known)

    async def remove_sandbox(self, sandbox: str) -> None:
        known = self._sandboxes.get(sandbox)
        if known is None:
            return
        await self.stop_sandbox(sandbox)
        for container in self._containers.of(sandbox):
            self._containers.remove(container.id)
        self._forget(known)

    async def list_sandboxes(self, uid: str = "") -> list[SandboxStatus]:
        return [sandbox.status() for sandbox in self._sandboxes.values() if not uid or sandbox.config.uid == uid]

    async def create_container(self, sandbox: str, config: ContainerConfig) -> str:
        known = self._sandbox(sandbox)
        if not known.ready:
            raise RuntimeFault("CreateContainerError", f"sandbox {sandbox[:12]} is not ready")
        namespaces = dict(self._namespaces(known))
        if not known.config.host_pid:
            shared = known.config.share_process_namespace
            namespaces["pid"] = self._pause.namespace(sandbox) if shared else self._processes(sandbox, config.target)
        directory = self._directory(sandbox)
        if not any(mount.target == "/etc/hostname" for mount in config.mounts):
            hostname = Mount(str(directory / "hostname"), "/etc/hostname")
            config = replace(config, mounts=(hostname, *config.mounts))
        shm = Path("/dev/shm") if known.config.host_ipc else directory / "shm"
        return await self._containers.create(known, config, namespaces, shm)

    def _processes(self, sandbox: str, target: str) -> str:
        """The process namespace of the container named `target`; empty for one of its own. Raises RuntimeFault."""
        if not target:
            return ""
        for container in self._containers.of(sandbox):
            if container.config.name == target and container.state is ContainerState.RUNNING:
                return f"/proc/{container.pid}/ns/pid"
        raise RuntimeFault("CreateContainerError", f"container {target}, whose processes are asked for, does not run")

    async def start_container(self, container: str) -> None:
        await self._containers.start(container)

    async def stop_container(self, container: str, grace: float) -> None:
        await self._containers.stop(container, grace)

    async def remove_container(self, container: str) -> None:
        self._containers.remove(container)

    async def list_containers(self, sandboxes: Collection[str] | None = None) -> list[ContainerStatus]:
        known = self._containers.known.values()
        return [container.status() for container in known if sandboxes is None or container.sandbox in sandboxes]

    def exits(self) -> asyncio.Queue[str]:
        return self._containers.exits

    async def exec_sync(self, container: str, command: Sequence[str], seconds: float) -> ExecResult:
        return await execution.run_sync(self._command(container, command, tty=False), seconds)

    async def execute(
        self, container: str, command: Sequence[str], streams: ExecStreams, *, stdin: bool, tty: bool
    ) -> int:
        one = self._command(container, command, tty=tty)
        if tty:
            return await execution.run_tty(one, streams)
        return await execution.run_piped(one, streams, stdin=stdin)

    async def attach(self, container: str, streams: ExecStreams, *, stdin: bool) -> None:
        known = self._containers.running(container)
        await attaching.join(self._shim, container, streams, stdin=stdin and known.config.stdin)

    def _command(self, container: str, argv: Sequence[str], *, tty: bool) -> execution.Command:
        self._containers.running(container)
        return execution.Command(container, self._containers.directory(container), self._run / "crun", argv, tty=tty)

    def _make(self, sandbox: records.Sandbox) -> None:
        (CGROUPS / sandbox.config.cgroup_parent).mkdir(parents=True, exist_ok=True)
        config = sandbox.config
        if config.host_network:
            config = replace(config, hostname=socket.gethostname())
        sandboxes.make(config, self._directory(sandbox.id), sandbox.netns)

    async def _unmake(self, sandbox: records.Sandbox) -> None:
        """Undo _make, as far as it got. Raises OSError."""
        await self._pause.stop(sandbox.id)
        await asyncio.to_thread(sandboxes.remove, self._directory(sandbox.id), sandbox.netns)
        await self._remove_cgroup(CGROUPS / sandbox.config.cgroup_parent)

    async def _remove_cgroup(self, cgroup: Path) -> None:
        """The shim removes the cgroup of a container when it has ended; that may be a moment from now."""
        for _ in range(100):
            shimmed.kill_cgroup(str(cgroup))
            try:
                shimmed.remove_cgroups(str(cgroup))
            except OSError:
                await asyncio.sleep(0.02)
                continue
            return
        log.error("cgroup %s: cannot be removed; see cgroup.procs below it", cgroup)

    def _namespaces(self, sandbox: records.Sandbox) -> dict[str, str]:
        return sandboxes.namespace_paths(sandbox.config, self._directory(sandbox.id), sandbox.netns)

    def _directory(self, sandbox: str) -> Path:
        return self._run / "sandboxes" / sandbox

    def _sandbox(self, sandbox: str) -> records.Sandbox:
        if sandbox not in self._sandboxes:
            raise RuntimeFault("NotFound", f"no sandbox {sandbox}")
        return self._sandboxes[sandbox]

    def _save(self, sandbox: records.Sandbox) -> None:
        self._records.save(sandbox)
        self._sandboxes[sandbox.id] = sandbox

    def _forget(self, sandbox: records.Sandbox) -> None:
        self._records.delete(sandbox.id)
        self._sandboxes.pop(sandbox.id, None)

    def _load(self) -> None:
        self._sandboxes = records.load(self._state / "sandboxes", records.Sandbox)
        for sandbox in self._sandboxes.values():
            if sandbox.ready and sandbox.boot != self._boot:
                sandbox.ready = False
                self._save(sandbox)
        self._containers.load()


def node_facts() -> oci.NodeFacts:
    """What this node allows, and in the log what it does not."""
    controllers = frozenset((CGROUPS / "cgroup.controllers").read_text().split())
    held = capabilities.own()
    if missing := [name for name in _CONTROLLERS if name not in controllers]:
        log.warning("no cgroup controller for %s: requests and limits of it have no effect", ", ".join(missing))
    if lacking := [name for name in capabilities.NAMES if name not in held]:
        log.warning("this machine does not give %s to anybody: no container has it", ", ".join(lacking))
    own_score = int(Path("/proc/self/oom_score_adj").read_text())
    lowest = -1000 if _SYS_RESOURCE in held else own_score
    return oci.NodeFacts(controllers, held, lowest, node_devices())


def _attachment(sandbox: records.Sandbox) -> cni.Attachment:
    config = sandbox.config
    return cni.Attachment(
        sandbox.id, sandbox.netns, config.namespace, config.name, config.uid, tuple(config.port_mappings)
    )


def _boot_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()
