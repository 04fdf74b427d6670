"""cgroup2: where it is mounted, the ids BPF knows cgroups by, and which processes belong to a pod."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

# Names as the kubelet makes them, for both of its cgroup drivers:
# kubepods-burstable-pod0a1b_....slice (systemd) and kubepods/burstable/pod0a1b-... (cgroupfs).
_POD_COMPONENT: Final = re.compile(r"(?:^|[-/])pod([0-9a-fA-F][0-9a-fA-F_-]{7,})(?:\.slice)?$")
_PODS_ROOTS: Final = (
    "kubepods.slice",
    "kubepods",
    "kubelet.slice/kubelet-kubepods.slice",
    "kubelet/kubepods",
)


class CgroupError(Exception):
    """cgroup2 is not there as needed; the message says what to do."""


def find_mount(mounts: str | None = None) -> Path:
    """The first cgroup2 mount in /proc/mounts (or in the given text of it).

    Raises:
        CgroupError: cgroup2 is not mounted.
    """
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "cgroup2":
            return Path(fields[1])
    raise CgroupError("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup, or boot with cgroup2")


def cgroup_id(path: Path) -> int:
    """The id that bpf_get_current_cgroup_id() returns: the inode of the cgroup's folder."""
    return path.stat().st_ino


def of_process(pid: int | str, proc: Path = Path("/proc")) -> str:
    """The cgroup2 path of a process, relative to the mount's root.

    Raises:
        CgroupError: the process is gone or has no cgroup2.
    """
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError) as e:
        raise CgroupError(f"process {pid} is gone") from e
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise CgroupError(f"process {pid} has no cgroup2: is cgroup2 mounted?")


def pod_roots(cgroup_root: Path) -> list[Path]:
    """The cgroups under which the kubelet puts every pod of this node, those that exist."""
    return [cgroup_root / name for name in _PODS_ROOTS if (cgroup_root / name).is_dir()]


def level(path: Path, mount: Path) -> int:
    """How deep a cgroup lies under the root of the hierarchy, which is level 0."""
    return len(path.relative_to(mount).parts)


def pod_uid_of(cgroup: str) -> str | None:
    """The pod uid in a cgroup path, or None if it is no pod's."""
    for component in cgroup.split("/"):
        found = _POD_COMPONENT.search(component)
        if found:
            return found.group(1).replace("_", "-")
    return None


def pod_processes(below: str = "/", proc: Path = Path("/proc")) -> Mapping[str, list[int]]:
    """Processes by pod uid, of the cgroups under `below`; processes that end meanwhile are left out."""
    found: dict[str, list[int]] = {}
    for pid in _pids(proc):
        try:
            cgroup = of_process(pid, proc)
        except (CgroupError, PermissionError):
            continue
        if not _is_below(cgroup, below):
            continue
        uid = pod_uid_of(cgroup)
        if uid is not None:
            found.setdefault(uid, []).append(pid)
    return found


def _is_below(cgroup: str, below: str) -> bool:
    return below == "/" or cgroup == below or cgroup.startswith(below.rstrip("/") + "/")


def _pids(proc: Path) -> Iterable[int]:
    return sorted(int(name) for name in os.listdir(proc) if name.isdigit())
