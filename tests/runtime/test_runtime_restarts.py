"""What a runtime finds when it starts: after its predecessor, its shim or the whole node died."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from onnode import OnNode, container, ended, pod, remove_all, script, start, status

from undermesh.lab.runtime.node import NodeRuntime
from undermesh.lab.runtime.types import ContainerState, ContainerStatus, RuntimeFault

pytestmark = pytest.mark.root
KEPT = Path("/run/kept")


def _kill_shim() -> None:
    """And every crun that it has started."""
    for pid in Path("/sys/fs/cgroup/system.slice/containerd.service/cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_nothing_is_lost_when_the_kubelet_is_killed(node: OnNode) -> None:
    async def first(runtime: NodeRuntime) -> None:
        sandbox = await runtime.run_sandbox(pod("survivor"))
        long = await start(runtime, sandbox.id, script("echo before; sleep 0.5; echo after; sleep 1000"))
        short = await start(runtime, sandbox.id, script("sleep 0.4; echo last words; exit 42"))
        KEPT.write_text(f"{long} {short}")
        os.kill(os.getpid(), signal.SIGKILL)

    async def second(runtime: NodeRuntime) -> tuple[list[ContainerStatus], bool, list[str], bytes]:
        long, short = KEPT.read_text().split()
        found = [await status(runtime, name) for name in (long, short)]
        logs = [one.log_path.read_text() for one in found]
        alive = (await runtime.exec_sync(long, ["echo", "alive"], 5)).output
        return found, (await runtime.list_sandboxes())[0].ready, logs, alive

    node.run(first)
    time.sleep(1)  # both write while no kubelet is there
    (long, short), ready, logs, alive = node.run(second)
    assert ready and alive == b"alive\n"
    assert long.state is ContainerState.RUNNING and "before" in logs[0] and "after" in logs[0]
    assert (short.state, short.exit_code, short.reason) == (ContainerState.EXITED, 42, "Error")
    assert "last words" in logs[1] and 0.3 < short.finished_at - short.started_at < 0.9


def test_containers_end_with_their_shim_and_are_said_to_be_unknown(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[ContainerStatus, int]:
        sandbox = await runtime.run_sandbox(pod("orphan", host_network=True))
        lost = await start(runtime, sandbox.id, container("sleep", "1000"))
        _kill_shim()
        found = await ended(runtime, lost)
        again = await start(runtime, sandbox.id, script("exit 4"))
        return found, (await ended(runtime, again)).exit_code

    found, again = node.run(body)
    assert (found.exit_code, found.reason) == (255, "Unknown") and again == 4


def test_a_shim_that_dies_while_containers_start_leaves_nothing(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[list[str], list[str], list[str]]:
        sandbox = await runtime.run_sandbox(pod("unlucky", host_network=True))
        starts = [asyncio.create_task(start(runtime, sandbox.id, container("sleep", "1000"))) for _ in range(8)]
        await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)  # the others by now are crun's
        _kill_shim()
        results = await asyncio.gather(*starts, return_exceptions=True)
        assert any(isinstance(result, RuntimeFault) for result in results)
        await remove_all(runtime)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        left = [str(path) for name in ("crun", "containers") for path in Path("/run/undermesh-lab", name).iterdir()]
        groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if "kubepods-burstable-pod" in path]
        return [path for path in mounts if "undermesh-lab" in path], left, groups

    assert node.run(body) == ([], [], [])


def test_after_a_reboot_containers_have_ended_and_sandboxes_are_not_ready_but_can_be_removed(node: OnNode) -> None:
    async def first(runtime: NodeRuntime) -> None:
        sandbox = await runtime.run_sandbox(pod("rebooted"))
        await start(runtime, sandbox.id, container("sleep", "1000"))
        await runtime.create_container(sandbox.id, container("sleep", "1000", name="created"))

    async def second(runtime: NodeRuntime) -> tuple[list[ContainerStatus], list[bool], list[str]]:
        containers = await runtime.list_containers()
        sandboxes = await runtime.list_sandboxes()
        for sandbox in sandboxes:
            await runtime.stop_sandbox(sandbox.id)
            await runtime.remove_sandbox(sandbox.id)
        leases = [path.name for path in Path("/var/lib/cni/networks/lab").glob("10.*")]
        again = await runtime.run_sandbox(pod("again"))
        await ended(runtime, await start(runtime, again.id, script("exit 0")))
        return containers, [sandbox.ready for sandbox in sandboxes], leases

    node.run(first)
    node.node.reboot()
    containers, ready, leases = node.run(second)
    assert [(one.state, one.exit_code, one.reason) for one in containers] == [
        (ContainerState.EXITED, 255, "Unknown")
    ] * 2
    assert ready == [False] and leases == []


def test_a_second_runtime_uses_the_shim_that_is_there(node: OnNode) -> None:
    def shims() -> list[str]:
        return Path("/sys/fs/cgroup/system.slice/containerd.service/cgroup.procs").read_text().split()

    async def body(runtime: NodeRuntime) -> list[str]:
        await asyncio.sleep(0)
        return shims()

    first, second = node.run(body), node.run(body)
    assert first == second and len(first) == 1
