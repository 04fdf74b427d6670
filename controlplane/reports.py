"""The gRPC service to which agents report what each of their pods can do right now.

An answer says that every connected agent has acknowledged state which contains the report, so that a caller
can go on to the next step of make-before-break. An agent that does not answer is waited for
`ANSWER_SECONDS` only: its peers must not be held up by a dead node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from undermesh.controlplane import errors
from undermesh.controlplane.authorisation import Agent, Authoriser, refuse
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.discovery import Hub
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.publisher import Publisher, Ticket
from undermesh.controlplane.report_book import ReportBook
from undermesh.controlplane.streams import run_both
from undermesh.proto import report_pb2, report_pb2_grpc

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0


@dataclass
class _Stream:
    """The newest report of a stream that has not been answered."""

    agent: Agent
    sequence: int = 0
    answered: int = 0
    ticket: Ticket | None = None


class ReportService(report_pb2_grpc.ReportsServicer):
    """Records reports and answers once they are published."""

    def __init__(
        self,
        *,
        book: ReportBook,
        authoriser: Authoriser,
        cluster: Callable[[], Cluster],
        publisher: Publisher,
        hub: Hub,
        metrics: Metrics,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._book = book
        self._authoriser = authoriser
        self._cluster = cluster
        self._publisher = publisher
        self._hub = hub
        self._metrics = metrics
        self._answer_seconds = answer_seconds

    # The reader-writer form of grpc.aio, which the stubs do not know.
    async def Report(  # type: ignore[override]
        self,
        requests: AsyncIterator[report_pb2.NodeReport],
        context: grpc.aio.ServicerContext[Any, report_pb2.ReportAnswer],
    ) -> None:
        """Runs one node's stream."""
        try:
            agent = await self._authoriser.agent(context.invocation_metadata())
        except errors.NotAuthorised as error:
            await refuse(context, "report stream", error)
        # Tells the agent that it was let in, before the first answer can be given.
        await context.send_initial_metadata(())
        stream = _Stream(agent)
        work = asyncio.Event()
        self._book.opened(agent.node)
        self._metrics.reporting_nodes.set(self._book.open_nodes())
        try:
            await run_both(self._read(stream, work, requests), self._answer(stream, work, context))
        except (errors.BadRequest, errors.NotAuthorised) as error:
            await refuse(context, f"report of node {agent.node}", error)
        finally:
            self._book.closed(agent.node)
            self._metrics.reporting_nodes.set(self._book.open_nodes())

    async def _read(self, stream: _Stream, work: asyncio.Event, requests: AsyncIterator[report_pb2.NodeReport]) -> None:
        async for report in requests:
            self._record(stream, report)
            work.set()

    def _record(self, stream: _Stream, report: report_pb2.NodeReport) -> None:
        node = stream.agent.node
        self._authoriser.still(stream.agent)
        if report.node != node:
            raise errors.BadRequest(f"the report is about node {report.node!r}, the token is of {node}")
        if report.sequence <= stream.sequence:
            raise errors.BadRequest(f"sequence {report.sequence} follows {stream.sequence}: it has to grow")
        self._book.record(node, report)
        if strangers := self._book.strangers(node, self._cluster()):
            log.warning("node %s reports pods that do not run there, ignored: %s", node, ", ".join(strangers))
        stream.sequence = report.sequence
        stream.ticket = self._publisher.poke()

    async def _answer(
        self,
        stream: _Stream,
        work: asyncio.Event,
        context: grpc.aio.ServicerContext[Any, report_pb2.ReportAnswer],
    ) -> None:
        while True:
            await work.wait()
            work.clear()
            if stream.ticket is None or stream.sequence == stream.answered:
                continue
            sequence = stream.sequence
            generation = await self._publisher.contains(stream.ticket)
            late = await self._hub.seen_by_all(generation, self._answer_seconds)
            if late:
                self._metrics.report_timeouts.inc(len(late))
                log.warning(
                    "report %d of node %s counts as published though these nodes did not acknowledge it: %s",
                    sequence,
                    stream.agent.node,
                    ", ".join(late),
                )
            await context.write(report_pb2.ReportAnswer(published_sequence=sequence))
            stream.answered = sequence
