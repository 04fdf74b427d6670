"""The gRPC service to which agents report what each of their pods can do right now.

An answer says that every connected agent has acknowledged state which contains the report, so that a caller
can go on to the next step of make-before-break. An agent that does not answer is waited for
`ANSWER_SECONDS` only: its peers must not be held up by a dead node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from undermesh.controlplane import errors
from undermesh.controlplane.authorisation import Agent, Authoriser, refuse
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.discovery import Hub
from undermesh.controlplane.keeping import Keeping, ReportStream, Revision
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.publisher import Publisher, Ticket
from undermesh.controlplane.report_book import ReportBook
from undermesh.controlplane.streams import run_together
from undermesh.proto import report_pb2, report_pb2_grpc

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0


@dataclass
class _Stream:
    """The newest report of a stream, and how far it has come."""

    agent: Agent
    reports: ReportStream
    newest: report_pb2.NodeReport | None = None
    sequence: int = 0
    kept: _Kept | None = None
    read: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class _Kept:
    """A report that is in the book."""

    sequence: int
    revision: Revision
    ticket: Ticket


class ReportService(report_pb2_grpc.ReportsServicer):
    """Records reports and answers once they are published."""

    def __init__(
        self,
        *,
        book: ReportBook,
        keeping: Keeping,
        authoriser: Authoriser,
        cluster: Cluster,
        publisher: Publisher,
        hub: Hub,
        metrics: Metrics,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._book = book
        self._keeping = keeping
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
        stream = _Stream(agent, ReportStream(agent.node))
        self._book.opened(agent.node)
        self._metrics.reporting_nodes.set(self._book.open_nodes())
        try:
            await run_together(
                self._read(stream, requests),
                self._keep(stream),
                self._answer(stream, context),
                self._keeping.superseded(stream.reports),
            )
        except (errors.BadRequest, errors.NotAuthorised) as error:
            await refuse(context, f"report of node {agent.node}", error)
        except errors.Superseded as error:
            log.warning("report stream of node %s ends: %s", agent.node, error)
            await context.abort(grpc.StatusCode.ABORTED, "a later stream of this node has reported: report anew")
        finally:
            self._book.closed(agent.node)
            self._metrics.reporting_nodes.set(self._book.open_nodes())

    async def _read(self, stream: _Stream, requests: AsyncIterator[report_pb2.NodeReport]) -> None:
        async for report in requests:
            self._check(stream, report)
            stream.newest, stream.sequence = report, report.sequence
            stream.read.set()

    def _check(self, stream: _Stream, report: report_pb2.NodeReport) -> None:
        node = stream.agent.node
        self._authoriser.still(stream.agent)
        if report.node != node:
            raise errors.BadRequest(f"the report is about node {report.node!r}, the token is of {node}")
        if report.sequence <= stream.sequence:
            raise errors.BadRequest(f"sequence {report.sequence} follows {stream.sequence}: it has to grow")

    async def _keep(self, stream: _Stream) -> None:
        """Keeps the newest report; those that come meanwhile are taken together."""
        node = stream.agent.node
        while True:
            await stream.read.wait()
            stream.read.clear()
            report = stream.newest
            assert report is not None, "read is set with a report"
            revision = await self._keeping.keep(stream.reports, report)
            if strangers := self._book.strangers(node, self._cluster):
                log.warning("node %s reports pods that do not run there, ignored: %s", node, ", ".join(strangers))
            stream.kept = _Kept(report.sequence, revision, self._publisher.poke())
            stream.work.set()

    async def _answer(self, stream: _Stream, context: grpc.aio.ServicerContext[Any, report_pb2.ReportAnswer]) -> None:
        while True:
            await stream.work.wait()
            stream.work.clear()
            kept = stream.kept
            assert kept is not None, "work is set with what is kept"
            generation = await self._publisher.contains(kept.ticket)
            here, elsewhere = await asyncio.gather(
                self._hub.seen_by_all(generation, self._answer_seconds),
                self._keeping.seen_elsewhere(kept.revision, self._answer_seconds),
            )
            if late := [*here, *elsewhere]:
                self._metrics.report_timeouts.inc(len(late))
                log.warning(
                    "report %d of node %s counts as published though these nodes did not acknowledge it: %s",
                    kept.sequence,
                    stream.agent.node,
                    ", ".join(late),
                )
            await context.write(report_pb2.ReportAnswer(published_sequence=kept.sequence))
