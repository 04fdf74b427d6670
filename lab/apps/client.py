"""The client of the lab: talks to the servers as it is told, and reports what became of it.

It listens on a Unix socket for JSON lines and answers each, in any order, with the same "id":

open    {name, kind, host, port}  connect, and exchange messages at a steady pace until told to close
report  {}                        the state of every conversation that was opened
close   {name}                    end one: half-close, and the server's end must follow
once    {kind, host, port, count, timeout}  connect, exchange `count` messages, close

kind is http, greeter or sink (see server.py). Every message carries a sequence number or a running checksum
and the token; an answer that does not match is an error like a reset.

Usage: client.py SOCKET TOKEN
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from typing import Any

PACE = 0.05
"""Seconds between two messages of an open conversation."""
ANSWER = 8.0
"""Seconds in which a message must be answered."""
FRAME = 64 << 10
"""Bytes in one message to the sink."""
BULK = 8
"""Messages to the sink for one to another server, in a short conversation."""


class MismatchError(Exception):
    """The server answered something else than it should."""


class Conversation:
    """One connection to a server, and how it went."""

    def __init__(self, kind: str, host: str, port: int, token: str) -> None:
        self.kind, self.host, self.port, self.token = kind, host, port, token
        self.exchanges = 0
        self.sent = 0
        self.received = 0
        self.seen_as: str | None = None
        self.error: str | None = None
        self.connect_seconds = 0.0
        self.longest_wait = 0.0
        self.open = False
        self.closing = False
        self._digest = hashlib.sha256()

    async def connect(self) -> None:
        """Connect, and hear the greeter's greeting."""
        started = time.monotonic()
        self._reader, self._writer = await asyncio.open_connection(self.host, self.port)
        self.connect_seconds = time.monotonic() - started
        self.open = True
        if self.kind == "greeter":
            greeting = json.loads(await self._line())
            self._check(greeting["token"], self.token)
            self._see(greeting["client"])

    async def exchange(self) -> None:
        """One message there and its answer back."""
        started = time.monotonic()
        async with asyncio.timeout(ANSWER):
            await {"http": self._get, "greeter": self._echo, "sink": self._frame}[self.kind]()
        self.exchanges += 1
        self.longest_wait = max(self.longest_wait, time.monotonic() - started)

    async def close(self) -> None:
        """End our direction; the server must end its own without a further byte."""
        self._writer.write_eof()
        async with asyncio.timeout(ANSWER):
            rest = await self._reader.read(1)
        self._check(rest, b"")
        self._writer.close()
        self.open = False

    def abandon(self, error: BaseException) -> None:
        """Note what went wrong, and drop the connection."""
        self.error = f"{type(error).__name__}: {error}"
        if self.open:
            self._writer.transport.abort()
        self.open = False

    def report(self) -> dict[str, Any]:
        """What the controller wants to know."""
        return {name: value for name, value in vars(self).items() if name != "token" and name[0] != "_"}

    async def _get(self) -> None:
        path = f"/{self.exchanges}"
        self._send(f"GET {path} HTTP/1.1\r\nHost: shop\r\nX-Token: {self.token}\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        body = await self._reader.readexactly(int(length.split(b":")[1]))
        self.received += len(head) + len(body)
        answer = json.loads(body)
        self._check((answer["path"], answer["token"]), (path, self.token))
        self._see(answer["client"])

    async def _echo(self) -> None:
        self._send(f"{self.exchanges} {self.token}\n".encode())
        self._check(await self._line(), f"{self.token} {self.exchanges} {self.token}\n".encode())

    async def _frame(self) -> None:
        unit = f"{self.exchanges} {self.token} ".encode()
        data = (unit * (FRAME // len(unit) + 1))[:FRAME]
        self._digest.update(data)
        self._send(len(data).to_bytes(4, "big") + data)
        answer = await self._reader.readexactly(32)
        self.received += len(answer)
        self._check(answer, self._digest.digest())

    def _send(self, data: bytes) -> None:
        self._writer.write(data)
        self.sent += len(data)

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the server closed the connection")
        self.received += len(line)
        return line

    def _see(self, address: str) -> None:
        self.seen_as = address.removeprefix("::ffff:")

    @staticmethod
    def _check(got: object, wanted: object) -> None:
        if got != wanted:
            raise MismatchError(f"got {got!r:.80}, not {wanted!r:.80}")


ERRORS = (OSError, EOFError, MismatchError, ValueError, TimeoutError, asyncio.IncompleteReadError)


class Client:
    """Carries out the controller's orders."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._open: dict[str, Conversation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One controller's connection; orders run side by side."""
        async with asyncio.TaskGroup() as group:
            async for line in reader:
                group.create_task(self._answer(json.loads(line), writer))

    async def _answer(self, order: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer = await getattr(self, f"do_{order['do']}")(order)
        writer.write(json.dumps({"id": order["id"], **answer}).encode() + b"\n")
        await writer.drain()

    async def do_open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Answers after the first exchange, good or bad."""
        conversation = self._conversation(order)
        self._open[order["name"]] = conversation
        try:
            await conversation.connect()
            await conversation.exchange()
        except ERRORS as error:
            conversation.abandon(error)
        else:
            self._tasks[order["name"]] = asyncio.create_task(self._keep_talking(conversation))
        return conversation.report()

    async def do_report(self, order: dict[str, Any]) -> dict[str, Any]:
        """All conversations by name."""
        return {"conversations": {name: each.report() for name, each in self._open.items()}}

    async def do_close(self, order: dict[str, Any]) -> dict[str, Any]:
        """The final report of one conversation."""
        conversation = self._open.pop(order["name"])
        conversation.closing = True
        if task := self._tasks.pop(order["name"], None):
            await task
        if conversation.open:
            try:
                await conversation.close()
            except ERRORS as error:
                conversation.abandon(error)
        return conversation.report()

    async def do_once(self, order: dict[str, Any]) -> dict[str, Any]:
        """A short conversation from beginning to end; "seconds" until the first answer, or until it failed."""
        conversation = self._conversation(order)
        started = time.monotonic()
        first_answer = None
        try:
            async with asyncio.timeout(order["timeout"]):
                await conversation.connect()
                for _ in range(order["count"] * (BULK if order["kind"] == "sink" else 1)):
                    await conversation.exchange()
                    first_answer = first_answer or time.monotonic()
                await conversation.close()
        except ERRORS as error:
            conversation.abandon(error)
        return {**conversation.report(), "seconds": (first_answer or time.monotonic()) - started}

    def _conversation(self, order: dict[str, Any]) -> Conversation:
        return Conversation(order["kind"], order["host"], order["port"], self._token)

    async def _keep_talking(self, conversation: Conversation) -> None:
        try:
            while not conversation.closing:
                await asyncio.sleep(PACE)
                await conversation.exchange()
        except ERRORS as error:
            conversation.abandon(error)


async def main(path: str, token: str) -> None:
    """Serve controllers until killed."""
    server = await asyncio.start_unix_server(Client(token).serve, path)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
