"""Linux capabilities: names as the kernel numbers them, and the set that a container gets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NAMES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)
"""By bit, as in linux/capability.h."""

# containerd's oci.defaultUnixCaps.
DEFAULT = frozenset(
    [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
)


def of_mask(mask: int) -> frozenset[str]:
    """The names in a mask as /proc/<pid>/status writes it."""
    return frozenset(name for bit, name in enumerate(NAMES) if mask >> bit & 1)


def own() -> frozenset[str]:
    """What this process may hand on: its bounding set, less than everything on a confined machine."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return of_mask(int(line.split()[1], 16))
    return frozenset(NAMES)


def effective(add: Iterable[str], drop: Iterable[str], *, privileged: bool) -> frozenset[str]:
    """What a container's root has, by containerd's rules: add ALL, drop ALL, then each name.

    Raises:
        ValueError: a name that is no capability.
    """
    if privileged:
        return frozenset(NAMES)
    adds, drops = {_plain(name) for name in add}, {_plain(name) for name in drop}
    for name in sorted(adds | drops):
        if name not in NAMES and name != "ALL":
            raise ValueError(f"unknown capability {name!r}")
    held = set(NAMES) if "ALL" in adds else set(DEFAULT)
    if "ALL" in drops:
        held.clear()
    return frozenset((held | adds) - drops - {"ALL"})


def _plain(name: str) -> str:
    return name.upper().removeprefix("CAP_")
