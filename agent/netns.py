"""Work inside another network namespace, without ever changing the caller's."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_SO_NETNS_COOKIE: Final = 71
_libc = ctypes.CDLL(None, use_errno=True)


class NetnsError(Exception):
    """A namespace could not be entered; the message says which and why."""


def run_in(netns_fd: int, work: Callable[[], T]) -> T:
    """Calls `work` in a thread of its own that entered the namespace, and returns or raises what it does.

    The thread ends with the call, so no other code can find itself in the wrong namespace. /proc/sys/net,
    new sockets and netlink belong to the namespace inside `work`.

    Raises:
        NetnsError: the namespace could not be entered.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def entered() -> None:
        try:
            if _libc.setns(netns_fd, _CLONE_NEWNET) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise NetnsError(f"cannot enter the network namespace of FD {netns_fd}: {reason}")
            outcome.append(work())
        except BaseException as e:  # noqa: BLE001 - handed to the caller's thread
            failure.append(e)

    thread = threading.Thread(target=entered, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


async def run_in_async(netns_fd: int, work: Callable[[], T]) -> T:
    """run_in without blocking the event loop."""
    return await asyncio.to_thread(run_in, netns_fd, work)


def cookie(netns_fd: int) -> int:
    """The kernel's never reused number of the namespace, as BPF sees it (kernel 5.14)."""
    return run_in(netns_fd, _own_cookie)


def own_cookie() -> int:
    """The cookie of the namespace of the calling thread."""
    return _own_cookie()


def _own_cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        value: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        return value


def inode(netns_fd: int) -> int:
    return os.fstat(netns_fd).st_ino
