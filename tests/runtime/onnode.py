"""Runs coroutines of tests inside a real node of the lab, with a runtime of their own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pickle
import traceback
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from undermesh.lab.kube.ground import Ground
from undermesh.lab.kube.layout import NodeLayout
from undermesh.lab.runtime.node import NodeRuntime
from undermesh.lab.runtime.types import ContainerConfig, ContainerState, ContainerStatus, SandboxConfig

T = TypeVar("T")
_NAMESPACES = 0x00020000 | 0x04000000 | 0x40000000 | 0x02000000  # mount, UTS, network, cgroup
_libc = ctypes.CDLL(None, use_errno=True)


class OnNode:
    """One node, and how to run something on it."""

    def __init__(self, ground: Ground) -> None:
        self.layout: NodeLayout = ground.layout.nodes[0]
        self.node = ground.nodes[self.layout.name]
        self.build = ground.layout.build

    def run(self, body: Callable[[NodeRuntime], Awaitable[T]]) -> T:
        """Run it in a child process on the node with a started runtime; its result. What it raises fails the test."""
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            self._be_kubelet(body, send)
        os.close(send)
        with open(receive, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        if not answer:
            return None  # type: ignore[return-value]  # it was killed, which some tests want
        ok, value = pickle.loads(answer)
        if not ok:
            raise AssertionError(value)
        result: T = value
        return result

    def _be_kubelet(self, body: Callable[[NodeRuntime], Awaitable[Any]], send: int) -> None:
        """Never returns."""
        try:
            (self.layout.cgroup / "system.slice/kubelet.service/cgroup.procs").write_text("0")
            init = os.pidfd_open(int(self.layout.init_pid.read_text()))
            if _libc.setns(init, _NAMESPACES) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            os.chdir("/")
            answer = (True, asyncio.run(self._with_runtime(body)))
        except BaseException:  # noqa: BLE001  # the parent raises it
            answer = (False, traceback.format_exc())
        os.write(send, pickle.dumps(answer))
        os._exit(0)

    async def _with_runtime(self, body: Callable[[NodeRuntime], Awaitable[T]]) -> T:
        runtime = NodeRuntime(self.build)
        await runtime.start()
        try:
            return await body(runtime)
        finally:
            await runtime.close()


def pod(name: str, **more: Any) -> SandboxConfig:
    """A burstable pod's sandbox."""
    uid = str(uuid.uuid4())
    parent = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid.replace('-', '_')}.slice"
    return SandboxConfig("shop", name, uid, name, parent, **more)


def container(*command: str, name: str = "app", image: str = "busybox", **more: Any) -> ContainerConfig:
    """A container that runs `command`."""
    log = Path(f"/var/log/pods/test/{uuid.uuid4().hex}/{name}/0.log")
    return ContainerConfig(name, 0, image, command=command, log_path=log, **more)


def script(text: str, **more: Any) -> ContainerConfig:
    """A container that runs a shell script."""
    return container("sh", "-c", text, **more)


async def status(runtime: NodeRuntime, name: str) -> ContainerStatus:
    return next(one for one in await runtime.list_containers() if one.id == name)


async def start(runtime: NodeRuntime, sandbox: str, config: ContainerConfig) -> str:
    name = await runtime.create_container(sandbox, config)
    await runtime.start_container(name)
    return name


async def ended(runtime: NodeRuntime, name: str) -> ContainerStatus:
    """Wait for its end."""
    async with asyncio.timeout(10):
        while (found := await status(runtime, name)).state is not ContainerState.EXITED:
            # Several may wait for different ends.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runtime.exits().get(), 0.05)
    return found


async def output(runtime: NodeRuntime, sandbox: str, config: ContainerConfig) -> list[str]:
    """Run a container to its end; the lines that it wrote."""
    await ended(runtime, await start(runtime, sandbox, config))
    return [line.split(" ", 3)[3] for line in config.log_path.read_text().splitlines()]


async def remove_all(runtime: NodeRuntime) -> None:
    for sandbox in await runtime.list_sandboxes():
        await runtime.stop_sandbox(sandbox.id)
        await runtime.remove_sandbox(sandbox.id)
