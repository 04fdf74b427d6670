"""The kubelet's questions to the agent, as its probes ask them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

import pytest

from undermesh.agent.api import AgentState, Api


class Agent:
    """What the API asks of an agent for these paths."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def unready(self) -> str:
        return self.reason


async def ask(run_dir: Path, question: str) -> tuple[int, str]:
    command = [sys.executable, "-S", "-m", "undermesh.agent.probe", question, str(run_dir)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode is not None
    return process.returncode, err.decode().strip()


@pytest.mark.parametrize(
    ("reason", "question", "expected"),
    [
        ("", "ready", (0, "")),
        ("no network configuration", "ready", (1, "no network configuration")),
        ("no network configuration", "live", (0, "")),
        ("", "nonsense", (1, "404: Not Found")),
    ],
)
async def test_the_answer_is_the_exit_code_and_its_reason(
    tmp_path: Path, reason: str, question: str, expected: tuple[int, str]
) -> None:
    api = Api(cast(AgentState, Agent(reason)))
    await api.start(tmp_path / "agent.sock")
    try:
        assert await ask(tmp_path, question) == expected
    finally:
        await api.stop()


async def test_an_agent_that_is_not_there_is_an_answer_too(tmp_path: Path) -> None:
    code, text = await ask(tmp_path, "live")
    assert code == 1 and text.startswith(f"the agent does not answer at {tmp_path}/agent.sock: ")
