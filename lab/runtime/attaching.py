"""Joins a client to the streams of a container's first process, by way of the shim."""

from __future__ import annotations

import asyncio

from undermesh.lab.runtime import framing
from undermesh.lab.runtime.shimclient import ShimClient
from undermesh.lab.runtime.types import ExecStreams


async def join(shim: ShimClient, container: str, streams: ExecStreams, *, stdin: bool) -> None:
    """Until the container ends, or for as long as the shim keeps up with this client. Raises RuntimeFault."""
    reader, writer = await shim.attach(container)
    tasks = [asyncio.ensure_future(_resize(writer, streams))]
    if stdin:
        tasks.append(asyncio.ensure_future(_feed(writer, streams)))
    try:
        await _deliver(reader, streams)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()


async def _deliver(reader: asyncio.StreamReader, streams: ExecStreams) -> None:
    frames = framing.Frames()
    while data := await reader.read(65536):
        for kind, payload in frames.feed(data):
            if kind == framing.STDOUT:
                await streams.write_stdout(payload)
            elif kind == framing.STDERR:
                await streams.write_stderr(payload)
            elif kind == framing.EXIT:
                return


async def _feed(writer: asyncio.StreamWriter, streams: ExecStreams) -> None:
    while data := await streams.read_stdin():
        writer.write(framing.pack(framing.STDIN, data))
        await writer.drain()
    writer.write(framing.pack(framing.STDIN_END, b""))
    await writer.drain()


async def _resize(writer: asyncio.StreamWriter, streams: ExecStreams) -> None:
    async for columns, rows in streams.resizes():
        writer.write(framing.pack(framing.RESIZE, framing.pack_size(columns, rows)))
        await writer.drain()
