"""Further commands in a running container, by `crun exec`: children of the kubelet, and gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from undermesh.lab.runtime import oci
from undermesh.lab.runtime.shimclient import tool_path
from undermesh.lab.runtime.types import ExecResult, ExecStreams, RuntimeFault

OUTPUT_LIMIT = 10 * 1024
"""Bytes of a command's output that exec_sync returns; probes need no more."""

_CHUNK = 32 * 1024
# A background child of the command may keep the streams open; containerd gives up on them as well.
_DRAIN = 1.0
_KILL_PATIENCE = 2.0


class Command:
    """One `crun exec` in a container.

    Args:
        directory: the container's run directory, with its config.json.
        state: where crun keeps its state.
    """

    def __init__(self, container: str, directory: Path, state: Path, argv: Sequence[str], *, tty: bool) -> None:
        self._container = container
        self._argv = list(argv)
        self._base = directory / f"exec-{secrets.token_hex(8)}"
        self._state = state
        self._tty = tty
        # The name of a socket has to be short.
        self._console = state.parent / f"console-{secrets.token_hex(8)}"
        spec = json.loads((directory / "config.json").read_bytes())
        self._file("json").write_text(json.dumps(oci.exec_process(spec, argv, tty=tty)))

    @property
    def command_line(self) -> list[str]:
        """What to start."""
        line = ["crun", "--root", str(self._state), "--log", str(self._file("log")), "--log-format", "json"]
        line += ["exec", "--process", str(self._file("json")), "--pid-file", str(self._file("pid"))]
        return [*line, *(["--tty"] if self._tty else []), self._container]

    def console(self) -> tuple[socket.socket, list[str]]:
        """Where crun hands over the command's terminal, and what to start then."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(self._console))
        listener.listen(1)
        *line, container = self.command_line
        return listener, [*line, "--console-socket", str(self._console), container]

    def code(self, returned: int) -> int:
        """The command's exit code. Raises RuntimeFault: it never ran."""
        if returned != 0 and not self._file("pid").exists():
            raise RuntimeFault("ExecFailed", f"OCI runtime exec failed: {self._said() or f'exit code {returned}'}")
        return returned if returned >= 0 else 128 - returned

    def kill(self) -> bool:
        """SIGKILL the command and what it started; False if crun has not said yet what its process is."""
        try:
            pid = int(self._file("pid").read_text())
        except (FileNotFoundError, ValueError):
            return False
        _kill_tree(pid)
        return True

    def forget(self) -> None:
        """Remove its files."""
        for suffix in ("json", "log", "pid"):
            self._file(suffix).unlink(missing_ok=True)
        self._console.unlink(missing_ok=True)

    def _said(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            entries: list[dict[str, Any]] = [json.loads(line) for line in self._file("log").read_text().splitlines()]
            return next((entry["msg"] for entry in reversed(entries) if entry["level"] == "error"), "")
        return ""

    def _file(self, suffix: str) -> Path:
        return self._base.with_name(f"{self._base.name}.{suffix}")


async def run_sync(command: Command, seconds: float) -> ExecResult:
    """Run to the end. Raises RuntimeFault: DeadlineExceeded after `seconds` (0: never), ExecFailed."""
    process = await _start(command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.STDOUT)
    output = bytearray()
    reading = asyncio.ensure_future(_collect(process.stdout, output))
    try:
        async with asyncio.timeout(seconds or None):
            await process.wait()
        await asyncio.wait([reading], timeout=_DRAIN)
        return ExecResult(command.code(process.returncode or 0), bytes(output))
    except TimeoutError as error:
        raise RuntimeFault("DeadlineExceeded", f"command timed out after {seconds:g} s and was killed") from error
    finally:
        reading.cancel()
        await _end(command, process)


async def run_piped(command: Command, streams: ExecStreams, *, stdin: bool) -> int:
    """Run with the client's streams; the exit code. Cancelling kills it. Raises RuntimeFault."""
    source = asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL
    process = await _start(command, stdin=source, stderr=asyncio.subprocess.PIPE)
    outputs = [
        asyncio.ensure_future(_pump(process.stdout, streams.write_stdout)),
        asyncio.ensure_future(_pump(process.stderr, streams.write_stderr)),
    ]
    feeding = asyncio.ensure_future(_feed(process, streams)) if stdin else None
    try:
        await process.wait()
        await asyncio.wait(outputs, timeout=_DRAIN)
        return command.code(process.returncode or 0)
    finally:
        for task in (*outputs, *((feeding,) if feeding else ())):
            task.cancel()
        await _end(command, process)


async def run_tty(command: Command, streams: ExecStreams) -> int:
    """Run on a terminal of its own; the exit code. Cancelling kills it. Raises RuntimeFault."""
    listener, line = command.console()
    null = asyncio.subprocess.DEVNULL
    with listener:
        process = await asyncio.create_subprocess_exec(*line, stdin=null, stdout=null, stderr=null, env=environment())
        try:
            master = await _terminal(listener, process)
            if master is not None:
                await _use_terminal(master, process, streams)
            return command.code(process.returncode or 0)
        finally:
            await _end(command, process)


async def _terminal(listener: socket.socket, process: asyncio.subprocess.Process) -> int | None:
    """The terminal's other end; None if crun ended without one."""
    accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
    waiting = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({accepting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not accepting.done():
            await asyncio.wait({accepting}, timeout=0.1)  # it may have ended right after it handed it over
        if not accepting.done():
            return None
        connection, _ = accepting.result()
        with connection:
            await _ready(connection.fileno(), write=False)
            _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
    finally:
        accepting.cancel()
        waiting.cancel()
    if not descriptors:
        return None
    os.set_inheritable(descriptors[0], False)
    os.set_blocking(descriptors[0], False)
    return descriptors[0]


async def _use_terminal(master: int, process: asyncio.subprocess.Process, streams: ExecStreams) -> None:
    """Until the command has ended; closes `master`."""
    output = asyncio.ensure_future(_pump_terminal(master, streams))
    others = [
        asyncio.ensure_future(_feed_terminal(master, streams)),
        asyncio.ensure_future(_follow_sizes(master, streams.resizes())),
    ]
    try:
        await process.wait()
        await asyncio.wait([output], timeout=_DRAIN)
    finally:
        for task in (output, *others):
            task.cancel()
        await asyncio.gather(output, *others, return_exceptions=True)
        os.close(master)


def resize(terminal: int, columns: int, rows: int) -> None:
    """Set a terminal's size. Raises OSError."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


async def _start(command: Command, *, stdin: int, stderr: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command.command_line, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=stderr, env=environment()
    )


async def _end(command: Command, process: asyncio.subprocess.Process) -> None:
    """Kill it if it runs. crun is given the time to bury it: an orphan is a zombie until its heir looks."""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_PATIENCE):
                await _kill(command, process)
                await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        command.forget()


async def _kill(command: Command, process: asyncio.subprocess.Process) -> None:
    """As soon as crun says which process it is."""
    while True:
        if process.returncode is not None or command.kill():
            return
        await asyncio.sleep(0.01)


def environment() -> dict[str, str]:
    """Of crun."""
    return {**os.environ, "PATH": tool_path()}


async def _collect(stream: asyncio.StreamReader | None, output: bytearray) -> None:
    assert stream is not None  # it was made a pipe
    while data := await stream.read(_CHUNK):
        output += data[: OUTPUT_LIMIT - len(output)]


async def _pump(stream: asyncio.StreamReader | None, write: Any) -> None:
    assert stream is not None  # it was made a pipe
    while data := await stream.read(_CHUNK):
        await write(data)


async def _feed(process: asyncio.subprocess.Process, streams: ExecStreams) -> None:
    assert process.stdin is not None  # it was made a pipe
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while data := await streams.read_stdin():
            process.stdin.write(data)
            await process.stdin.drain()
        process.stdin.close()


async def _pump_terminal(master: int, streams: ExecStreams) -> None:
    while True:
        await _ready(master, write=False)
        try:
            data = os.read(master, _CHUNK)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.EIO:  # nobody has the other end any more
                return
            raise
        await streams.write_stdout(data)


async def _feed_terminal(master: int, streams: ExecStreams) -> None:
    while data := await streams.read_stdin():
        while data:
            try:
                data = data[os.write(master, data) :]
            except BlockingIOError:
                await _ready(master, write=True)


async def _follow_sizes(master: int, sizes: AsyncIterator[tuple[int, int]]) -> None:
    async for columns, rows in sizes:
        resize(master, columns, rows)


async def _ready(descriptor: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(descriptor, _settle, ready)
    try:
        await ready
    finally:
        remove(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _kill_tree(pid: int) -> None:
    """SIGKILL a process and its descendants; each is stopped first, so that it starts no more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        for child in _children(pid):
            _kill_tree(child)
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
