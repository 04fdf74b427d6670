"""Keeps the board in step with the source and the nodes' reports.

Whoever changed something calls `poke` and may wait until a computation that began later has been published.
The first change is computed at once, those that come while it is being done or shortly after are taken
together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NewType

from undermesh.controlplane.board import TYPE_URLS, Board, Generation
from undermesh.controlplane.discovery import Hub
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.signal import Signal
from undermesh.controlplane.translate import Update

log = logging.getLogger(__name__)

RECOMPUTE_INTERVAL = 0.1

Ticket = NewType("Ticket", int)


class Publisher:
    """Owns the only writer of the board. `compute` returns what leads from the state that it led to before to that
    of this moment."""

    def __init__(self, board: Board, hub: Hub, compute: Callable[[], Update], metrics: Metrics) -> None:
        self._board = board
        self._hub = hub
        self._compute = compute
        self._metrics = metrics
        self._wanted = Ticket(0)
        self._done = Ticket(0)
        self._work = asyncio.Event()
        self._published = Signal()
        self._ready = asyncio.Event()

    def poke(self) -> Ticket:
        """Something changed. The ticket is for `contains`."""
        self._wanted = Ticket(self._wanted + 1)
        self._work.set()
        return self._wanted

    async def contains(self, ticket: Ticket) -> Generation:
        """Waits until what the ticket stands for is on the board; returns the board's generation then."""
        while self._done < ticket:
            await self._published.wait()
        return self._board.generation

    def allow(self) -> None:
        """Publication may begin: what there is to compute from is complete."""
        self._ready.set()

    async def run(self) -> None:
        """Recomputes on demand, for ever, once it is allowed. A failed computation is logged and the last
        good state stands."""
        await self._ready.wait()
        while True:
            await self._work.wait()
            self._work.clear()
            self.step()
            await asyncio.sleep(RECOMPUTE_INTERVAL)

    def step(self) -> None:
        """One computation and its publication."""
        ticket = self._wanted
        try:
            changed = self._board.apply(self._compute())
        except Exception:
            log.exception("the state cannot be translated: what was published last stands")
            return
        self._done = ticket
        for type_url in TYPE_URLS:
            self._metrics.resources.labels(type_url).set(len(self._board.names(type_url)))
        self._hub.changed(changed)
        self._published.notify()
