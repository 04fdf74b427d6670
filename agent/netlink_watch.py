"""Wakes someone when links, addresses, routes or rules of a namespace change. Content is read afresh, not here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from undermesh.agent import netns

# RTMGRP_* of linux/rtnetlink.h; rules of IPv6 are group number 19.
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | (1 << 18)
_READ: Final = 65536


class NetlinkWatch:
    """A netlink socket in a namespace; `on_change` is called in the event loop, once per burst."""

    def __init__(self, netns_fd: int, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._sock = netns.run_in(netns_fd, _subscribe)
        asyncio.get_running_loop().add_reader(self._sock, self._drain)

    def _drain(self) -> None:
        while True:
            try:
                self._sock.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                continue  # ENOBUFS: messages were lost, which is one more reason to look
        self._on_change()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()


def _subscribe() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    sock.bind((0, _GROUPS))
    return sock
