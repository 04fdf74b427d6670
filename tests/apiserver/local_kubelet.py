"""A kubelet whose containers are this machine: commands run here, ports are loopback's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kubelets import ExecOptions, KubeletError, LogOptions, Session


class LocalKubelet:
    """Answers for any pod. `log` is what every container has written."""

    def __init__(self) -> None:
        self.log = [b"one\n", b"two\n", b"three\n"]
        self.following = asyncio.Event()
        self.more = asyncio.Event()

    async def logs(self, pod: Object, options: LogOptions) -> AsyncIterator[bytes]:
        if options.previous:
            name = pod["metadata"]["name"]
            raise KubeletError(f'previous terminated container "{options.container}" in pod "{name}" not found')
        lines = self.log if options.tail_lines is None else self.log[-options.tail_lines :]
        for line in lines:
            yield line
        if options.follow:
            self.following.set()
            await self.more.wait()
            yield b"four\n"

    async def execute(self, pod: Object, options: ExecOptions, session: Session) -> int:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*options.command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        tasks = [
            asyncio.create_task(_copy(process.stdout, session.write_stdout)),
            asyncio.create_task(_copy(process.stderr, session.write_stderr)),
        ]
        feeder = asyncio.create_task(_feed(session, process.stdin)) if options.stdin else None
        try:
            await asyncio.gather(*tasks)
            return await process.wait()
        finally:
            if feeder is not None:
                feeder.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def connect(self, pod: Object, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port)


async def _copy(reader: asyncio.StreamReader, write: Callable[[bytes], Awaitable[None]]) -> None:
    while data := await reader.read(65536):
        await write(data)


async def _feed(session: Session, writer: asyncio.StreamWriter) -> None:
    while data := await session.read_stdin():
        writer.write(data)
        await writer.drain()
    writer.close()
