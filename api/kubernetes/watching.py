"""List and watch of one resource, in three layers with one failure policy each.

* `single_watch`: one request. Every failure is raised.
* `continuous_watch`: lists, then watches on and on. A watch that ended, broke off or fell silent is opened again
  where it was; one whose version is gone makes it list again.
* `endless_watch`: whatever else went wrong is reported, waited out and tried again. What was known stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import msgspec

from undermesh.api.decode import DecodeError
from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.table import Table

log = logging.getLogger(__name__)

_PAGE: Final = 500


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


_PAGES: Final = msgspec.json.Decoder(_Page)
_EVENTS: Final = msgspec.json.Decoder(_Event)
_STATUS: Final = msgspec.json.Decoder(errors.Status)


@dataclass
class Listener:
    """Who is told of what a watch does.

    Attributes:
        changed: The table's state is another.
        failed: The resource cannot be read now; what was known stands.
        recovered: It can.
    """

    changed: Callable[[], None]
    failed: Callable[[errors.ApiError], None]
    recovered: Callable[[], None]


@dataclass
class _Pace:
    """Slows down what ends at once again and again, without holding up the first time."""

    api: Api
    quick: int = 0
    began: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        self.began = time.monotonic()

    async def ended(self) -> None:
        if time.monotonic() - self.began >= self.api.timing.short_watch:
            self.quick = 0
            return
        self.quick += 1
        if self.quick > 1:
            await asyncio.sleep(self.api.timing.retry(self.quick - 1))


async def endless_watch(api: Api, table: Table[Any], listener: Listener) -> NoReturn:
    """Keeps a table in step with the server for ever, through every failure of the server or the network."""
    failures = 0
    while True:
        began = time.monotonic()
        try:
            await continuous_watch(api, table, listener)
        except errors.ApiError as error:
            failures = 1 if time.monotonic() - began > api.timing.last_retry else failures + 1
            wait = api.timing.retry(failures, error.retry_after)
            if isinstance(error, errors.NotFound) and table.resource.optional:
                wait = min(wait, api.timing.absent)
                if not table.listed:
                    # The kind is not installed: there are none of it.
                    table.replace((), "")
                    listener.changed()
            elif isinstance(error, errors.Malformed):
                table.version = ""
            listener.failed(error)
            await asyncio.sleep(wait)


async def continuous_watch(api: Api, table: Table[Any], listener: Listener) -> NoReturn:
    """Goes on from `table.version`, or lists if there is none.

    Raises:
        ApiError: any failure that listing or watching again at once would not mend.
    """
    pace = _Pace(api)
    while True:
        pace.begin()
        if not table.version and await list_into(api, table):
            listener.changed()
        try:
            async with contextlib.aclosing(single_watch(api, table, listener.recovered)) as events:
                async for event in events:
                    if _apply(table, event):
                        listener.changed()
        except errors.Gone:
            # The state stands; the list that follows is compared with it, so nothing flaps and nothing is lost.
            log.info("%s: version %s is no longer kept, listing again", table.resource.path, table.version)
            table.version = ""
        except errors.Interrupted as error:
            log.info("%s: the watch is opened again: %s", table.resource.path, error.reason)
        await pace.ended()


async def single_watch(api: Api, table: Table[Any], connected: Callable[[], None]) -> AsyncGenerator[_Event, None]:
    """The events of one watch request, until the server ends it.

    Args:
        api: The server.
        table: Its version is where the watch begins.
        connected: Called once the server has agreed.

    Raises:
        Interrupted: the watch was open and broke off, or fell silent.
        ApiError: the request failed, or the server ended the watch with an error.
    """
    resource = table.resource
    query = {
        "watch": "true",
        "resourceVersion": table.version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(random.randint(*api.timing.watch)),
        **_selection(table),
    }
    opened = False
    try:
        async with api.lines(resource.path, query) as lines:
            opened = True
            connected()
            async for line in lines:
                yield _event(line, f"GET {resource.path} (watch)")
    except errors.Unreachable as error:
        if not opened:
            raise
        raise errors.Interrupted(error.call, error.reason) from error


async def list_into(api: Api, table: Table[Any]) -> bool:
    """Replaces the table's state by a complete list; True if that changes it.

    Pages that expire while they are read (410) are replaced by one list without pages.
    """
    try:
        return await _list(api, table, _PAGE)
    except errors.Gone:
        return await _list(api, table, 0)


async def _list(api: Api, table: Table[Any], limit: int) -> bool:
    path = table.resource.path
    query = {**_selection(table), **({"limit": str(limit)} if limit else {})}
    rows: list[Any] = []
    first = not table.listed
    while True:
        data = await api.request("GET", path, query=query)
        try:
            page = _PAGES.decode(data)
            rows += table.read(page.items or ())
        except (msgspec.DecodeError, DecodeError, RecursionError) as error:
            raise errors.Malformed(f"GET {path}", str(error)) from error
        if not page.metadata.continue_:
            break
        query = {**query, "continue": page.metadata.continue_}
    if not page.metadata.resource_version:
        raise errors.Malformed(f"GET {path}", "a list without resourceVersion")
    return table.replace(rows, page.metadata.resource_version) or first


def _selection(table: Table[Any]) -> dict[str, str]:
    return {"fieldSelector": table.resource.selector} if table.resource.selector else {}


def _event(line: bytes, call: str) -> _Event:
    try:
        event = _EVENTS.decode(line)
        if event.type == "ERROR":
            raise errors.from_status(call, _STATUS.decode(event.object))
    except (msgspec.DecodeError, RecursionError) as error:
        raise errors.Malformed(call, str(error)) from error
    return event


def _apply(table: Table[Any], event: _Event) -> bool:
    try:
        return table.apply(event.type, bytes(event.object))
    except DecodeError as error:
        raise errors.Malformed(f"GET {table.resource.path} (watch)", str(error)) from error
