"""What ztunnel counts of each pod, asked for all pods at once: pods that leave together ask together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from undermesh.proto import node_pb2 as wire


class PodStatsBook:
    """Answers many askers with few dumps.

    Args:
        dump: asks ztunnel.
    """

    def __init__(self, dump: Callable[[wire.DumpKind.ValueType], Awaitable[wire.DumpReply]]) -> None:
        self._dump = dump
        self._asking = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, wire.PodStats]] | None = None

    async def of(self, uid: str) -> wire.PodStats:
        """A pod's counts as of a moment after this call; zeros for a pod that ztunnel does not know.

        Raises:
            ZtunnelAway: nobody can tell.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask(), name="pod stats")
            # An answer that all who asked have given up on is nobody's failure.
            self._next.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        # Shielded: others wait for it too.
        stats = await asyncio.shield(self._next)
        return stats.get(uid) or wire.PodStats(uid=uid)

    async def _ask(self) -> Mapping[str, wire.PodStats]:
        async with self._asking:
            self._next = None  # whoever asks from now on wants what comes after
            reply = await self._dump(wire.DumpKind.PODS)
        return {stats.uid: stats for stats in reply.pods.pods}
