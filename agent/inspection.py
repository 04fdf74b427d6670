"""Looks at all enrolled pods every few seconds, many at a time in one thread.

What a pod has in the kernel is seldom found otherwise than it should be, so a look must cost little: a thread for
each pod and each look would cost more than the looks. Rules and routes also tell of changes by themselves
(NetlinkWatch); sysctl and BPF objects do not.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from undermesh.agent import netns
from undermesh.agent.pod_worker import PodWorker

INTERVAL_S: Final = 5.0
_TICK_S: Final = 0.5


async def run(workers: Callable[[], Collection[PodWorker]]) -> None:
    """Looks at each worker's pod every `INTERVAL_S`, spread over that time, until cancelled."""
    while True:
        await asyncio.sleep(_TICK_S)
        await look_at(due(workers(), time.monotonic()))


def due(workers: Collection[PodWorker], now: float) -> list[PodWorker]:
    """The share of the pods that this tick looks at: those that were not looked at for longest."""
    old = [worker for worker in workers if worker.is_settled and worker.looked <= now - INTERVAL_S + _TICK_S]
    share = math.ceil(len(workers) * _TICK_S / INTERVAL_S)
    return sorted(old, key=lambda worker: worker.looked)[:share]


async def look_at(workers: Sequence[PodWorker]) -> None:
    """One look at each pod; a pod that is not as it should be is mended, and its worker woken.

    One on which something is being done is left out, one that cannot be looked at hinders no other.
    """
    lent = [worker for worker in workers if await worker.lend()]
    if not lent:
        return
    loop = asyncio.get_running_loop()
    running = loop.run_in_executor(netns.threads(), lambda: [worker.look() for worker in lent])
    try:
        await asyncio.shield(running)
    finally:
        # Cancelling ends no thread: nobody may touch the pods before it has ended.
        await asyncio.wait((running,))
        for worker in lent:
            worker.take_back()
    for worker, found in zip(lent, running.result(), strict=True):
        worker.judge(found)
