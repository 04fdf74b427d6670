"""What the verbs get from the command itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from undermesh.cli.client import AgentClient


@dataclass
class Context:
    """The options of the command itself."""

    run_dir: Path

    @cached_property
    def agent(self) -> AgentClient:
        """The agent of this node."""
        from undermesh.cli.client import AgentClient

        return AgentClient(self.run_dir)
