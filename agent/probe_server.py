"""Answers the kubelet's probes of this container, on a socket that no other pod's agent shares.

The API on agent.sock is the working agent's: while a new pod takes the place of an old one, that is another one's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

_REQUEST_S: Final = 5.0


@contextlib.asynccontextmanager
async def serving(path: Path | None, unready: Callable[[], str]) -> AsyncIterator[None]:
    """Serves `GET /v1/live` and `GET /v1/ready` inside of the block; None: nowhere.

    Args:
        unready: why the agent is not ready; empty: it is.
    """
    if path is None:
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_REQUEST_S):
                request = await reader.readuntil(b"\r\n\r\n")
                reason = unready() if b" /v1/ready " in request.partition(b"\r\n")[0] else ""
                status = "503 Service Unavailable" if reason else "200 OK"
                writer.write(f"HTTP/1.0 {status}\r\n\r\n{reason or 'yes'}\n".encode())
                await writer.drain()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(answer, str(path))
    async with server:
        yield
