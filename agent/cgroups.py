"""cgroup2: where it is mounted, the ids BPF knows cgroups by, and which processes belong to a pod."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
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
_CGROUP2_MAGIC: Final = 0x63677270
# A cgroup that goes away while it is read, and one whose processes its domain lists.
_UNREADABLE: Final = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


class CgroupError(Exception):
    """cgroup2 is not there as needed; the message says what to do."""


class HiddenProcesses(CgroupError):
    """The pods' processes are in a PID namespace that is not ours."""


@dataclass(frozen=True)
class Tree:
    """The node's cgroups as a directory tree, and where /proc's names lead in it.

    /proc/PID/cgroup is relative to the reader's cgroup namespace. A container has one of its own: it sees itself
    as `/` and its neighbours as `/../cri-containerd-<id>.scope`.

    Attributes:
        root: The node's root, under which the kubelet has its pods.
        base: The directory that /proc calls `/`.
    """

    root: Path
    base: Path

    def of_process(self, pid: int, proc: Path = Path("/proc")) -> Path:
        """The cgroup of a process.

        Raises:
            CgroupError: the process is gone, or its cgroup cannot be reached from here.
        """
        name = of_process(pid, proc)
        path = Path(os.path.normpath(f"{self.base}/{name}"))
        if pid not in processes(path):
            raise CgroupError(f"process {pid} is not in {path}, which /proc calls {name}: {_MOUNT_STEP}")
        return path


_MOUNT_STEP: Final = "give the agent's container the node's /sys/fs/cgroup, and --cgroup-root to where it is mounted"


def open_tree(root: Path) -> Tree:
    """Finds this process in the tree under `root`.

    Raises:
        CgroupError: `root` is no cgroup2, or does not hold this process.
    """
    if not is_cgroup2(root):
        raise CgroupError(f"{root} is not on cgroup2: {_MOUNT_STEP}")
    own = os.getpid()
    name = of_process("self").lstrip("/")
    for mount in (root, *root.parents):
        if not is_cgroup2(mount):
            break
        if own in processes(mount / name):
            return Tree(root, mount)
    for directory in walk(root):
        if own in processes(directory):
            depth = len(Path(name).parts)
            return Tree(root, directory.parents[depth - 1] if depth else directory)
    raise CgroupError(f"this process is in no cgroup under {root}: {_MOUNT_STEP}")


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


def is_cgroup2(path: Path) -> bool:
    """Whether the path lies on a cgroup2 file system."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statfs(os.fsencode(path), buffer) != 0:
        return False
    return int.from_bytes(buffer.raw[:8], "little") == _CGROUP2_MAGIC


def cgroup_id(path: Path) -> int:
    """The id that bpf_get_current_cgroup_id() returns: the inode of the cgroup's folder."""
    return path.stat().st_ino


def of_process(pid: int | str, proc: Path = Path("/proc")) -> str:
    """The cgroup2 name of a process, as its reader's cgroup namespace has it.

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


def processes(cgroup: Path) -> list[int]:
    """The processes directly in a cgroup; none if it is gone. 0 stands for each one that our PID namespace lacks."""
    try:
        return [int(line) for line in (cgroup / "cgroup.procs").read_text().split()]
    except OSError as e:
        if e.errno in _UNREADABLE:
            return []
        raise


def walk(root: Path) -> Iterator[Path]:
    """A cgroup and all below it; what goes away meanwhile is left out."""
    yield root
    for child in _children(root):
        yield from walk(child)


def _children(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as e:
        if e.errno in _UNREADABLE:
            return []
        raise
    return [root / name for name in names]


def _pods_below(directory: Path) -> Iterator[tuple[str, Path]]:
    """uid and cgroup of each pod, through the classes of service, without a look into any pod."""
    for child in _children(directory):
        uid = pod_uid_of(child.name)
        if uid is None:
            yield from _pods_below(child)
        else:
            yield uid, child


def pod_roots(cgroup_root: Path) -> list[Path]:
    """The cgroups under which the kubelet puts every pod of this node, those that exist."""
    return [cgroup_root / name for name in _PODS_ROOTS if (cgroup_root / name).is_dir()]


def pod_uid_of(cgroup: str) -> str | None:
    """The pod uid in a cgroup path, or None if it is no pod's."""
    for component in cgroup.split("/"):
        found = _POD_COMPONENT.search(component)
        if found:
            return found.group(1).replace("_", "-")
    return None


def pod_processes(cgroup_root: Path, uids: Container[str] | None = None) -> dict[str, list[int]]:
    """Processes by pod uid, oldest number first, of every cgroup that the kubelet made under a node's root.

    Args:
        cgroup_root: the node's root.
        uids: the pods that are asked for; None: all.

    Raises:
        HiddenProcesses: some cannot be seen from here.
    """
    found: dict[str, list[int]] = {}
    for pods in pod_roots(cgroup_root):
        for uid, pod in _pods_below(pods):
            if uids is None or uid in uids:
                for directory in walk(pod):
                    found.setdefault(uid, []).extend(processes(directory))
    for uid, pids in found.items():
        if 0 in pids:
            raise HiddenProcesses(f"processes of pod {uid} are hidden from the agent: set hostPID on its pod")
    return {uid: sorted(pids) for uid, pids in found.items() if pids}
