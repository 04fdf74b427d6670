"""What probes and lifecycle hooks do: one HTTP request, TCP connection, gRPC health check or command.

Connections are made from the kubelet's own process, as on any node: a mesh lets the kubelet's probes pass.
Sources: kubernetes pkg/probe, pkg/kubelet/prober/prober.go, pkg/kubelet/lifecycle/handlers.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from undermesh.lab.client import Object
from undermesh.lab.runtime.types import Runtime, RuntimeFault

_MOST_OUTPUT = 10 * 1024
_HEAD_LIMIT = 64 * 1024

# grpc.health.v1: a request is one string, an answer one enum, both field 1; too little to need generated code.
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = 1
_SERVING_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


@dataclass(frozen=True)
class Result:
    """`text` says what went wrong, or what a command printed."""

    ok: bool
    text: str = ""


@dataclass(frozen=True)
class Target:
    """A container that is asked."""

    pod: Object
    container: Object
    id: str
    address: str
    """The pod's first."""


async def run(runtime: Runtime, target: Target, handler: Object, seconds: float) -> Result:
    """Do what a probe or hook says; a failure is a Result.

    Args:
        seconds: how long it may take; 0: no limit, for hooks.
    """
    try:
        if handler.get("exec"):
            return await _command(runtime, target, handler["exec"].get("command") or (), seconds)
        if handler.get("sleep"):
            await asyncio.sleep(int(handler["sleep"]["seconds"]))
            return Result(True)
        async with asyncio.timeout(seconds or None):
            if handler.get("httpGet"):
                return await _http(target, handler["httpGet"])
            if handler.get("tcpSocket"):
                return await _tcp(target, handler["tcpSocket"])
    except TimeoutError:
        return Result(False, _late(target, handler))
    if handler.get("grpc"):
        return await _grpc(target, handler["grpc"], seconds)
    return Result(False, f"container {target.container['name']}: a handler that the lab does not know: {[*handler]}")


def port_number(container: Object, port: int | str) -> int:
    """A port by number or by its name in the container.

    Raises:
        ValueError: the container has no port of that name.
    """
    if isinstance(port, int) or str(port).isdigit():
        return int(port)
    for found in container.get("ports") or ():
        if found.get("name") == port:
            return int(found["containerPort"])
    raise ValueError(f"couldn't find port: {port} in container {container['name']}")


def _late(target: Target, handler: Object) -> str:
    if handler.get("httpGet"):
        url = _url(target, handler["httpGet"])
        return f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
    return f"dial tcp {_where(target, handler['tcpSocket'])}: i/o timeout"


async def _command(runtime: Runtime, target: Target, command: Sequence[str], seconds: float) -> Result:
    try:
        done = await runtime.exec_sync(target.id, command, seconds)
    except RuntimeFault as error:
        if error.reason == "DeadlineExceeded":
            return Result(False, f'command timed out: "{" ".join(command)}" timed out after {seconds:g}s')
        return Result(False, str(error))
    return Result(done.exit_code == 0, done.output[:_MOST_OUTPUT].decode(errors="replace"))


async def _tcp(target: Target, action: Object) -> Result:
    try:
        host, port = _endpoint(target, action)
        _, writer = await asyncio.open_connection(host, port)
    except (OSError, ValueError) as error:
        return Result(False, _dial(target, action, error))
    writer.close()
    return Result(True)


async def _http(target: Target, action: Object) -> Result:
    url = _url(target, action)
    try:
        host, port = _endpoint(target, action)
        context = _unverified() if _scheme(action) == "https" else None
        reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=_HEAD_LIMIT)
    except (OSError, ValueError) as error:
        return Result(False, f'Get "{url}": {_dial(target, action, error)}')
    try:
        writer.write(_request(action, host, port))
        words = (await reader.readline()).split(maxsplit=2)
        if len(words) < 2 or not words[1].isdigit():
            return Result(False, f'Get "{url}": EOF' if not words else f'Get "{url}": malformed HTTP response')
        code = int(words[1])
        if 200 <= code < 400:
            return Result(True)
        return Result(False, f"HTTP probe failed with statuscode: {code}")
    except (OSError, ValueError) as error:
        return Result(False, f'Get "{url}": {error}')
    finally:
        writer.close()
        if writer.transport is not None:
            writer.transport.abort()


def _request(action: Object, host: str, port: int) -> bytes:
    named = f"[{host}]" if ":" in host else host
    headers = {
        "Host": f"{named}:{port}",
        "User-Agent": "kube-probe/1.37",
        "Accept": "*/*",
        "Connection": "close",
    }
    for header in action.get("httpHeaders") or ():
        name = "Host" if header["name"].lower() == "host" else header["name"]
        headers[name] = header.get("value") or ""
    lines = [f"GET {_path(action)} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


async def _grpc(target: Target, action: Object, seconds: float) -> Result:
    # Imported for the first such probe only: it is heavy.
    import grpc

    where = _where(target, action)
    service = (action.get("service") or "").encode()
    request = bytes((0x0A, len(service))) + service if service else b""
    try:
        async with grpc.aio.insecure_channel(where, options=(("grpc.enable_http_proxy", 0),)) as channel:
            answer: bytes = await channel.unary_unary(_HEALTH_CHECK, bytes, bytes)(request, timeout=seconds or None)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Result(False, f'timeout: failed to connect service "{where}" within {seconds:g}s')
        return Result(False, f"error: rpc error: code = {error.code().name} desc = {error.details()}")
    status = answer[1] if len(answer) == 2 and answer[0] == 0x08 else 0
    if status == _SERVING:
        return Result(True)
    name = _SERVING_STATUS.get(status, str(status))
    return Result(False, f'service unhealthy (responded with "{name}")')


def _endpoint(target: Target, action: Object) -> tuple[str, int]:
    return action.get("host") or target.address, port_number(target.container, action["port"])


def _where(target: Target, action: Object) -> str:
    host = action.get("host") or target.address
    with contextlib.suppress(ValueError):
        return f"{f'[{host}]' if ':' in host else host}:{port_number(target.container, action['port'])}"
    return f"{host}:{action['port']}"


def _url(target: Target, action: Object) -> str:
    return f"{_scheme(action)}://{_where(target, action)}{_path(action)}"


def _scheme(action: Object) -> str:
    return str(action.get("scheme") or "HTTP").lower()


def _path(action: Object) -> str:
    path = str(action.get("path") or "/")
    return path if path.startswith("/") else f"/{path}"


def _dial(target: Target, action: Object, error: Exception) -> str:
    """As Go says it, which is what people search for."""
    where = _where(target, action)
    if isinstance(error, ConnectionRefusedError):
        return f"dial tcp {where}: connect: connection refused"
    if isinstance(error, ConnectionResetError):
        return f"read tcp {where}: connection reset by peer"
    if isinstance(error, ValueError):
        return str(error)
    return f"dial tcp {where}: {error}"


@cache
def _unverified() -> ssl.SSLContext:
    """HTTPS probes verify nothing."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
