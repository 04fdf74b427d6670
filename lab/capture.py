"""A packet capture on an interface inside a netns of the lab, read by a thread of this process."""

from __future__ import annotations

import select
import socket
import struct
import threading

from undermesh.lab import netns
from undermesh.lab.wire import Observation, Wire

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_BUFFER = 128 << 20
# A segment that the kernel has yet to cut up: 64 KiB and headers, with room.
_LONGEST_FRAME = 128 << 10


class Capture:
    """Sees both directions of `interface` in the netns `name` from construction to `close`.

    Args:
        name: the netns.
        interface: the interface in it; empty: all of them.
        token: what to look for in the clear.
    """

    def __init__(self, name: str, interface: str, token: bytes) -> None:
        self._wire = Wire(token)
        self._lock = threading.Lock()
        self._socket = netns.call(name, lambda: _open(interface))
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._read, name=f"capture-{interface or 'all'}", daemon=True)
        self._thread.start()

    def observe(self) -> Observation:
        """What was seen since the last call, up to every packet that was on the wire before this one."""
        with self._lock:
            self._drain()
            statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self._wire.lose(struct.unpack("II", statistics)[1])
            return self._wire.observe()

    def close(self) -> None:
        """Stop capturing."""
        self._waker.close()
        self._thread.join()
        self._woken.close()
        self._socket.close()

    def _read(self) -> None:
        while True:
            readable, _, _ = select.select([self._socket, self._woken], [], [])
            if self._woken in readable:
                return
            with self._lock:
                self._drain(at_most=64)

    def _drain(self, at_most: int = 1 << 20) -> None:
        for _ in range(at_most):
            try:
                self._wire.feed(self._socket.recv(_LONGEST_FRAME))
            except BlockingIOError:
                return


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    if interface:
        opened.bind((interface, _ETH_P_ALL))
    opened.setblocking(False)
    return opened
