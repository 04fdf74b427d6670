"""A real HTTP server on a real Unix socket in place of the agent, and the real command in a process of its own."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

ANSWERS = Path(__file__).parent / "answers"


@dataclass(frozen=True)
class Result:
    """What one run of the command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Awaitable[Result]]


async def run_command(run_dir: Path, *arguments: str) -> Result:
    """Run `undermesh ARGUMENTS` on `run_dir`, its output not a terminal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "undermesh.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "UNDERMESH_RUN_DIR": str(run_dir), "COLUMNS": "40"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


def recorded(verb: str) -> object:
    """The recorded answer to a verb, as JSON values."""
    return json.loads((ANSWERS / f"{verb}.json").read_text())


@contextlib.asynccontextmanager
async def serving(socket: Path, answers: dict[str, web.Response]) -> AsyncIterator[None]:
    """An HTTP server that gives each answer once, to who asks for its path; 404 for every other."""

    async def handle(request: web.Request) -> web.Response:
        return answers.get(request.path) or web.Response(status=404)

    app = web.Application()
    app.router.add_get("/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(socket)).start()
        yield
    finally:
        await runner.cleanup()
