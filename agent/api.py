"""The agent's HTTP/JSON API on agent.sock: what the CLI asks."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import platform
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web
from google.protobuf.message import Message

from undermesh.agent import private_socket
from undermesh.agent.bpf.inventory import Inventory
from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.features import Check
from undermesh.agent.reconciler import PodView
from undermesh.agent.ztunnel_link import ZtunnelAway, ZtunnelLink, ZtunnelRefused
from undermesh.proto import node_pb2 as wire

VERSION: Final = "0.1.0"


class AgentState(Protocol):
    """What the API shows, from the running agent."""

    @property
    def node(self) -> str: ...

    @property
    def link(self) -> ZtunnelLink: ...

    def pods(self) -> list[PodView]: ...

    def control_plane(self) -> dict[str, Any]: ...

    def checks(self) -> list[Check]: ...

    def certificate_errors(self) -> dict[str, str]: ...

    def renew_certificates(self) -> list[str]: ...

    def counters(self) -> dict[str, int]: ...

    def inventory(self) -> Inventory:
        """What is in the kernel. Blocks."""
        ...

    def unready(self) -> str:
        """Why the agent cannot serve the node yet; empty: it can."""
        ...


def _json(message: Message) -> dict[str, Any]:
    """A message as JSON with its own field names, every field present and numbers as numbers."""
    return {field.name: _json_value(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _json_value(value: Any) -> Any:
    if isinstance(value, Message):
        return _json(value)
    if isinstance(value, str | bool | int | float):
        return value
    return [_json_value(item) for item in value]


class Api:
    """Serves one agent; `start` makes the socket (0600)."""

    def __init__(self, state: AgentState) -> None:
        self._state = state
        self._started = time.time()
        app = web.Application()
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/check", self._check)
        app.router.add_get("/v1/live", self._live)
        app.router.add_get("/v1/ready", self._ready)
        dumps: tuple[tuple[str, wire.DumpKind.ValueType, str], ...] = (
            ("connections", wire.DumpKind.CONNECTIONS, "connections"),
            ("policies", wire.DumpKind.POLICIES, "policies"),
            ("workloads", wire.DumpKind.WORKLOADS, "workloads"),
            ("services", wire.DumpKind.SERVICES, "services"),
        )
        for path, kind, name in dumps:
            app.router.add_get(f"/v1/{path}", self._dump(kind, name))
        app.router.add_get("/v1/explain", self._explain)
        app.router.add_get("/v1/bpf", self._bpf)
        app.router.add_get("/v1/certs", self._certs)
        app.router.add_post("/v1/certs/renew", self._renew)
        app.router.add_get("/v1/counters", self._counters)
        app.router.add_post("/v1/ztunnel/hand-over", self._hand_over)
        # A newer agent may be waiting for our end.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)

    async def start(self, path: Path) -> None:
        await self._runner.setup()
        await web.SockSite(self._runner, private_socket.listen(path, 128)).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _status(self, _request: web.Request) -> web.Response:
        stats = {}
        peer = self._state.link.peer
        try:
            stats = {pod.uid: pod for pod in (await self._state.link.dump(wire.DumpKind.PODS)).pods.pods}
        except ZtunnelAway:
            peer = None
        return web.json_response(
            {
                "node": self._state.node,
                "version": VERSION,
                "kernel": platform.release(),
                "agent": {"pid": os.getpid(), "started": self._started},
                "ztunnel": {
                    "connected": peer is not None,
                    "instance": peer[0] if peer else "",
                    "build": peer[1] if peer else "",
                    "pid": peer[2] if peer else 0,
                    "draining": [dataclasses.asdict(other) for other in await self._state.link.draining()],
                },
                "control_plane": self._state.control_plane(),
                "pods": [_pod(view, stats.get(view.pod.metadata.uid)) for view in self._state.pods()],
            }
        )

    async def _check(self, _request: web.Request) -> web.Response:
        checks = [
            {"name": c.name, "ok": c.ok, "detail": c.detail, "next_step": "" if c.ok else c.next_step}
            for c in self._state.checks()
        ]
        return web.json_response({"checks": checks})

    async def _live(self, _request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _ready(self, _request: web.Request) -> web.Response:
        reason = self._state.unready()
        return web.Response(status=503 if reason else 200, text=(reason or "ready") + "\n")

    async def _hand_over(self, _request: web.Request) -> web.Response:
        try:
            old, new = await self._state.link.hand_over()
        except (ZtunnelAway, ZtunnelRefused) as e:
            return web.json_response({"error": str(e)}, status=503)
        return web.json_response({"draining": old, "accepting": new})

    async def _counters(self, _request: web.Request) -> web.Response:
        return web.json_response({"counters": self._state.counters()})

    async def _bpf(self, _request: web.Request) -> web.Response:
        try:
            found = await asyncio.to_thread(self._state.inventory)
        except (BpfError, OSError) as e:
            return web.json_response({"error": str(e)}, status=503)
        return web.json_response(dataclasses.asdict(found))

    async def _explain(self, request: web.Request) -> web.Response:
        """What would become of a connection from `source` to `destination` at `port`."""
        query = request.query
        try:
            port = int(query.get("port", ""))
            asked = wire.ExplainRequest(
                source=query.get("source", ""), destination=query.get("destination", ""), port=port
            )
        except ValueError:
            return web.json_response({"error": f"{query.get('port', '')!r} is no port"}, status=400)
        try:
            found = await self._state.link.explain(asked)
        except (ZtunnelAway, ZtunnelRefused) as e:
            return web.json_response({"error": str(e)}, status=503)
        if found.error:
            return web.json_response({"error": found.error}, status=404)
        answer = _json(found)
        answer["capture"] = wire.Capture.Name(found.capture)
        answer["node"] = self._state.node
        answer["source_pod"] = self._pod_with(found.source_address)
        for row in answer["ways"]:
            row["pod"] = self._pod_with(row["endpoint"].rpartition(":")[0].strip("[]"))
        return web.json_response(answer)

    def _pod_with(self, address: str) -> dict[str, str] | None:
        """The pod of this node that has an address: what it should be, what it is, and why."""
        for view in self._state.pods():
            if not view.pod.spec.host_network and address in map(str, view.pod.addresses):
                metadata = view.pod.metadata
                desired = "enrolled" if view.desired else "plain"
                return {
                    "name": f"{metadata.namespace}/{metadata.name}",
                    "desired": desired,
                    "state": str(view.state),
                    "reason": view.reason,
                }
        return None

    async def _certs(self, request: web.Request) -> web.Response:
        return await self._dump(wire.DumpKind.CERTIFICATES, "certificates", "certs")(request)

    async def _renew(self, _request: web.Request) -> web.Response:
        return web.json_response({"identities": self._state.renew_certificates()})

    def _dump(
        self, kind: wire.DumpKind.ValueType, field: str, key: str = ""
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(_request: web.Request) -> web.Response:
            try:
                reply = await self._state.link.dump(kind)
            except ZtunnelAway as e:
                return web.json_response({"error": str(e)}, status=503)
            rows = _json(getattr(reply, field))[field]
            if field == "certificates":
                errors = self._state.certificate_errors()
                rows = [{**row, "error": errors.pop(row["identity"], "")} for row in rows]
                rows += [{"identity": identity, "error": error} for identity, error in sorted(errors.items())]
            return web.json_response({key or field: rows})

        return handler


def _pod(view: PodView, stats: wire.PodStats | None) -> dict[str, Any]:
    metadata = view.pod.metadata
    stats = stats or wire.PodStats()
    return {
        "namespace": metadata.namespace,
        "name": metadata.name,
        "uid": metadata.uid,
        "addresses": [str(address) for address in view.pod.addresses],
        "identity": view.identity,
        "desired": "enrolled" if view.desired else "plain",
        "state": str(view.state),
        "reason": view.reason,
        "captured_connections": stats.captured_connections,
        "inbound_connections": stats.inbound_connections,
        "inbound_tunnels": stats.inbound_tunnels,
        "outbound_tunnels": stats.outbound_tunnels,
    }
