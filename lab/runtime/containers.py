"""Containers of a node: their records, bundles, starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undermesh.lab.runtime import oci, records, shimmed, syscalls
from undermesh.lab.runtime.images import Images, image_id
from undermesh.lab.runtime.shimclient import ShimClient
from undermesh.lab.runtime.types import ContainerConfig, ContainerState, RuntimeFault

log = logging.getLogger(__name__)

CGROUPS = Path("/sys/fs/cgroup")
UNKNOWN = 255
"""Exit code of a container whose end nobody saw, as containerd has it."""

_KILL_PATIENCE = 10.0
_LAYERS = ("upper", "work", "usr-upper", "usr-work", "rootfs")


class Containers:
    """All containers of a node.

    Args:
        state: where records are kept over a reboot.
        run: the runtime's run directory.
    """

    def __init__(self, state: Path, run: Path, shim: ShimClient, images: Images, facts: oci.NodeFacts) -> None:
        self.known: dict[str, records.Container] = {}
        self.exits: asyncio.Queue[str] = asyncio.Queue()
        self._records = records.Records(state / "containers")
        self._state = state
        self._run = run
        self._shim = shim
        self._images = images
        self._facts = facts
        self._ended: dict[str, asyncio.Event] = {}

    def load(self) -> None:
        """Read every record from disk."""
        self.known = records.load(self._state / "containers", records.Container)

    def directory(self, container: str) -> Path:
        return self._run / "containers" / container

    async def reconcile(self) -> None:
        """Learn what happened to containers while nobody watched; called when a shim is found or started."""
        running = set((await self._shim.ask({"op": "list"}))["ids"])
        for container in self.known.values():
            if container.state is ContainerState.EXITED or container.id in running:
                self._note_start(container)
                continue
            directory = self.directory(container.id)
            if (directory / shimmed.STARTED).exists() and not (directory / shimmed.EXITED).exists():
                shimmed.kill_cgroup(str(CGROUPS / self._cgroup(container)))  # its streams ended with the shim
                shimmed.write_exit(str(directory), UNKNOWN, unknown=True)
            if (directory / shimmed.EXITED).exists():
                self.note_exit(container.id)
            elif not directory.exists():  # the node was started anew
                container.end(UNKNOWN, time.time(), "Unknown")
                self._records.save(container)
                self.exits.put_nowait(container.id)
        await self._kill_strangers(running)

    async def create(
        self, sandbox: records.Sandbox, config: ContainerConfig, namespaces: Mapping[str, str], shm: Path
    ) -> str:
        """Write a container's bundle and record. Raises RuntimeFault."""
        name = secrets.token_hex(32)
        container = records.Container(
            id=name, sandbox=sandbox.id, config=config, image_id=image_id(config.image), created_at=time.time()
        )
        image = self._images.resolve(config)
        try:
            root_options, usr_options = await asyncio.to_thread(self._make_root, name, config.image)
            place = oci.Placement(
                root=str(self.directory(name) / "rootfs"),
                cgroups_path=f"/{sandbox.config.cgroup_parent}/cri-containerd-{name}.scope",
                hostname=sandbox.config.hostname,
                namespaces={"mount": "", **namespaces},
                overlays={"/usr": usr_options},
                shm=str(shm),
            )
            spec = oci.spec(config, image, place, self._facts)
            (self.directory(name) / "config.json").write_text(json.dumps(spec))
            (self.directory(name) / "overlay").write_text(root_options)
            self._records.save(container)
        except OSError as error:
            self._discard(name)
            raise RuntimeFault("CreateContainerError", f"container {config.name}: {error}") from error
        except RuntimeFault:
            self._discard(name)
            raise
        self.known[name] = container
        return name

    async def start(self, name: str) -> None:
        """Raises RuntimeFault; the container then is an ended one."""
        container = self.get(name)
        if container.state is not ContainerState.CREATED:
            raise RuntimeFault("RunContainerError", f"container {name[:12]} is {container.state.value} already")
        try:
            answer = await self._shim.ask(self._start_request(container))
        except RuntimeFault:
            self._note_failed_start(container)  # whether it runs nobody knows now, so it must not
            raise
        if "error" in answer:
            self._note_failed_start(container)
            raise RuntimeFault(
                "RunContainerError",
                f"failed to create containerd task: OCI runtime create failed: {answer['error']}",
            )
        self._note_start(container)

    async def stop(self, name: str, grace: float) -> None:
        """Raises RuntimeFault: it outlived SIGKILL."""
        container = self.known.get(name)
        if container is None or container.state is ContainerState.EXITED:
            return
        if container.state is ContainerState.CREATED:
            container.end(128 + signal.SIGKILL, time.time())
            self._records.save(container)
            return
        ended = self._ended.setdefault(name, asyncio.Event())
        if grace > 0:
            await self._shim.ask({"op": "signal", "id": name, "signal": int(signal.SIGTERM)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await ended.wait()
        if not ended.is_set():
            await self._kill(container, ended)

    def remove(self, name: str) -> None:
        """Raises RuntimeFault: it runs."""
        container = self.known.get(name)
        if container is None:
            return
        if container.state is ContainerState.RUNNING:
            raise RuntimeFault("ContainerRunning", f"container {name[:12]} runs; stop it first")
        self._discard(name)
        del self.known[name]
        self._ended.pop(name, None)

    def of(self, sandbox: str) -> list[records.Container]:
        """The containers of a sandbox."""
        return [container for container in self.known.values() if container.sandbox == sandbox]

    def get(self, name: str) -> records.Container:
        """Raises RuntimeFault: there is none."""
        if name not in self.known:
            raise RuntimeFault("NotFound", f"no container {name}")
        return self.known[name]

    def running(self, name: str) -> records.Container:
        """Raises RuntimeFault: it does not run."""
        container = self.get(name)
        if container.state is not ContainerState.RUNNING:
            raise RuntimeFault("NotRunning", f"container {container.config.name} is {container.state.value}")
        return container

    def note_exit(self, name: str) -> None:
        """A container has ended; its end is in its run directory."""
        container = self.known.get(name)
        if container is None or container.state is ContainerState.EXITED:
            return
        self._note_times(container)
        end = _read_json(self.directory(name) / shimmed.EXITED)
        oom = end["oom"] and end["code"] == 128 + signal.SIGKILL
        container.end(end["code"], end["at"], "OOMKilled" if oom else "Unknown" if end["unknown"] else "")
        self._records.save(container)
        self._ended.setdefault(name, asyncio.Event()).set()
        self.exits.put_nowait(name)

    async def _kill(self, container: records.Container, ended: asyncio.Event) -> None:
        shimmed.kill_cgroup(str(CGROUPS / self._cgroup(container)))
        try:
            async with asyncio.timeout(_KILL_PATIENCE):
                await ended.wait()
        except TimeoutError as error:
            raise RuntimeFault(
                "KillContainerError", f"container {container.config.name} (pid {container.pid}) outlived SIGKILL"
            ) from error

    async def _kill_strangers(self, running: set[str]) -> None:
        """What the shim runs and no record knows was left by a kubelet that ended in the middle of a removal."""
        sandbox_ids = {path.stem for path in (self._state / "sandboxes").glob("*.json")}
        for name in running - set(self.known) - sandbox_ids:
            log.warning("container %s: no record of it; killed", name[:12])
            await self._shim.ask({"op": "signal", "id": name, "signal": int(signal.SIGKILL)})

    def _make_root(self, name: str, image: str) -> tuple[str, str]:
        """Directories of a container; the overlay options of / and of /usr."""
        directory = self.directory(name)
        directory.mkdir(parents=True)
        for layer in _LAYERS:
            (directory / layer).mkdir()
        root, usr = self._images.layers(image)
        return _overlay(root, directory, ""), _overlay(usr, directory, "usr-")

    def _start_request(self, container: records.Container) -> dict[str, Any]:
        config = container.config
        return {
            "op": "start",
            "id": container.id,
            "cgroup": str(CGROUPS / self._cgroup(container)),
            "log": str(config.log_path),
            "overlay": (self.directory(container.id) / "overlay").read_text(),
            "stdin": config.stdin,
            "tty": config.tty,
            "privileged": config.security.privileged,
        }

    def _cgroup(self, container: records.Container) -> str:
        spec = _read_json(self.directory(container.id) / "config.json")
        path: str = spec["linux"]["cgroupsPath"]
        return path.lstrip("/")

    def _note_start(self, container: records.Container) -> None:
        if container.state is ContainerState.CREATED:
            self._note_times(container)
            container.state = ContainerState.RUNNING
            self._records.save(container)

    def _note_times(self, container: records.Container) -> None:
        with contextlib.suppress(FileNotFoundError):
            started = _read_json(self.directory(container.id) / shimmed.STARTED)
            container.pid, container.started_at = started["pid"], started["at"]

    def _note_failed_start(self, container: records.Container) -> None:
        shimmed.kill_cgroup(str(CGROUPS / self._cgroup(container)))
        container.end(shimmed.START_FAILED, time.time(), "StartError")
        self._records.save(container)

    def _discard(self, name: str) -> None:
        """With what a shim leaves that dies while crun works."""
        syscalls.unmount(str(self.directory(name) / "rootfs"))
        shutil.rmtree(self._run / "crun" / name, ignore_errors=True)
        shutil.rmtree(self.directory(name), ignore_errors=True)
        self._records.delete(name)


def node_devices() -> tuple[Mapping[str, object], ...]:
    """Every device in /dev in OCI form, for privileged containers."""
    found = []
    for directory, names, files in os.walk("/dev"):
        names[:] = [name for name in names if name not in ("pts", "shm", "mqueue", "fd")]
        for name in files:
            device = _device(Path(directory, name))
            if device is not None:
                found.append(device)
    return tuple(found)


def _device(path: Path) -> Mapping[str, object] | None:
    status = path.lstat()
    if path.name == "console" or not (path.is_char_device() or path.is_block_device()) or path.is_symlink():
        return None
    return {
        "path": str(path),
        "type": "c" if path.is_char_device() else "b",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": status.st_mode & 0o777,
        "uid": status.st_uid,
        "gid": status.st_gid,
    }


def _overlay(layers: list[Path], directory: Path, prefix: str) -> str:
    lower = ":".join(map(str, layers))
    return f"lowerdir={lower},upperdir={directory}/{prefix}upper,workdir={directory}/{prefix}work"


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_bytes())
    return value
