"""Length-prefixed frames with FDs over a Unix stream socket (proto/node.proto, proto/cni.proto)."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

MAX_FRAME: Final = 64 << 20
MAX_FDS: Final = 253  # SCM_MAX_FD
_READ_SIZE: Final = 1 << 18
_FD_SIZE: Final = array.array("i").itemsize


class FrameError(Exception):
    """The peer broke the protocol or went away; the connection is of no more use."""


class FrameChannel:
    """One connection. FDs are queued in order of arrival; the reader takes as many as a frame announces.

    Concurrent sends are kept whole by a lock; one task reads.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._send_lock = asyncio.Lock()
        self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()

    async def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Sends one frame; the FDs stay the caller's.

        Raises:
            FrameError: the peer is gone.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} FDs on one frame, at most {MAX_FDS} go")
        data = memoryview(len(frame).to_bytes(4, "big") + frame)
        async with self._send_lock:
            try:
                sent = await self._send_first(data, fds)
                if sent < len(data):
                    await asyncio.get_running_loop().sock_sendall(self._sock, data[sent:])
            except OSError as e:
                raise FrameError(f"cannot send: {e.strerror}") from e

    async def _send_first(self, data: memoryview, fds: Sequence[int]) -> int:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            if self._closed:
                raise FrameError("the connection is closed")
            try:
                return self._sock.sendmsg([data], ancillary)
            except BlockingIOError:
                await self._wait_writable()

    async def receive(self) -> bytes | None:
        """The next frame, None at the peer's end between frames.

        Raises:
            FrameError: the peer ended inside a frame, or announced one that is too long.
        """
        while True:
            frame = self._take_frame()
            if frame is not None:
                return frame
            if not await self._fill():
                if self._buffer:
                    raise FrameError(f"the peer ended inside a frame ({len(self._buffer)} bytes of it came)")
                return None

    def take_fds(self, count: int) -> list[int]:
        """The FDs of the frame just received; they become the caller's.

        Raises:
            FrameError: fewer came than the frame announced.
        """
        if count > len(self._fds):
            raise FrameError(f"a frame announces {count} FDs, {len(self._fds)} came")
        return [self._fds.popleft() for _ in range(count)]

    def peer_pid(self) -> int:
        """The process at the other end, as the kernel vouches (SO_PEERCRED)."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.remove_writer(self._sock)
        self._sock.close()
        for waiter in self._waiters:
            _settle(waiter)
        while self._fds:
            os.close(self._fds.popleft())

    def _take_frame(self) -> bytes | None:
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if length > MAX_FRAME:
            raise FrameError(f"a frame of {length} bytes, at most {MAX_FRAME} go")
        if len(self._buffer) < 4 + length:
            return None
        frame = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return frame

    async def _fill(self) -> bool:
        while True:
            if self._closed:
                return False
            try:
                data, ancillary, flags, _address = self._sock.recvmsg(
                    _READ_SIZE, socket.CMSG_SPACE(MAX_FDS * _FD_SIZE), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._wait_readable()
                continue
            except ConnectionResetError:
                return False
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
                    self._fds.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise FrameError("FDs were lost: the limit of open files is reached")
            self._buffer += data
            return bool(data)

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        await self._wait(loop.add_reader, loop.remove_reader)

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        await self._wait(loop.add_writer, loop.remove_writer)

    async def _wait(self, add: Callable[..., object], remove: Callable[[socket.socket], object]) -> None:
        """Until the socket is ready, or closed by close()."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(ready)
        add(self._sock, _settle, ready)
        try:
            await ready
        finally:
            self._waiters.discard(ready)
            if not self._closed:
                remove(self._sock)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
