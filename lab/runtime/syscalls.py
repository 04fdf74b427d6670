"""System calls that Python 3.11 has no name for, and the paths of namespaces.

Imported by the shim, so nothing outside of the standard library may be imported here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import threading

CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_SHARED = 1 << 20
MNT_DETACH = 2
PR_SET_CHILD_SUBREAPER = 36

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_BPF = {"x86_64": 321, "aarch64": 280}

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises OSError that names the target."""
    if _libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data and data.encode()
    ):
        raise _failure(target)


def unmount(target: str) -> None:
    """Take a mount out of the tree now; it ends when its last user does.

    Nothing happens if nothing is mounted there. Raises OSError.
    """
    if _libc.umount2(target.encode(), MNT_DETACH) and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise _failure(target)


def mount_id(path: str) -> int:
    """Which mount a path is in; mountinfo alone does not say what lies on top. Raises OSError."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{handle}") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))
    finally:
        os.close(handle)


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread only. Raises OSError."""
    if _libc.unshare(flags):
        raise _failure("unshare")


def become_subreaper() -> None:
    """Make orphaned descendants children of this process. Raises OSError."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise _failure("PR_SET_CHILD_SUBREAPER")


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2); the descriptor of what it made is closed over exec. Raises OSError."""
    result: int = _libc.syscall(_BPF[platform.machine()], command, attributes, len(attributes))
    if result < 0:
        raise _failure("bpf")
    return result


def thread_namespace(kind: str) -> str:
    """The path of a namespace (net, ipc, uts) of the calling thread."""
    return f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/{kind}"


def link_up(name: str) -> None:
    """Set a network interface of the calling thread's netns up. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        answer = fcntl.ioctl(handle, _SIOCGIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
        flags = struct.unpack("16sH14x", answer)[1]
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), flags | _IFF_UP))


def _failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
