"""A small API server that does what a test tells it, failures included.

It stores objects by URL, counts resourceVersions, lists in pages and streams watch events. Faults are queued per
verb and path; each takes one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

PODS = "/api/v1/pods"
NAMESPACES = "/api/v1/namespaces"
POLICIES = "/apis/security.istio.io/v1/authorizationpolicies"
TOKEN = "secret-of-the-test"

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status(code: int, reason: str, *, retry_after: int | None = None) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        body = {"kind": "Status", "code": code, "reason": reason, "message": f"scripted {reason}"}
        return web.json_response(body, status=code, headers=headers)

    return answer


async def reset(request: web.Request) -> web.StreamResponse:
    """The connection ends without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def garbage(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>a proxy's page</html>")


def error_event(code: int, reason: str) -> Answer:
    """A watch that begins well and whose first event is an error."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        event = {"type": "ERROR", "object": {"kind": "Status", "code": code, "reason": reason}}
        await response.write(json.dumps(event).encode() + b"\n")
        return response

    return answer


@dataclass(frozen=True)
class Seen:
    verb: str
    path: str
    query: dict[str, str]


@dataclass
class Server:
    objects: dict[str, dict[tuple[str, str], dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    absent: set[str] = field(default_factory=set)
    version: int = 100
    oldest: int = 0
    events: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    faults: dict[tuple[str, str], deque[Answer]] = field(default_factory=lambda: defaultdict(deque))
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    token: str = TOKEN
    silent: bool = False
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _watches: list[web.Request] = field(default_factory=list)

    # === what tests do ===

    async def put(self, path: str, obj: dict[str, Any]) -> None:
        key = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        kind = "MODIFIED" if key in self.objects[path] else "ADDED"
        self.version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        self.objects[path][key] = obj
        await self._tell(path, kind, obj)

    async def delete(self, path: str, namespace: str, name: str) -> None:
        obj = self.objects[path].pop((namespace, name))
        self.version += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        await self._tell(path, "DELETED", obj)

    async def bookmark(self, path: str) -> None:
        self.version += 1
        await self._tell(
            path, "BOOKMARK", {"metadata": {"resourceVersion": str(self.version), "creationTimestamp": None}}
        )

    def compact(self) -> None:
        """Forget all events: a watch from any version but the newest gets 410."""
        self.oldest = self.version
        self.events.clear()

    def fail(self, verb: str, path: str, *answers: Answer) -> None:
        self.faults[verb, path].extend(answers)

    def drop_watches(self) -> None:
        for request in list(self._watches):
            if request.transport is not None:
                request.transport.abort()

    def count(self, verb: str, path: str) -> int:
        return sum(seen.verb == verb and seen.path == path for seen in self.seen)

    def kubeconfig(self, directory: Path) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": self.token}}],
        }
        path = directory / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path

    # === HTTP ===

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.drop_watches()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        verb = "watch" if request.query.get("watch") else {"GET": "list"}.get(request.method, request.method)
        self.seen.append(Seen(verb, request.path, dict(request.query)))
        queued = self.faults[verb, request.path]
        if queued:
            return await queued.popleft()(request)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return await status(401, "Unauthorized")(request)
        if request.path in self.absent:
            return await status(404, "NotFound")(request)
        return await (self._watch(request) if verb == "watch" else self._list(request))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        items = [obj for obj in self.objects[request.path].values() if _selected(request, obj)]
        start, limit = int(request.query.get("continue", "0")), int(request.query.get("limit", "0"))
        end = start + limit if limit else len(items)
        metadata = {"resourceVersion": str(self.version)}
        if end < len(items):
            metadata["continue"] = str(end)
        return web.json_response({"kind": "List", "metadata": metadata, "items": items[start:end]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        if version < self.oldest:
            return await status(410, "Expired")(request)
        response = web.StreamResponse()
        await response.prepare(request)
        self._watches.append(request)
        try:
            while True:
                for number, path, kind, obj in list(self.events):
                    if number > version and path == request.path and not self.silent and _selected(request, obj):
                        await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")
                        version = number
                async with self._news:
                    await self._news.wait()
        finally:
            self._watches.remove(request)

    async def _tell(self, path: str, kind: str, obj: dict[str, Any]) -> None:
        self.events.append((self.version, path, kind, obj))
        async with self._news:
            self._news.notify_all()


def _selected(request: web.Request, obj: dict[str, Any]) -> bool:
    selector = request.query.get("fieldSelector", "")
    return not selector or "spec" not in obj or obj["spec"].get("nodeName") == selector.removeprefix("spec.nodeName=")


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "labels": {k.replace("_", "."): v for k, v in labels.items()}}
    }


def pod(name: str, *, node: str = "node-a", uid: str = "", ip: str = "10.0.0.1", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "shop", "name": name, "uid": uid or f"uid-{name}", **metadata},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    }


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "shop", "name": name, "uid": f"uid-{name}"}, "spec": spec}
