"""The kubelet's socket: logs, commands and connections for the API server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec

from undermesh.lab import netns
from undermesh.lab.apiserver.kubelets import ExecOptions, KubeletError, LogOptions
from undermesh.lab.errors import LabError
from undermesh.lab.kubelet import logs, wire
from undermesh.lab.kubelet.wire import Failure, Kind, Request
from undermesh.lab.kubelet.worker import PodWorker
from undermesh.lab.runtime.types import ContainerState, ContainerStatus, Runtime, RuntimeFault

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_LINGER_SECONDS = 2.0


class RemoteServer:
    """Serves until it is stopped.

    Args:
        workers: by uid, the pods of the node; shared with the kubelet.
    """

    def __init__(self, path: Path, runtime: Runtime, workers: Mapping[str, PodWorker]) -> None:
        self._path = path
        self._runtime = runtime
        self._workers = workers
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Listen no more; running requests end with the process."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await wire.read(reader)
            if first is None:
                return
            try:
                await self._answer(msgspec.json.decode(first[1], type=Request), reader, writer)
            except KubeletError as error:
                writer.write(wire.json_frame(Kind.ERROR, Failure(str(error), error.code)))
            except (RuntimeFault, LabError, msgspec.MsgspecError) as error:
                writer.write(wire.json_frame(Kind.ERROR, Failure(str(error), 500)))
            await writer.drain()
            await _let_go(reader, writer)
        except ConnectionError as error:
            log.debug("the API server went away: %s", error)
        finally:
            writer.close()

    async def _answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker = self._workers.get(request.pod.uid)
        if worker is None:
            raise KubeletError(f"pod {request.pod.namespace}/{request.pod.name} is not on this node", 404)
        await worker.local.refresh(worker.pod)
        if request.logs is not None:
            await self._logs(worker, request.logs, writer)
        elif request.execute is not None:
            await self._execute(worker, request.execute, reader, writer)
        elif request.connect is not None:
            await _connect(worker, request.connect, writer)

    async def _logs(self, worker: PodWorker, options: LogOptions, writer: asyncio.StreamWriter) -> None:
        status = _logged(worker, options)

        def runs() -> bool:
            latest = worker.local.containers.get(status.name)
            return latest is not None and latest.id == status.id and latest.state is ContainerState.RUNNING

        try:
            async for piece in logs.read(status.log_path, options, runs):
                for start in range(0, len(piece), wire.LARGEST):
                    writer.write(wire.frame(Kind.STDOUT, piece[start : start + wire.LARGEST]))
                await writer.drain()
        except FileNotFoundError as error:
            raise KubeletError(f"container {status.name}: its log is gone: {status.log_path}", 500) from error
        writer.write(wire.json_frame(Kind.EXIT, 0))

    async def _execute(
        self, worker: PodWorker, options: ExecOptions, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        status = worker.local.containers.get(options.container)
        if not options.command and status is not None and status.state is ContainerState.EXITED:
            # Who attaches too late to a short process gets what it wrote.
            await self._logs(worker, LogOptions(options.container), writer)
            return
        if status is None or status.state is not ContainerState.RUNNING:
            raise KubeletError(f'unable to upgrade connection: container not found ("{options.container}")', 404)
        streams = _Streams(writer)
        receiver = asyncio.create_task(streams.receive(reader))
        runner = asyncio.create_task(self._run(status, options, streams))
        try:
            await asyncio.wait({receiver, runner}, return_when=asyncio.FIRST_COMPLETED)
            if runner.done():
                writer.write(wire.json_frame(Kind.EXIT, runner.result()))
        finally:
            for task in (receiver, runner):
                task.cancel()
            await asyncio.gather(receiver, runner, return_exceptions=True)

    async def _run(self, status: ContainerStatus, options: ExecOptions, streams: _Streams) -> int:
        if options.command:
            return await self._runtime.execute(
                status.id, options.command, streams, stdin=options.stdin, tty=options.tty
            )
        await self._runtime.attach(status.id, streams, stdin=options.stdin)
        return 0


class _Streams:
    """The client's end of a command, over the socket."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._stdin: asyncio.Queue[bytes] = asyncio.Queue(64)
        self._sizes: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    async def receive(self, reader: asyncio.StreamReader) -> None:
        """Until the client goes away."""
        while (found := await wire.read(reader)) is not None:
            kind, payload = found
            if kind is Kind.STDIN:
                await self._stdin.put(payload)
            elif kind is Kind.RESIZE:
                self._sizes.put_nowait(msgspec.json.decode(payload, type=tuple[int, int]))

    async def read_stdin(self) -> bytes:
        return await self._stdin.get()

    async def write_stdout(self, data: bytes) -> None:
        await self._write(Kind.STDOUT, data)

    async def write_stderr(self, data: bytes) -> None:
        await self._write(Kind.STDERR, data)

    async def resizes(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            yield await self._sizes.get()

    async def _write(self, kind: Kind, data: bytes) -> None:
        self._writer.write(wire.frame(kind, data))
        await self._writer.drain()


def _logged(worker: PodWorker, options: LogOptions) -> ContainerStatus:
    """The container whose log is meant. Raises KubeletError."""
    name, pod = options.container, worker.pod["metadata"]["name"]
    latest = worker.local.containers.get(name)
    if options.previous:
        before = worker.local.before.get(name)
        if before is None and latest is not None and latest.state is ContainerState.EXITED and latest.attempt:
            before = latest
        if before is None:
            raise KubeletError(f'previous terminated container "{name}" in pod "{pod}" not found')
        return before
    if latest is None or latest.state is ContainerState.CREATED:
        raise KubeletError(f'container "{name}" in pod "{pod}" is waiting to start: {worker.reason(name)}')
    return latest


async def _let_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait for the other side to close: to close while it sends takes from it the answer that it has not yet read."""
    writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while await reader.read(wire.LARGEST):
                pass


async def _connect(worker: PodWorker, port: int, writer: asyncio.StreamWriter) -> None:
    """Hand over a connection to a port on the pod's loopback address. Raises KubeletError, LabError."""
    sandbox = worker.local.sandbox
    if sandbox is None:
        raise KubeletError(f"pod {worker.pod['metadata']['name']} does not run")
    try:
        if sandbox.netns:
            made = await asyncio.to_thread(netns.call, Path(sandbox.netns).name, lambda: _open(port))
        else:
            made = await asyncio.to_thread(_open, port)
    except OSError as error:
        raise KubeletError(f"failed to connect to localhost:{port} inside namespace: {error}", 500) from error
    with made, socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as own:
        socket.send_fds(own, [wire.frame(Kind.OK)], [made.fileno()])


def _open(port: int) -> socket.socket:
    """IPv4 first, as the kubelet does."""
    with contextlib.suppress(OSError):
        return socket.create_connection(("127.0.0.1", port), _CONNECT_SECONDS)
    return socket.create_connection(("::1", port), _CONNECT_SECONDS)
