"""What ztunnel and the agent are given becomes scarce: descriptors, room for files, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from undermesh.lab import cgroups
from undermesh.lab.checker.events.policy import deny_account
from undermesh.lab.checker.events.registry import HOLD, event
from undermesh.lab.checker.incidents import FULL, Incident

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

SPARE_FILES = 4
_FILL = "/run/undermesh-check.fill"
_MEMORY_ROOM = 4 << 20


@event("fd-limit", f"a node's ztunnel may open {SPARE_FILES} files more and no others")
def _fd_limit(ground: KubeGround) -> Incident:
    node = ground.next_node()
    pid = ground.supervised(node, "ztunnel").child()
    began = time.monotonic()
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit = len(_files(pid)) + SPARE_FILES
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, old[1]))
    reached = False
    try:
        # Longer than a connection may stand still unnoticed.
        while time.monotonic() < began + 2 * HOLD:
            time.sleep(0.05)
            reached = reached or sum(number < limit for number in _files(pid)) == limit
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    if not reached:
        ground.notes.append(
            f"fd-limit: ztunnel on {node} never came to its limit of {limit} files: take more connections"
        )
    ground.agents.wait_ready(node)
    if ground.supervised(node, "ztunnel").child() != pid:
        ground.notes.append(f"fd-limit: ztunnel on {node} is another process than before")
    return Incident("fd-limit", began, time.monotonic(), node=node)


def _files(pid: int) -> list[int]:
    """The file descriptors of a process; a limit is about their numbers."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


@event(FULL, "a policy comes and goes while the nodes' /run is full")
def _tmpfs_full(ground: KubeGround) -> Incident:
    with contextlib.ExitStack() as stack:
        for node in ground.nodes:
            stack.enter_context(_full(ground, node))
        incident = deny_account(ground)
    return replace(incident, event=FULL, ended=time.monotonic())


@contextlib.contextmanager
def _full(ground: KubeGround, node: str) -> Iterator[None]:
    used = int(ground.run_on(node, ["df", "--output=used", "-B4096", "/run"]).split()[-1])
    ground.run_on(node, ["mount", "-o", f"remount,size={4096 * (used + 1)}", "/run"])
    try:
        # It ends with ENOSPC: that is what it is for.
        ground.cluster.node(node).run(["dd", "if=/dev/zero", f"of={_FILL}", "bs=4096"])
        yield
    finally:
        ground.run_on(node, ["mount", "-o", "remount,size=50%", "/run"])
        ground.run_on(node, ["rm", "-f", _FILL])


def _no_memory_controller(ground: KubeGround) -> str:
    if "memory" in (cgroups.mount_point() / "cgroup.controllers").read_text().split():
        return ""
    return "the machine's cgroup2 has no memory controller (it is in version 1, or left out)"


@event("memory-limit", "a node's ztunnel gets no more memory", lacks=_no_memory_controller)
def _memory_limit(ground: KubeGround) -> Incident:
    node = ground.next_node()
    pid = ground.supervised(node, "ztunnel").child()
    group = cgroups.mount_point() / Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].rpartition(":")[2][1:]
    began = time.monotonic()
    old = (group / "memory.max").read_text()
    (group / "memory.max").write_text(str(int((group / "memory.current").read_text()) + _MEMORY_ROOM))
    try:
        time.sleep(HOLD)
    finally:
        (group / "memory.max").write_text(old)
    struck = time.monotonic()
    ground.agents.wait_ready(node)
    return Incident("memory-limit", began, time.monotonic(), node=node, struck=struck)
