"""Keeps one stream to the control plane up: connects, and connects again whenever it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from undermesh.agent.backoff import Backoff
from undermesh.agent.control import ControlPlane, ControlPlaneError

log = logging.getLogger(__name__)

_SETTLED_SECONDS: Final = 5.0  # a stream that lived this long resets the back-off


async def keep_up(
    what: str,
    control: ControlPlane,
    backoff: Backoff,
    stream: Callable[[], Awaitable[None]],
    on_end: Callable[[str], None],
) -> None:
    """Runs `stream` for ever, one after the other.

    Args:
        what: names the stream in the log.
        stream: one stream from its beginning to its end.
        on_end: called with the reason after each.
    """
    while True:
        began = time.monotonic()
        reason = await _one(what, control, stream)
        if time.monotonic() - began > _SETTLED_SECONDS:
            backoff.reset()
        on_end(reason)
        await asyncio.sleep(backoff.next())


async def _one(what: str, control: ControlPlane, stream: Callable[[], Awaitable[None]]) -> str:
    """Why the stream ended, in words for the API."""
    try:
        await stream()
    except grpc.aio.AioRpcError as error:
        return str(control.explain(error))
    except ControlPlaneError as error:
        return str(error)
    except Exception as error:  # whatever it was, enrolled pods must go on and the stream be tried again
        log.exception("the %s stream failed in an unforeseen way", what)
        return f"{type(error).__name__}: {error}; see the agent's log"
    return f"control plane {control.settings.address} ended the stream: it may be restarting"
