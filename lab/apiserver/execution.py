"""exec and attach over WebSocket: the v5.channel.k8s.io protocol and its predecessor.

Each binary message begins with its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status, 4 terminal sizes; in v5,
255 closes the channel whose number follows.
https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/4006-transition-spdy-to-websockets
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator

import msgspec
from aiohttp import WSMsgType, web

from undermesh.lab.apiserver.errors import Object, bad_request
from undermesh.lab.apiserver.kubelets import ExecOptions, Kubelet, KubeletError, TerminalSize

log = logging.getLogger(__name__)

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_QUEUE = 64
"""Messages of stdin that wait for the process before the client is no longer read."""


class _Session:
    """The client's streams, over one WebSocket."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._stdin: asyncio.Queue[bytes] = asyncio.Queue(_QUEUE)
        self._sizes: asyncio.Queue[TerminalSize | None] = asyncio.Queue()

    async def read_stdin(self) -> bytes:
        return await self._stdin.get()

    async def write_stdout(self, data: bytes) -> None:
        await self._socket.send_bytes(bytes((_STDOUT,)) + data)

    async def write_stderr(self, data: bytes) -> None:
        await self._socket.send_bytes(bytes((_STDERR,)) + data)

    async def sizes(self) -> AsyncIterator[TerminalSize]:
        while (size := await self._sizes.get()) is not None:
            yield size

    async def finish(self, status: Object) -> None:
        """The last word: how the command ended."""
        await self._socket.send_bytes(bytes((_ERROR,)) + msgspec.json.encode(status))

    async def receive(self) -> None:
        """Sort the client's messages until it closes."""
        async for message in self._socket:
            if message.type is not WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == _STDIN and data:
                await self._stdin.put(data)
            elif channel == _RESIZE:
                self._resize(data)
            elif channel == _CLOSE and data[:1] == bytes((_STDIN,)):
                await self._stdin.put(b"")
        self._sizes.put_nowait(None)

    def _resize(self, data: bytes) -> None:
        try:
            found = json.loads(data)
            self._sizes.put_nowait(TerminalSize(int(found["Width"]), int(found["Height"])))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("exec: a terminal size that cannot be read (%s): %s", error, data[:64])


def exit_status(code: int) -> Object:
    """The Status for a process that ended with that code."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


async def serve(request: web.BaseRequest, pod: Object, options: ExecOptions, kubelet: Kubelet) -> web.StreamResponse:
    """Run the command of one request. Raises ApiError 400 when the client speaks no known protocol."""
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    if not any(name.strip() in PROTOCOLS for name in offered.split(",")):
        raise bad_request(
            f"exec needs a WebSocket with protocol {' or '.join(PROTOCOLS)}; the client offered {offered or 'none'}"
        )
    socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=0)
    await socket.prepare(request)
    session = _Session(socket)
    receiver = asyncio.ensure_future(session.receive())
    runner = asyncio.ensure_future(kubelet.execute(pod, options, session))
    try:
        await asyncio.wait((receiver, runner), return_when=asyncio.FIRST_COMPLETED)
        if runner.done():
            await _conclude(session, runner)
    finally:
        for task in (runner, receiver):
            task.cancel()
        await asyncio.gather(runner, receiver, return_exceptions=True)
        with contextlib.suppress(ConnectionError):
            await socket.close()
    return socket


async def _conclude(session: _Session, runner: asyncio.Future[int]) -> None:
    try:
        status = exit_status(runner.result())
    except KubeletError as error:
        status = {
            "metadata": {},
            "status": "Failure",
            "message": str(error),
            "reason": "InternalError",
            "code": error.code,
        }
    with contextlib.suppress(ConnectionError):
        await session.finish(status)
