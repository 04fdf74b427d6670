"""Work inside another network namespace, without ever changing the caller's."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_SO_NETNS_COOKIE: Final = 71
_EXIT_SOFTWARE: Final = 70  # sysexits.h EX_SOFTWARE: the supervisor starts us again
_THREADS: Final = 8
_libc = ctypes.CDLL(None, use_errno=True)
_thread = threading.local()


class NetnsError(Exception):
    """A namespace could not be entered; the message says which and why."""


def run_in(netns_fd: int, work: Callable[[], T]) -> T:
    """Calls `work` in a thread that entered the namespace, and returns or raises what it does.

    The thread ends with the call, or is one of `threads()`, so no other code can find itself in the wrong
    namespace. /proc/sys/net, new sockets and netlink belong to the namespace inside `work`.

    Raises:
        NetnsError: the namespace could not be entered.
    """
    if getattr(_thread, "namespace", None) is not None:
        return _roam(netns_fd, work)
    outcome: list[T] = []
    failure: list[BaseException] = []

    def entered() -> None:
        try:
            _enter(netns_fd)
            outcome.append(work())
        except BaseException as e:  # noqa: BLE001 - handed to the caller's thread
            failure.append(e)

    thread = threading.Thread(target=entered, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Threads for work that uses `run_in` often: they enter and leave by themselves, none is made for it.

    Their home is the namespace of the first caller.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="netns", initializer=_settle, initargs=(home,))


def _settle(home: int) -> None:
    _thread.namespace = home


def _roam(netns_fd: int, work: Callable[[], T]) -> T:
    outer: int = _thread.namespace
    _enter(netns_fd)
    _thread.namespace = netns_fd
    try:
        return work()
    finally:
        try:
            _enter(outer)
            _thread.namespace = outer
        except NetnsError:
            # What this thread does next would be done to a pod.
            log.critical("a thread of the agent cannot leave a pod's network namespace: the agent ends", exc_info=True)
            os._exit(_EXIT_SOFTWARE)


def _enter(netns_fd: int) -> None:
    if _libc.setns(netns_fd, _CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise NetnsError(f"cannot enter the network namespace of FD {netns_fd}: {reason}")


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
