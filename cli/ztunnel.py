"""`undermesh ztunnel ...`: what this node's ztunnel can be told to do."""

from typing import Final, Protocol

import click

from undermesh.cli import answers
from undermesh.cli.client import AgentClient

# The successor has 20 s to get ready.
_HAND_OVER_TIMEOUT: Final = 30.0


class _Context(Protocol):
    @property
    def agent(self) -> AgentClient: ...


@click.group()
def ztunnel() -> None:
    """Work on this node's ztunnel."""


@ztunnel.command("hand-over")
@click.pass_obj
def hand_over(context: _Context) -> None:
    """Replace the running ztunnel by a new process of the program that is on disk now.

    Returns when the new one accepts. The old one serves what it has open until that ends, or its grace does:
    `undermesh status` shows it.
    """
    answer, _ = context.agent.post("/v1/ztunnel/hand-over", answers.HandOver, _HAND_OVER_TIMEOUT)
    click.echo(f"ztunnel process {answer.accepting} accepts, process {answer.draining} drains")
