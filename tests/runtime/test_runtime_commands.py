"""Commands in running containers and joining their streams, on a real node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from onnode import OnNode, container, pod, script, start

from undermesh.lab.runtime.node import NodeRuntime
from undermesh.lab.runtime.types import RuntimeFault, Security

pytestmark = pytest.mark.root
HOST = pod("host", host_network=True)
# Zombies have no command line, and a first process that is no init leaves some.
LIST = ["sh", "-c", "cat /proc/[0-9]*/cmdline"]


class Client:
    """The client's end: what it sends, what it got."""

    def __init__(self, *sends: bytes) -> None:
        self.sends: asyncio.Queue[bytes] = asyncio.Queue()
        self.sizes: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.out = b""
        self.err = b""
        self._more = asyncio.Event()
        for data in sends:
            self.sends.put_nowait(data)

    async def read_stdin(self) -> bytes:
        return await self.sends.get()

    async def write_stdout(self, data: bytes) -> None:
        self.out += data
        self._more.set()

    async def write_stderr(self, data: bytes) -> None:
        self.err += data

    async def resizes(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            yield await self.sizes.get()

    async def until(self, text: bytes) -> None:
        """Wait until it was written to stdout."""
        async with asyncio.timeout(5):
            while text not in self.out:
                self._more.clear()
                await self._more.wait()


def test_a_command_runs_in_the_container_with_its_code_and_output(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[int, list[bytes]]:
        sandbox = await runtime.run_sandbox(HOST)
        config = container("sleep", "100", security=Security(user=1234), env=(("COLOUR", "red"),))
        name = await start(runtime, sandbox.id, config)
        done = await runtime.exec_sync(name, ["sh", "-c", "id -u; echo $COLOUR; echo err >&2; exit 7"], 5)
        return done.exit_code, sorted(done.output.split())

    # runc has a pipe for each stream: their order among each other is not kept.
    assert node.run(body) == (7, [b"1234", b"err", b"red"])


def test_a_command_that_takes_too_long_is_killed_with_its_children(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        with pytest.raises(RuntimeFault) as caught:
            await runtime.exec_sync(name, ["sh", "-c", "sleep 4321; true"], 0.3)
        found = await runtime.exec_sync(name, LIST, 5)
        return caught.value.reason, found.output.decode()

    reason, processes = node.run(body)
    assert reason == "DeadlineExceeded" and "4321" not in processes


def test_a_command_that_is_not_there_is_said(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        with pytest.raises(RuntimeFault) as caught:
            await runtime.execute(name, ["nonesuch"], Client(), stdin=False, tty=False)
        left = [path.name for path in Path("/run/undermesh-lab/containers", name).glob("exec-*")]
        return str(caught.value), str(left)

    message, left = node.run(body)
    assert "executable file `nonesuch` not found in $PATH" in message and left == "[]"


def test_the_clients_streams_are_the_commands(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[int, bytes, bytes]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        client = Client(b"one\n", b"two\n", b"")
        code = await runtime.execute(name, ["sh", "-c", "cat; echo oops >&2; exit 5"], client, stdin=True, tty=False)
        return code, client.out, client.err

    assert node.run(body) == (5, b"one\ntwo\n", b"oops\n")


def test_a_terminal_has_the_clients_size_and_echoes(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[int, bytes]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        client = Client()
        client.sizes.put_nowait((120, 40))
        running = asyncio.create_task(runtime.execute(name, ["sh"], client, stdin=True, tty=True))
        await client.until(b"#")
        client.sends.put_nowait(b"tty; stty size\r")
        await client.until(b"40 120")
        client.sizes.put_nowait((99, 33))
        await asyncio.sleep(0.2)
        client.sends.put_nowait(b"stty size\r")
        await client.until(b"33 99")
        client.sends.put_nowait(b"exit 9\r")
        return await running, client.out

    code, out = node.run(body)
    assert code == 9 and b"/dev/pts/0" in out and b"tty; stty size" in out


def test_a_client_that_goes_away_ends_its_command(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> str:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        client = Client()
        running = asyncio.create_task(
            runtime.execute(name, ["sh", "-c", "echo ready; sleep 4321; true"], client, stdin=False, tty=False)
        )
        await client.until(b"ready")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        found = await runtime.exec_sync(name, LIST, 5)
        return found.output.decode()

    assert "4321" not in node.run(body)


def test_attach_joins_stdin_and_output_until_the_container_ends(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> bytes:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, script("while read x; do echo got $x; done", stdin=True))
        client = Client(b"a\n", b"b\n")
        joined = asyncio.create_task(runtime.attach(name, client, stdin=True))
        await client.until(b"got b\n")
        client.sends.put_nowait(b"")
        async with asyncio.timeout(5):
            await joined
        return client.out

    assert node.run(body) == b"got a\ngot b\n"


def test_stdin_that_a_program_reads_late_arrives_whole(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> bytes:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, script("sleep 0.5; wc -c", stdin=True))
        client = Client(*[b"x" * 65536] * 32, b"")
        async with asyncio.timeout(5):
            await runtime.attach(name, client, stdin=True)
        return client.out

    assert node.run(body).strip() == b"2097152"


def test_a_container_with_a_terminal_can_be_attached_and_logs_it(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[bytes, str]:
        sandbox = await runtime.run_sandbox(HOST)
        config = script("tty; read x; stty size; echo bye", stdin=True, tty=True)
        name = await start(runtime, sandbox.id, config)
        client = Client()
        client.sizes.put_nowait((50, 20))
        joined = asyncio.create_task(runtime.attach(name, client, stdin=True))
        await asyncio.sleep(0.2)
        client.sends.put_nowait(b"go\r")
        async with asyncio.timeout(5):
            await joined
        return client.out, config.log_path.read_text()

    out, log = node.run(body)
    assert b"20 50" in out and b"bye" in out and " stdout F /dev/pts/0" in log


def test_what_has_ended_cannot_be_entered(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, script("exit 0"))
        await runtime.exits().get()
        with pytest.raises(RuntimeFault) as command:
            await runtime.exec_sync(name, ["true"], 5)
        with pytest.raises(RuntimeFault) as joining:
            await runtime.attach(name, Client(), stdin=False)
        return command.value.reason, joining.value.reason

    assert node.run(body) == ("NotRunning", "NotRunning")
