"""Network sysctls of a namespace, through a procfs mount of our own.

A container's /proc/sys is read-only, and no setting of a pod that is not privileged changes that. A mount that is
made with fsopen(2) is writable, is attached nowhere, and goes with its FD. As with any procfs, what lies under
sys/net belongs to the network namespace of the thread that opens it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Final

# The same on every architecture; glibc has wrappers since 2.36 only.
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_LONGEST: Final = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class SysctlError(OSError):
    """There is no writable /proc; the message says what is missing."""


def read(name: str) -> str | None:
    """The value of sys/net/<name>, None where the kernel has no such thing. Raises OSError."""
    try:
        return _transfer(name, None)
    except FileNotFoundError:
        return None


def write(name: str, value: str) -> None:
    """Sets sys/net/<name>. Raises OSError."""
    _transfer(name, value)


def writable() -> str:
    """Why network sysctls cannot be written here; empty: they can."""
    try:
        os.close(os.open("sys/net/ipv4/tcp_fwmark_accept", os.O_WRONLY | os.O_CLOEXEC, dir_fd=_proc()))
    except OSError as e:
        return str(e)
    return ""


def _transfer(name: str, value: str | None) -> str:
    flags = os.O_RDONLY if value is None else os.O_WRONLY
    fd = os.open(f"sys/net/{name}", flags | os.O_CLOEXEC, dir_fd=_proc())
    try:
        if value is None:
            return os.read(fd, _LONGEST).decode().strip()
        os.write(fd, value.encode())
        return value
    finally:
        os.close(fd)


@functools.cache
def _proc() -> int:
    """The root of the mount; it lives as long as the process."""
    context = _call(_SYS_FSOPEN, b"proc", _FSOPEN_CLOEXEC)
    try:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise SysctlError(
            code,
            f"no procfs can be mounted ({os.strerror(code)}): the agent needs CAP_SYS_ADMIN, and an AppArmor profile "
            "and seccomp filter that let it mount",
        )
    return result
