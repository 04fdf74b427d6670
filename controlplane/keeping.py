"""Where reports are kept, and who else must have passed them on before an agent is answered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from undermesh.controlplane.report_book import ReportBook
from undermesh.proto import report_pb2

Revision = int
"""Grows with every report that is kept, of whatever node; what came first has the smaller one."""


@dataclass(frozen=True)
class ReportStream:
    """One agent's stream of reports. Its id tells it from the node's streams before and after it."""

    node: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class Keeping(Protocol):
    """Keeps reports for all replicas of the control plane. What is kept appears in the book."""

    async def start(self) -> None:
        """Returns when the book holds what all nodes reported so far."""
        ...

    async def keep(self, stream: ReportStream, report: report_pb2.NodeReport) -> Revision:
        """Returns when the report is kept and in the book.

        Raises:
            Superseded: a later stream of the node has reported.
        """
        ...

    async def superseded(self, stream: ReportStream) -> NoReturn:
        """Waits. Raises Superseded when a later stream of the node has reported."""
        ...

    async def seen_elsewhere(self, revision: Revision, seconds: float) -> list[str]:
        """Waits until the agents of every other replica have acknowledged what holds `revision`, or so long.

        Returns the replicas that did not make it.
        """
        ...

    async def forget(self, nodes: Iterable[str]) -> None:
        """Nobody will report for these nodes any more."""
        ...

    def jobs(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Endless jobs."""
        ...

    async def close(self) -> None:
        """The replica stops: nobody is to wait for it."""
        ...


class OwnKeeping:
    """For a control plane that is the only one: the book's own file."""

    def __init__(self, book: ReportBook) -> None:
        self._book = book

    async def start(self) -> None:
        return None

    async def keep(self, stream: ReportStream, report: report_pb2.NodeReport) -> Revision:
        self._book.record(stream.node, report)
        return 0

    async def superseded(self, stream: ReportStream) -> NoReturn:
        while True:
            await asyncio.Event().wait()

    async def seen_elsewhere(self, revision: Revision, seconds: float) -> list[str]:
        return []

    async def forget(self, nodes: Iterable[str]) -> None:
        for node in nodes:
            self._book.forget(node)

    def jobs(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return ()

    async def close(self) -> None:
        return None
