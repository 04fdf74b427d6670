"""Tells the control plane what each pod of this node can do, and learns when all of the mesh knows.

reporter = Reporter(control, node="node-a") task = asyncio.create_task(reporter.run()) number =
reporter.update([PodReport(uid, report_pb2.ACCEPTS_TUNNELS), ...])   # the full list, at once async with
asyncio.timeout(30): await reporter.wait_published(number)   # every connected agent has acknowledged it
reporter.status()                           # for the API

Numbers grow over reconnects; the newest list is sent again on each new stream, so nothing that was waited
for is lost. A list that a newer one replaced before it was sent counts as published with the newer one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from undermesh.agent import streams
from undermesh.agent.backoff import Backoff
from undermesh.agent.control import ControlPlane
from undermesh.proto import report_pb2, report_pb2_grpc

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PodReport:
    """One pod: its uid, what it can do, and why it is not enrolled though it should be."""

    uid: str
    state: report_pb2.PodState.ValueType
    error: str = ""


@dataclass(frozen=True)
class ReportStatus:
    """For the API. Numbers are those of `update`."""

    connected: bool
    error: str | None
    reported: int
    published: int


@dataclass(frozen=True)
class ReportSettings:
    """Times in seconds."""

    backoff_first: float = 0.05
    backoff_limit: float = 15.0


class Reporter:
    """One per agent. Methods belong to one event loop."""

    def __init__(self, control: ControlPlane, *, node: str, settings: ReportSettings | None = None) -> None:
        self._control = control
        self._node = node
        self._settings = settings or ReportSettings()
        self._pods: tuple[PodReport, ...] = ()
        self._roots: tuple[str, ...] = ()
        self._number = 0  # of the newest list; 0: nothing to report yet
        self._published = 0
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()
        self._connected = False
        self._error: str | None = "not connected yet"

    def update(self, pods: Iterable[PodReport]) -> int:
        """Replaces the list; returns its number for `wait_published`. An equal list keeps its number.

        The first call is what starts reporting: before it the control plane keeps what an earlier agent of
        this node said.
        """
        listed = tuple(sorted(pods, key=lambda pod: pod.uid))
        if listed != self._pods or self._number == 0:
            self._pods = listed
            self._number += 1
            self._changed.set()
        return self._number

    def trusts(self, roots: Iterable[str]) -> None:
        """The roots by which ztunnel verifies peers from now on: SHA-256 in hex."""
        listed = tuple(sorted(roots))
        if listed == self._roots:
            return
        self._roots = listed
        if self._number:
            self._number += 1
            self._changed.set()

    async def wait_published(self, number: int) -> None:
        """Returns when the list of this number, or a newer one, is known to every connected agent (or the
        control plane gave up on those that are not answering). Waits without end: bound it."""
        while self._published < number:
            await self._progress.wait()

    def status(self) -> ReportStatus:
        """Whether the stream is up, and if not, why."""
        error = None if self._connected else self._error
        return ReportStatus(self._connected, error, self._number, self._published)

    async def run(self) -> None:
        """Connects, and again whenever the stream ends, until cancelled."""
        while self._number == 0:
            await self._changed.wait()
            self._changed.clear()
        backoff = Backoff(self._settings.backoff_first, self._settings.backoff_limit)
        await streams.keep_up("report", self._control, backoff, self._stream, self._lost)

    def _lost(self, reason: str) -> None:
        if self._connected or reason != self._error:
            log.warning("no report stream: %s", reason)
        self._connected, self._error = False, reason

    async def _stream(self) -> None:
        sent: dict[int, int] = {}  # sequence of this stream -> number
        async with self._control.channel() as channel:
            call = report_pb2_grpc.ReportsStub(channel).Report(None, metadata=self._control.metadata())
            sender = asyncio.create_task(self._send(call, sent.__setitem__), name="reports")
            try:
                await call.wait_for_connection()
                self._connected = True
                async for answer in call:
                    self._answered(answer.published_sequence, sent)
            finally:
                call.cancel()
                sender.cancel()
                # Why the stream ended is what receiving raises.
                await asyncio.gather(sender, return_exceptions=True)

    async def _send(
        self,
        call: grpc.aio.StreamStreamCall[report_pb2.NodeReport, report_pb2.ReportAnswer],
        note: Callable[[int, int], None],
    ) -> None:
        sequence = 0
        sent = 0
        while True:
            if self._number > sent:
                sequence, sent = sequence + 1, self._number
                note(sequence, sent)
                await call.write(self._report(sequence))
            self._changed.clear()
            if self._number == sent:
                await self._changed.wait()

    def _report(self, sequence: int) -> report_pb2.NodeReport:
        pods = [report_pb2.PodReport(uid=pod.uid, state=pod.state, error=pod.error) for pod in self._pods]
        return report_pb2.NodeReport(node=self._node, sequence=sequence, pods=pods, roots=self._roots)

    def _answered(self, sequence: int, sent: dict[int, int]) -> None:
        numbers = [sent.pop(known) for known in sorted(sent) if known <= sequence]
        self._published = max([self._published, *numbers])
        self._progress.set()
        self._progress = asyncio.Event()
