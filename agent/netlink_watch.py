"""Wakes someone when links, addresses, routes or rules of a namespace change. Content is read afresh, not here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Container
from typing import Final

from undermesh.agent import rtnetlink

# RTMGRP_* of linux/rtnetlink.h; rules of IPv6 are group number 19.
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | (1 << 18)
_READ: Final = 65536


def subscribe() -> socket.socket:
    """A socket that hears of the calling thread's namespace from now on, for a NetlinkWatch."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    sock.bind((0, _GROUPS))
    return sock


class NetlinkWatch:
    """Calls `on_change` in the event loop, once per burst.

    Args:
        sock: from `subscribe`; the watch owns it.
        on_change: called for what others have changed.
        own: ports of netlink sockets by which this agent makes changes: nobody is woken for those.
    """

    def __init__(self, sock: socket.socket, on_change: Callable[[], None], own: Container[int] = ()) -> None:
        self._on_change = on_change
        self._own = own
        self._sock = sock
        asyncio.get_running_loop().add_reader(self._sock, self._drain)

    def _drain(self) -> None:
        foreign = False
        while True:
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                foreign = True  # ENOBUFS: messages were lost, which is one more reason to look
            else:
                foreign = foreign or any(port not in self._own for port in rtnetlink.ports(data))
        if foreign:
            self._on_change()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
