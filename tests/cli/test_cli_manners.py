"""How the command behaves as one program among others: quick help, closed pipes, Ctrl-C, narrow terminals, much."""

import asyncio
import contextlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from fcntl import ioctl
from pathlib import Path

import pytest
from agent_stand_in import Command, serving
from aiohttp import web

from undermesh.cli.main import main

HEAVY = {
    "aiohttp",
    "asyncio",
    "grpc",
    "http.client",
    "importlib.metadata",
    "kubernetes",
    "msgspec",
    "rich",
    "ssl",
    "undermesh.cli.client",
    "undermesh.cli.output",
    "undermesh.lab",
    "yaml",
}
"""What takes longer to import than the whole of the rest."""
OUTER_LINES = 24


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after some code."""
    after = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('|'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True)
    return set(done.stderr.strip().split("|"))


def test_help_imports_nothing_that_takes_long() -> None:
    found = imported_by("from undermesh.cli.main import main; main(['--help'], prog_name='undermesh')")
    assert "undermesh.cli.main" in found
    assert found & HEAVY == set()


@pytest.mark.parametrize("verb", sorted(main.verbs))
def test_a_verbs_line_in_the_overview_belongs_to_a_verb_with_help(verb: str) -> None:
    command = main.get_command(None, verb)  # type: ignore[arg-type]
    assert command is not None
    assert command.help
    assert len(main.verbs[verb].help) <= 80


def rows(count: int) -> dict[str, object]:
    """An answer with many policies of long names."""
    return {"policies": [{"name": f"a-namespace/{'long-' * 12}{i:05}", "action": "DENY"} for i in range(count)]}


@contextlib.asynccontextmanager
async def many(run_dir: Path, count: int) -> AsyncIterator[None]:
    async with serving(run_dir / "agent.sock", {"/v1/policies": web.json_response(rows(count))}):
        yield


async def start(run_dir: Path, *arguments: str, stdout: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "undermesh.cli",
        *arguments,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "UNDERMESH_RUN_DIR": str(run_dir), "TERM": "xterm"},
        # Whoever runs tests in the background has SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("count", [1, 10_000])
async def test_a_reader_that_has_gone_ends_the_command_quietly(run_dir: Path, form: str, count: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    async with many(run_dir, count):
        process = await start(run_dir, "policies", "-o", form, stdout=writer)
        os.close(writer)
        _, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err) == (141, b"")


async def test_ten_thousand_rows_are_all_there(undermesh: Command, run_dir: Path) -> None:
    async with many(run_dir, 10_000):
        result = await undermesh("policies")
    assert len(result.out.splitlines()) == 10_001


async def test_ctrl_c_ends_the_command_quietly(run_dir: Path) -> None:
    asked = asyncio.Event()

    async def never_answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await _reader.read()
        writer.close()

    async with await asyncio.start_unix_server(never_answer, run_dir / "agent.sock"):
        process = await start(run_dir, "status", stdout=asyncio.subprocess.PIPE)
        await asyncio.wait_for(asked.wait(), 60)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out, err) == (130, b"", b"")


async def on_terminal(run_dir: Path, columns: int, *arguments: str) -> list[str]:
    """What the command shows on a terminal of a width, without its colours."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", OUTER_LINES, columns, 0, 0))
    process = await start(run_dir, *arguments, stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := await asyncio.to_thread(os.read, ours, 1 << 16):
            shown += data
    os.close(ours)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r", "").splitlines()


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    ("verb", "columns"), [*((verb, 80) for verb in ("status", "connections", "certs", "workloads")), ("status", 200)]
)
async def test_no_line_is_wider_than_the_terminal(run_dir: Path, verb: str, columns: int) -> None:
    lines = await on_terminal(run_dir, columns, verb)
    assert lines
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("verb", sorted({"connections", "edges", "policies", "certs", "workloads", "services"}))
async def test_nothing_to_show_is_said_in_words(undermesh: Command, run_dir: Path, verb: str) -> None:
    path = "connections" if verb == "edges" else verb
    async with serving(run_dir / "agent.sock", {f"/v1/{path}": web.json_response({path: []})}):
        result = await undermesh(verb)
    assert result.code == 0
    assert re.fullmatch(r"no [^\n]+\n", result.out)


@pytest.mark.parametrize("shell", ["bash", "fish"])
async def test_each_shell_has_a_completion_script(undermesh: Command, shell: str) -> None:
    result = await undermesh("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert "_UNDERMESH_COMPLETE" in result.out


def test_completion_offers_the_verbs() -> None:
    asked = {"_UNDERMESH_COMPLETE": "bash_complete", "COMP_WORDS": "undermesh st", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from undermesh.cli.main import main; main(prog_name='undermesh')"],
        capture_output=True,
        text=True,
        env={**os.environ, **asked},
    )
    assert done.stdout.split() == ["plain,status"]
