"""portforward: SPDY tunnelled through a WebSocket, as kubectl does it since 1.30.

For each connection the client opens an error stream and a data stream with the same requestID and port.
https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/4006-transition-spdy-to-websockets
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from aiohttp import WSMsgType, web

from undermesh.lab.apiserver import spdy
from undermesh.lab.apiserver.errors import Object, bad_request
from undermesh.lab.apiserver.kubelets import Kubelet, KubeletError

log = logging.getLogger(__name__)

PROTOCOL = "SPDY/3.1+portforward.k8s.io"
_QUEUE = 64
"""Data frames that wait for the pod before the client is no longer read."""


class _Forward:
    """One connection: the data stream and what flows through it."""

    def __init__(self, data: int, error: int, port: int) -> None:
        self.data = data
        self.error = error
        self.port = port
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)
        """None: the client sends no more."""


class _Tunnel:
    """One WebSocket with all its connections."""

    def __init__(self, socket: web.WebSocketResponse, pod: Object, kubelet: Kubelet) -> None:
        self._socket = socket
        self._pod = pod
        self._kubelet = kubelet
        self._decoder = spdy.Decoder()
        self._encoder = spdy.Encoder()
        self._errors: dict[str, int] = {}
        self._forwards: dict[int, _Forward] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until the client closes."""
        try:
            async for message in self._socket:
                if message.type is WSMsgType.BINARY:
                    for frame in self._decoder.feed(message.data):
                        await self._frame(frame)
        except spdy.SpdyError as error:
            log.warning("port-forward to %s: %s", self._pod["metadata"]["name"], error)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _frame(self, frame: spdy.Control | spdy.Data) -> None:
        if isinstance(frame, spdy.Data):
            forward = self._forwards.get(frame.stream)
            if forward is not None:
                if frame.data:
                    await forward.incoming.put(frame.data)
                if frame.flags & spdy.FIN:
                    await forward.incoming.put(None)
        elif frame.type == spdy.SYN_STREAM:
            await self._open(frame)
        elif frame.type == spdy.RST_STREAM and frame.stream in self._tasks:
            self._tasks[frame.stream].cancel()
        elif frame.type == spdy.PING:
            await self._socket.send_bytes(self._encoder.ping(frame.body))

    async def _open(self, frame: spdy.Control) -> None:
        request, kind = frame.headers.get("requestid", ""), frame.headers.get("streamtype", "")
        port = frame.headers.get("port", "")
        if kind not in ("data", "error") or not port.isdigit() or not 0 < int(port) < 65536:
            await self._socket.send_bytes(self._encoder.rst_stream(frame.stream, spdy.INTERNAL_ERROR))
            return
        await self._socket.send_bytes(self._encoder.syn_reply(frame.stream))
        if kind == "error":
            self._errors[request] = frame.stream
            return
        forward = _Forward(frame.stream, self._errors.pop(request, 0), int(port))
        self._forwards[frame.stream] = forward
        self._tasks[frame.stream] = asyncio.create_task(self._serve(forward), name=f"port-forward-{port}")

    async def _serve(self, forward: _Forward) -> None:
        try:
            reader, writer = await self._kubelet.connect(self._pod, forward.port)
        except (KubeletError, OSError) as error:
            text = f"an error occurred forwarding {forward.port}: {error}"
            await self._end(forward, text)
            return
        upward = asyncio.create_task(self._upward(forward, writer))
        try:
            while data := await reader.read(spdy.LARGEST_DATA):
                await self._socket.send_bytes(self._encoder.data(forward.data, data))
            await self._end(forward, "")
        except ConnectionError as error:
            await self._end(forward, f"an error occurred forwarding {forward.port}: {error}")
        finally:
            upward.cancel()
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, forward: _Forward, writer: asyncio.StreamWriter) -> None:
        while (data := await forward.incoming.get()) is not None:
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _end(self, forward: _Forward, error: str) -> None:
        """Close both streams; an error goes over the stream that is for it."""
        self._forwards.pop(forward.data, None)
        self._tasks.pop(forward.data, None)
        with contextlib.suppress(ConnectionError):
            if forward.error:
                await self._socket.send_bytes(self._encoder.data(forward.error, error.encode(), spdy.FIN))
            await self._socket.send_bytes(self._encoder.data(forward.data, b"", spdy.FIN))


async def serve(request: web.BaseRequest, pod: Object, kubelet: Kubelet) -> web.StreamResponse:
    """Forward until the client goes away. Raises ApiError 400 when it speaks another protocol."""
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    if PROTOCOL not in (name.strip() for name in offered.split(",")):
        raise bad_request(
            f"portforward needs a WebSocket with protocol {PROTOCOL}; the client offered {offered or 'none'}"
        )
    phase = (pod.get("status") or {}).get("phase")
    if phase not in ("Running", None):
        raise bad_request(f"unable to forward port because pod is not running. Current status={phase}")
    socket = web.WebSocketResponse(protocols=(PROTOCOL,), max_msg_size=0)
    await socket.prepare(request)
    await _Tunnel(socket, pod, kubelet).run()
    return socket
