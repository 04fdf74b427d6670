"""HTTP to an API server: bytes in, bytes out, every failure an `errors.ApiError`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp
import msgspec

from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.timing import Timing
from undermesh.api.problems import InputError

log = logging.getLogger(__name__)

# etcd takes objects of 1.5 MB; an event with more than this is none.
MAX_LINE_BYTES: Final = 16 << 20
MERGE_PATCH: Final = "application/merge-patch+json"
_RENEW_SECONDS: Final = 10.0
_CONNECTIONS: Final = 32


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str]
    limits: aiohttp.ClientTimeout
    headers: Mapping[str, str] = field(default_factory=dict)
    data: bytes | None = None

    @property
    def call(self) -> str:
        return f"{self.method} {self.path}"


class Api:
    """One API server. Connections are opened as they are needed; after `close` as well.

    Args:
        access: Where and who.
        timing: Time-outs.
    """

    def __init__(self, access: Access, timing: Timing | None = None) -> None:
        self.timing = timing or Timing()
        self._access = access
        self._session: aiohttp.ClientSession | None = None
        self._renewed = -_RENEW_SECONDS

    @property
    def server(self) -> str:
        """The API server's URL, for messages."""
        return self._access.server

    async def close(self) -> None:
        """Closes all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> bytes:
        """One call; returns the body of a 2xx answer.

        Args:
            method: HTTP method.
            path: From the slash after the host.
            query: Parameters.
            body: Anything that msgspec writes as JSON; None: no body.
            content_type: Of the body.

        Raises:
            ApiError: no answer, or one without success.
        """
        sent = _Request(method, path, query or {}, self._limits(self.timing.answer))
        if body is not None:
            sent = replace(sent, headers={"content-type": content_type}, data=msgspec.json.encode(body))
        async with self._call(sent) as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """A GET whose answer is lines that come as they happen. Entered once the server has agreed.

        Raises:
            Unreachable: also when the answer breaks off, or nothing comes for `Timing.silence`.
            ApiError: anything else but the server's own end of the answer.
        """
        sent = _Request("GET", path, query, self._limits(self.timing.silence))
        async with self._call(sent) as response:
            yield _lines(response.content, sent.call)

    def _limits(self, read: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self.timing.connect, sock_read=read)

    @contextlib.asynccontextmanager
    async def _call(self, sent: _Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer of success, and the errors of whatever is read of it."""
        try:
            async with await self._send(sent) as response:
                if response.status >= 300:
                    retry_after = response.headers.get("retry-after")
                    raise errors.from_answer(sent.call, response.status, await response.read(), retry_after)
                yield response
        except aiohttp.ConnectionTimeoutError as error:
            raise errors.Unreachable(sent.call, "no connection in time") from error
        except aiohttp.SocketTimeoutError as error:
            raise errors.Unreachable(sent.call, f"nothing came for {sent.limits.sock_read} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise errors.Unreachable(sent.call, str(error) or type(error).__name__) from error
        except InputError as error:
            raise errors.Unauthorised(sent.call, str(error)) from error

    async def _send(self, sent: _Request) -> aiohttp.ClientResponse:
        response = await self._send_once(sent)
        if response.status == 401 and time.monotonic() - self._renewed >= _RENEW_SECONDS:
            self._renewed = time.monotonic()
            response.release()
            log.info("%s refuses our credentials: they are read again", self.server)
            await asyncio.to_thread(self._access.renew)
            response = await self._send_once(sent)
        return response

    async def _send_once(self, sent: _Request) -> aiohttp.ClientResponse:
        connection = await asyncio.to_thread(self._access.connection)
        optional = {"server_hostname": connection.server_name, "proxy": connection.proxy}
        arguments: dict[str, Any] = {name: value for name, value in optional.items() if value}
        return await self._open_session().request(
            sent.method,
            connection.server + sent.path,
            params=sent.query,
            timeout=sent.limits,
            allow_redirects=False,
            data=sent.data,
            headers={"accept": "application/json", **connection.headers, **sent.headers},
            ssl=True if connection.tls is None else connection.tls,
            **arguments,
        )

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(connector=connector, headers={"user-agent": "undermesh"})
        return self._session


async def _lines(content: aiohttp.StreamReader, call: str) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for chunk in content.iter_any():
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            line = bytes(rest) + chunk[start:end] if rest else chunk[start:end]
            rest.clear()
            start = end + 1
            if line:
                yield line
        rest += chunk[start:]
        if len(rest) > MAX_LINE_BYTES:
            raise errors.Malformed(call, f"an event of more than {MAX_LINE_BYTES} bytes")
    if rest:
        raise errors.Malformed(call, "the answer ends within an event")
