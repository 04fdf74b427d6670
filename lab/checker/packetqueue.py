"""Holds packets of a netns for a while: the other end of a firewall rule with the target NFQUEUE.

For kernels without the queueing discipline netem. Only the packets' numbers come here, their content stays in the
kernel. The messages are those of linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import errno
import heapq
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from undermesh.lab import netns
from undermesh.lab.errors import LabError

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 3 << 8
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_REQUEST, _ACK = 1, 4
_ERROR = 2
_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND = 1
_COPY_META = 1
_WHOLE_SEGMENTS = 4
_PACKET_HEADER, _VERDICT_HEADER = 1, 2
_ACCEPT = 1
_LONGEST = 1 << 16
_ROOM = 8 << 20
_SO_RCVBUFFORCE = 33


class PacketQueue:
    """Lets each packet of a queue go on after the seconds that `delay` says; a thread of its own does it.

    Raises:
        LabError: the kernel has no queue for packets (CONFIG_NETFILTER_NETLINK_QUEUE).
    """

    def __init__(self, name: str, number: int, delay: Callable[[], float]) -> None:
        self._number = number
        self._delay = delay
        self._held: list[tuple[float, int]] = []
        self._error: OSError | None = None
        self._passed = 0
        try:
            self._socket = netns.call(name, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))
            self._bind()
        except OSError as error:
            raise LabError(
                f"netns {name}: no queue for packets: {error}; the kernel needs CONFIG_NETFILTER_NETLINK_QUEUE"
            ) from error
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._work, name=f"queue-{name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> PacketQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._waker.close()
        self._thread.join()
        self._woken.close()
        self._socket.close()

    def check(self) -> None:
        """Raises LabError if it failed, or no packet came."""
        if self._error is not None:
            raise LabError(f"queue for packets {self._number}: {self._error}")
        if not self._passed:
            raise LabError(f"queue for packets {self._number}: no packet came through")

    def _bind(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._socket.bind((0, 0))
        for kind, value in (
            (_CFG_CMD, struct.pack("!BBH", _BIND, 0, 0)),
            (_CFG_PARAMS, struct.pack("!IB", 0, _COPY_META)),
            (_CFG_MAXLEN, struct.pack("!I", 1 << 16)),
        ):
            self._configure(_attribute(kind, value))
        flags = struct.pack("!I", _WHOLE_SEGMENTS)
        self._configure(_attribute(_CFG_FLAGS, flags) + _attribute(_CFG_MASK, flags))

    def _configure(self, attributes: bytes) -> None:
        self._socket.send(self._message(_CONFIG, attributes, _REQUEST | _ACK))
        answer = self._socket.recv(_LONGEST)
        kind, code = struct.unpack_from("=4xH10xi", answer)
        if kind == _ERROR and code:
            raise OSError(-code, os.strerror(-code))

    def _work(self) -> None:
        try:
            while True:
                wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
                readable, _, _ = select.select([self._socket, self._woken], [], [], wait)
                if self._woken in readable:
                    self._release(float("inf"))
                    return
                if self._socket in readable:
                    self._take()
                self._release(time.monotonic())
        except OSError as error:
            self._error = error

    def _take(self) -> None:
        try:
            data = self._socket.recv(_LONGEST)
        except OSError as error:
            # Numbers were lost: their packets are dropped with the queue, and are sent again.
            if error.errno == errno.ENOBUFS:
                return
            raise
        now = time.monotonic()
        while len(data) >= 20:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _SUBSYSTEM | _PACKET:
                # The attribute with the packet's number comes first.
                number = struct.unpack_from("!I", data, 24)[0]
                heapq.heappush(self._held, (now + self._delay(), number))
            data = data[(length + 3) & ~3 :]

    def _release(self, until: float) -> None:
        while self._held and self._held[0][0] <= until:
            _, number = heapq.heappop(self._held)
            verdict = _attribute(_VERDICT_HEADER, struct.pack("!II", _ACCEPT, number))
            self._socket.send(self._message(_VERDICT, verdict, _REQUEST))
            self._passed += 1

    def _message(self, kind: int, attributes: bytes, flags: int) -> bytes:
        body = struct.pack("!BBH", 0, 0, self._number) + attributes
        return struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM | kind, flags, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
