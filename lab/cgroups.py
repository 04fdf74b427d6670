"""The lab's cgroup2 subtree: named as the kubelet names cgroups, one node after the other below the prefix.

<cgroup2>/<prefix>/<node>/system/{agent,ztunnel,controlplane}
<cgroup2>/<prefix>/<node>/kubepods.slice/kubepods-pod<uid>.slice/cri-containerd-<container>.scope
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.manifest import Pod

MOUNTS = Path("/proc/mounts")


def mount_point() -> Path:
    """Where cgroup2 is mounted; hybrid systems have it beside the version 1 hierarchies.

    Raises:
        PreconditionError: it is not mounted.
    """
    for line in MOUNTS.read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(target)
    raise PreconditionError("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


def pod_scope(node_root: Path, pod: Pod, container: str) -> Path:
    """The cgroup of one container of a pod; systemd's driver writes the uid with underscores."""
    uid = pod.uid.replace("-", "_")
    return node_root / "kubepods.slice" / f"kubepods-pod{uid}.slice" / f"cri-containerd-{container}.scope"


def processes(group: Path) -> list[int]:
    """The processes directly in a cgroup; none if it is gone."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []


def kill(root: Path) -> None:
    """SIGKILL everything in a cgroup and below it.

    Raises:
        LabError: the kernel has no cgroup.kill (5.14).
    """
    switch = root / "cgroup.kill"
    if not switch.exists():
        raise LabError(f"cgroup {root}: this kernel has no cgroup.kill; Linux 6.1 or newer is needed")
    switch.write_text("1")


def remove(root: Path, *, timeout: float = 5.0) -> None:
    """Kill everything in a cgroup and below it, and remove the tree.

    Raises:
        LabError: a process outlived SIGKILL for `timeout` seconds, or the kernel has no cgroup.kill (5.14).
    """
    deadline = time.monotonic() + timeout
    while root.exists():
        kill(root)
        # A process may have been on its way in; it is killed the next time round.
        if "populated 1" not in (root / "cgroup.events").read_text() and _remove_empty(root):
            return
        if time.monotonic() > deadline:
            raise LabError(f"cgroup {root}: processes live on after SIGKILL; look at cgroup.procs below it")
        time.sleep(0.01)


def _remove_empty(root: Path) -> bool:
    """Remove a tree of cgroups without processes; returns whether that worked."""
    groups = [group for group in root.rglob("*/") if group.is_dir()]
    try:
        for group in [*sorted(groups, key=lambda path: len(path.parts), reverse=True), root]:
            group.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
