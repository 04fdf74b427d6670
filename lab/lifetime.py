"""How a process of the lab lives: until SIGTERM or SIGINT, or until its work fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def asked_to_end() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. Call it once, inside the event loop."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    return ended


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` until a signal ends it, or it ends by itself; what it raises by itself is raised."""
    waiting, working = asyncio.create_task(asked_to_end().wait()), asyncio.create_task(work)
    await asyncio.wait({waiting, working}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
