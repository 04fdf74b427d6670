"""Fixtures of the command's tests."""

import functools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agent_stand_in import ANSWERS, Command, recorded, run_command, serving
from aiohttp import web


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory of a short name: a Unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="um-cli-") as name:
        yield Path(name)


@pytest.fixture
def undermesh(run_dir: Path) -> Command:
    """Runs the command on `run_dir`."""
    return functools.partial(run_command, run_dir)


@pytest.fixture
async def agent(run_dir: Path) -> AsyncIterator[None]:
    """An agent that answers every verb as recorded."""
    answers = {f"/v1/{path.stem}": web.json_response(recorded(path.stem)) for path in ANSWERS.glob("*.json")}
    async with serving(run_dir / "agent.sock", answers):
        yield
