"""Lane attested between ztunnel, which decides, and the kernel: verdicts in, counts and open pairs out."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final, TypeVar

from undermesh.agent.attested_lane import AttestedLane, Pair
from undermesh.agent.bpf.layout import PairCounts
from undermesh.agent.features import Check
from undermesh.agent.ztunnel_session import ZtunnelAway, ZtunnelRefused
from undermesh.proto import node_pb2 as wire

log = logging.getLogger(__name__)

COUNTS_INTERVAL_S: Final = 2.0
_RECHECK_ROUNDS: Final = 5
_PAIRS_PER_FRAME: Final = 1000
_AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"

T = TypeVar("T")
Tell = Callable[[wire.AgentFrame], Awaitable[None]]


class LaneFeed:
    """Follows the ztunnel that accepts. Off, it closes the lane once and does nothing more.

    Args:
        wanted: the setting.
        fault: why this node cannot have the lane; empty: it can.
        tell: one frame to the ztunnel that accepts.
    """

    def __init__(self, lane: AttestedLane, *, wanted: bool, fault: str, tell: Tell) -> None:
        self._lane = lane
        self._wanted = wanted
        self._fault = fault
        self._tell = tell
        self._ending: set[asyncio.Task[int]] = set()
        self._serving = asyncio.Event()
        self._asked = -1  # how many pods had joined when ztunnel was last asked about open pairs
        self._reported: set[Pair] = set()
        self._refusals: dict[str, str] = {}  # by pod uid
        lane.close()

    @property
    def enabled(self) -> bool:
        return self._wanted and not self._fault

    def check(self) -> Check:
        """One line of `undermesh check`."""
        state = "on" if self.enabled else "off"
        reason = "" if self.enabled else f": {self._fault}" if self._wanted else ": --lane-attested is off"
        if self.enabled and self._refusals:
            uid, why = next(iter(self._refusals.items()))
            reason = f", not for {len(self._refusals)} pods, as {uid}: {why}"
        return Check(
            "lane attested",
            not self._wanted or not self._fault,
            f"{state}{reason}",
            "boot a kernel with CONFIG_INET_DIAG_DESTROY, or set --lane-attested=off",
        )

    # === what the link tells ===

    def on_serving(self, serving: bool) -> None:
        """Another ztunnel accepts, or none does: what the one before said holds no more."""
        if not self.enabled:
            return
        if serving:
            self._asked = -1
            self._reported.clear()
            self._lane.open()
            self._serving.set()
        else:
            self._lane.close()
            self._serving.clear()

    def on_verdict(self, verdict: wire.Verdict) -> None:
        """From the ztunnel that accepts, in the order in which it came to them."""
        if not self.enabled:
            return
        try:
            pair = _from_wire(verdict.pair)
        except ValueError as e:
            log.error("a verdict of ztunnel cannot be read, it counts for nothing: %s", e)
            return
        if verdict.decision == wire.Decision.ALLOW:
            if refusal := self._lane.allow(pair):
                log.debug("pods %s and %s keep to the tunnel: %s", pair.caller, pair.pod, refusal)
                self._refusals[pair.caller] = refusal
            else:
                self._refusals.pop(pair.caller, None)
            return
        self._lane.withdraw(pair)
        if verdict.decision != wire.Decision.WITHDRAW:
            task = asyncio.create_task(asyncio.to_thread(self._forbid, pair, verdict.reason), name="lane attested")
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _forbid(self, pair: Pair, reason: str) -> int:
        ended = self._lane.forbid(pair)
        if ended:
            log.info(
                "%d attested connections of %s to %s:%d are ended: %s",
                ended,
                pair.source,
                pair.destination,
                pair.port,
                reason,
            )
        return ended

    # === changes of what decides ===

    @contextlib.asynccontextmanager
    async def changing(self, changes: Iterable[tuple[str, str]], workloads: Iterable[str]) -> AsyncIterator[None]:
        """While ztunnel takes in resources that may forbid something, no verdict holds; and before it counts as taken
        in, what they forbid has ended.

        Args:
            changes: type URL and name of each resource.
            workloads: the names of this node's pods among them.
        """
        ours = set(workloads)
        decisive = self.enabled and any(kind == _AUTHORIZATION or name in ours for kind, name in changes)
        if decisive:
            self._lane.suspend()
        try:
            yield
        finally:
            if decisive:
                self._lane.resume()
        if self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    # === counts ===

    async def run(self) -> None:
        """Feeds ztunnel's metrics until cancelled."""
        if not self.enabled:
            return
        rounds = 0
        while True:
            await self._serving.wait()
            rounds += 1
            if rounds % _RECHECK_ROUNDS == 0:
                await asyncio.to_thread(self._lane.recheck)
            try:
                await self.feed()
            except (ZtunnelAway, ZtunnelRefused) as e:
                log.debug("the counts of lane attested wait for ztunnel: %s", e)
            await asyncio.sleep(COUNTS_INTERVAL_S)

    async def feed(self) -> None:
        """Tells a new ztunnel which pairs are open, and any what has been counted.

        Raises:
            ZtunnelAway: none accepts.
            ZtunnelRefused: it does not take them.
        """
        joined = self._lane.joined
        if joined != self._asked:
            pairs = await asyncio.to_thread(self._lane.pairs)
            for part in _parts([_to_wire(pair) for pair in pairs]):
                await self._tell(wire.AgentFrame(attested_open=wire.AttestedOpen(pairs=part)))
            self._asked = joined
        counted = await asyncio.to_thread(self._lane.counts)
        known = {pair for pair, _ in counted if pair in self._reported or self._lane.is_created(pair)}
        for first in (True, False):
            for some in _parts([_counts(pair, counts) for pair, counts in counted if (pair in known) is not first]):
                await self._tell(wire.AgentFrame(attested_counts=wire.AttestedCounts(pairs=some, first=first)))
        self._reported = {pair for pair, _ in counted}


def _parts(items: list[T]) -> list[list[T]]:
    return [items[start : start + _PAIRS_PER_FRAME] for start in range(0, len(items), _PAIRS_PER_FRAME)]


def _counts(pair: Pair, counts: PairCounts) -> wire.PairCounts:
    return wire.PairCounts(
        pair=_to_wire(pair),
        opened=counts.opened,
        closed=counts.closed,
        failed=counts.failed,
        sent=counts.sent,
        received=counts.received,
    )


def _to_wire(pair: Pair) -> wire.Pair:
    return wire.Pair(
        source_uid=pair.caller,
        destination_uid=pair.pod,
        source=pair.source.packed,
        destination=pair.destination.packed,
        port=pair.port,
    )


def _from_wire(pair: wire.Pair) -> Pair:
    source, destination = ipaddress.ip_address(pair.source), ipaddress.ip_address(pair.destination)
    return Pair(pair.source_uid, pair.destination_uid, source, destination, pair.port)
