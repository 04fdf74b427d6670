"""The sockets of the DNS server: UDP and TCP on the same address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import cast

from undermesh.lab.dns.reply import reply
from undermesh.lab.dns.zone import Zone

_log = logging.getLogger(__name__)

_IDLE = 10.0
"""Seconds that a TCP client may be silent."""
_CONNECTIONS = 200
_LENGTH = struct.Struct("!H")

CurrentZone = Callable[[], Zone | None]


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, zone: CurrentZone) -> None:
        self._zone = zone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = reply(data, self._zone())
        if answer is not None:
            self._transport.sendto(answer, addr)

    def error_received(self, exc: Exception) -> None:
        _log.debug("an answer was not taken: %s", exc)


class _Streams:
    def __init__(self, zone: CurrentZone) -> None:
        self._zone = zone
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= _CONNECTIONS:
                await self._questions(reader, writer)
        except (asyncio.IncompleteReadError, TimeoutError, OSError) as error:
            _log.debug("a connection ended: %r", error)
        finally:
            self._open -= 1
            writer.close()

    async def _questions(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(_IDLE):
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                packet = await reader.readexactly(length)
            answer = reply(packet, self._zone(), tcp=True)
            if answer is None:
                return
            writer.write(_LENGTH.pack(len(answer)) + answer)
            async with asyncio.timeout(_IDLE):
                await writer.drain()


@contextlib.asynccontextmanager
async def serving(host: str, port: int, zone: CurrentZone) -> AsyncIterator[int]:
    """Answer on UDP and TCP; yields the port, which is any free one if `port` is 0.

    Args:
        host: empty for all addresses of both families.
        zone: called for each question; None as long as nothing is known.

    Raises:
        OSError: the address is taken or not this machine's.
    """
    stream = _bound(host, port)
    number = stream.getsockname()[1]
    tcp = await asyncio.start_server(_Streams(zone).serve, sock=stream)
    loop = asyncio.get_running_loop()
    udp: asyncio.BaseTransport | None = None
    try:
        udp, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(zone), sock=_bound(host, number, socket.SOCK_DGRAM)
        )
        yield number
    finally:
        if udp is not None:
            udp.close()
        tcp.close()


def _bound(host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    family = socket.AF_INET if host and ":" not in host else socket.AF_INET6
    bound = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not host else 1)
        bound.bind((host, port))
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound
