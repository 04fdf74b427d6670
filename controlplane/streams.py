"""The two halves of a bidirectional stream."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_both(reader: Coroutine[Any, Any, None], writer: Coroutine[Any, Any, None]) -> None:
    """Runs both until one ends or fails, then ends the other; raises what either raised.

    When cancelled it cancels both at once, and awaits nothing that a second cancellation could cut off.
    """
    tasks = (asyncio.create_task(reader), asyncio.create_task(writer))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
