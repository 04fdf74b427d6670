"""The nodes as the API server sees them: each request goes to the kubelet's socket of the pod's node."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kubelets import ExecOptions, Kubelet, KubeletError, LogOptions, Session
from undermesh.lab.errors import LabError
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kubelet import wire
from undermesh.lab.kubelet.wire import Failure, Kind, PodName, Request

_UNAVAILABLE = 503
_CONNECT_SECONDS = 15.0


class RemoteKubelet:
    """A kubelet in another process; see undermesh.lab.apiserver.kubelets.Kubelet.

    Args:
        path: the kubelet's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def logs(self, pod: Object, options: LogOptions) -> AsyncIterator[bytes]:
        """Raises KubeletError."""
        reader, writer = await self._ask(Request(_name(pod), logs=options))
        try:
            async for kind, payload in self._frames(reader):
                if kind is Kind.STDOUT:
                    yield payload
        finally:
            writer.close()

    async def execute(self, pod: Object, options: ExecOptions, session: Session) -> int:
        """Raises KubeletError."""
        reader, writer = await self._ask(Request(_name(pod), execute=options))
        senders = [asyncio.create_task(_send_sizes(session, writer))]
        if options.stdin:
            senders.append(asyncio.create_task(_send_stdin(session, writer)))
        try:
            async for kind, payload in self._frames(reader):
                if kind is Kind.STDOUT:
                    await session.write_stdout(payload)
                elif kind is Kind.STDERR:
                    await session.write_stderr(payload)
                elif kind is Kind.EXIT:
                    return msgspec.json.decode(payload, type=int)
            raise AssertionError("_frames ends with EXIT or raises")
        finally:
            for task in senders:
                task.cancel()
            await asyncio.gather(*senders, return_exceptions=True)
            writer.close()

    async def connect(self, pod: Object, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises KubeletError."""
        connection = await asyncio.to_thread(self._receive, Request(_name(pod), connect=port))
        return await asyncio.open_connection(sock=connection)

    def _receive(self, request: Request) -> socket.socket:
        """Blocks until the kubelet has connected."""
        try:
            with socket.socket(socket.AF_UNIX) as asked:
                asked.settimeout(_CONNECT_SECONDS)
                asked.connect(str(self._path))
                asked.sendall(wire.json_frame(Kind.REQUEST, request))
                data, descriptors, _, _ = socket.recv_fds(asked, wire.LARGEST, 1)
        except OSError as error:
            raise self._away(error) from error
        if descriptors:
            connection = socket.socket(fileno=descriptors[0])
            connection.setblocking(False)
            return connection
        if not data:
            raise self._away("it closed the connection")
        raise _error(data[wire.HEAD.size :])

    async def _ask(self, request: Request) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise self._away(error) from error
        writer.write(wire.json_frame(Kind.REQUEST, request))
        return reader, writer

    async def _frames(self, reader: asyncio.StreamReader) -> AsyncIterator[tuple[Kind, bytes]]:
        """Until EXIT, which is the last one."""
        while True:
            try:
                found = await wire.read(reader)
            except ConnectionError as error:
                raise self._away(error) from error
            if found is None:
                raise self._away("it closed the connection")
            if found[0] is Kind.ERROR:
                raise _error(found[1])
            yield found
            if found[0] is Kind.EXIT:
                return

    def _away(self, cause: object) -> KubeletError:
        return KubeletError(f"the node's kubelet does not answer at {self._path}: {cause}", _UNAVAILABLE)


class RemoteKubelets:
    """The kubelets of a cluster; see undermesh.lab.apiserver.kubelets.Kubelets."""

    def __init__(self, layout: ClusterLayout) -> None:
        self._layout = layout

    def find(self, node: str) -> Kubelet | None:
        try:
            return RemoteKubelet(self._layout.node(node).kubelet_socket)
        except LabError:
            return None


def _name(pod: Object) -> PodName:
    metadata = pod["metadata"]
    return PodName(metadata["namespace"], metadata["name"], metadata["uid"])


def _error(payload: bytes) -> KubeletError:
    failure = msgspec.json.decode(payload, type=Failure)
    return KubeletError(failure.message, failure.code)


async def _send_stdin(session: Session, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            data = await session.read_stdin()
            for start in range(0, max(len(data), 1), wire.LARGEST):
                writer.write(wire.frame(Kind.STDIN, data[start : start + wire.LARGEST]))
            await writer.drain()
            if not data:
                return


async def _send_sizes(session: Session, writer: asyncio.StreamWriter) -> None:
    async for size in session.sizes():
        writer.write(wire.size_frame(size.width, size.height))
