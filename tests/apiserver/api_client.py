"""A plain HTTP client, for what no Kubernetes client lets a test send."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.apiserver.user import AUTHENTICATED, MASTERS, User

TOKENS = {
    "admin-token": User("lab-admin", (MASTERS, AUTHENTICATED)),
    "ann-token": User("ann", ("builders", AUTHENTICATED)),
}


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]


class Client:
    def __init__(self, session: aiohttp.ClientSession, server: ApiServer, token: str) -> None:
        self._session = session
        self._url = server.url
        self._tls = ssl.create_default_context(cadata=server.authority.pem)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        if data is not None:
            named.setdefault("Content-Type", "application/json")
        async with self._session.request(
            method, self._url + path, data=data, headers={**self._headers, **named}, ssl=self._tls
        ) as response:
            text = await response.text()
            found = json.loads(text) if "json" in response.content_type and text else text
            return Answer(response.status, found, dict(response.headers))

    async def get(self, path: str, **headers: str) -> Any:
        return self._good(await self.ask("GET", path, **headers))

    async def create(self, path: str, body: Any) -> Any:
        return self._good(await self.ask("POST", path, body))

    async def replace(self, path: str, body: Any) -> Any:
        return self._good(await self.ask("PUT", path, body))

    async def patch(self, path: str, body: Any, kind: str = "merge-patch+json") -> Any:
        return self._good(await self.ask("PATCH", path, body, Content_Type=f"application/{kind}"))

    async def delete(self, path: str, options: Any = None) -> Any:
        return self._good(await self.ask("DELETE", path, options))

    def _good(self, answer: Answer) -> Any:
        assert answer.status < 300, f"{answer.status}: {answer.body}"
        return answer.body

    @asynccontextmanager
    async def watch(self, path: str, **headers: str) -> AsyncIterator[AsyncIterator[Any]]:
        """The events of a watch; the path has the query."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.get(self._url + path, headers={**self._headers, **named}, ssl=self._tls) as response:
            assert response.status == 200, await response.text()
            yield _events(response)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    async for line in response.content:
        yield json.loads(line)
