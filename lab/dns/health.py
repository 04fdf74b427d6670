"""CoreDNS' HTTP endpoints for probes: /health says that the process lives, /ready that it can answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

_SECONDS = 5.0
_HEADERS = 64


@contextlib.asynccontextmanager
async def answering(host: str, port: int, path: str, good: Callable[[], bool]) -> AsyncIterator[int]:
    """Serve one path: 200 OK while `good()`, else 503; yields the port.

    Raises:
        OSError: the address is taken.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_SECONDS):
                request = (await reader.readline()).split()
                for _ in range(_HEADERS):
                    if not (await reader.readline()).strip():
                        break
                writer.write(_response(request, path, good()))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, host or None, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _response(request: list[bytes], path: str, good: bool) -> bytes:
    if len(request) < 2 or request[1].partition(b"?")[0] != path.encode():
        status, body = "404 Not Found", b"404 page not found\n"
    else:
        status, body = ("200 OK", b"OK") if good else ("503 Service Unavailable", b"kubernetes")
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
