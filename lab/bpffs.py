"""The BPF file system at /sys/fs/bpf, where the agents pin: mounted by the lab if nobody has."""

from __future__ import annotations

from pathlib import Path

from undermesh.lab.commands import run

BPFFS = Path("/sys/fs/bpf")
# What a kernel with BPF_PRELOAD puts into every new bpffs.
PRELOADED = frozenset({"maps.debug", "progs.debug"})


def is_mounted() -> bool:
    """Whether a bpffs is at /sys/fs/bpf."""
    return any(line.split()[1:3] == [str(BPFFS), "bpf"] for line in Path("/proc/mounts").read_text().splitlines())


def mount() -> None:
    """Mount it.

    Raises:
        ToolError: not root, or the kernel has no BPF file system.
    """
    run(["mount", "-t", "bpf", "bpf", str(BPFFS)])


def unmount_if_empty() -> bool:
    """Unmount it, unless someone pinned something: that would be lost. Returns whether it is gone."""
    if not is_mounted():
        return True
    if any(entry.name not in PRELOADED for entry in BPFFS.iterdir()):
        return False
    run(["umount", str(BPFFS)])
    return True
