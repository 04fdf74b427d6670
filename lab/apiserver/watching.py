"""Watches: the stream of changes that one client asked for, as lines of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec

from undermesh.lab.apiserver.convert import from_storage, storage_resource
from undermesh.lab.apiserver.errors import ApiError, Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.query import ListOptions
from undermesh.lab.apiserver.store import Change, Op, Store, Stored

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
_BATCH = 500
"""Changes written at once; more would hold up the loop."""

Render = Callable[[Object], bytes] | None
"""The JSON of an object in the form that the client asked for; None: as it is."""

_PAUSE = 0.01
"""Seconds between two writes to one client: under load, changes go out together."""


def line(kind: str, obj: bytes) -> bytes:
    """One event of the stream."""
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), obj)


def _event(op: str, obj: Object, stored: Stored | None, render: Render) -> bytes:
    """One event; `stored` is given when it is the object."""
    if render is not None:
        return line(op, render(obj))
    return stored.line(op) if stored is not None else line(op, msgspec.json.encode(obj))


def error_line(error: ApiError) -> bytes:
    return line("ERROR", msgspec.json.encode(error.status()))


@dataclass(eq=False)
class _Running:
    resource: str
    wake: asyncio.Event
    ended: bool = False


@dataclass(frozen=True)
class Scope:
    """What a watch looks at."""

    kind: Kind
    namespace: str
    options: ListOptions

    def has(self, namespace: str, name: str) -> bool:
        wanted = self.options.name
        return (not self.namespace or namespace == self.namespace) and (not wanted or name == wanted)


class Watches:
    """The running watches, so that faults can end them."""

    def __init__(self, store: Store, *, bookmark_interval: float) -> None:
        self._store = store
        self._bookmark_interval = bookmark_interval
        self._running: set[_Running] = set()

    @property
    def count(self) -> int:
        return len(self._running)

    def drop(self, resource: str = "") -> int:
        """End the streams of a resource (of all if empty) at once; how many they were."""
        chosen = [running for running in self._running if resource in ("", running.resource)]
        for running in chosen:
            running.ended = True
            running.wake.set()
        return len(chosen)

    async def lines(self, scope: Scope, render: Render) -> AsyncIterator[bytes]:
        """The stream in pieces of whole lines, until the timeout, a drop, or an error that is its last line."""
        running = _Running(storage_resource(scope.kind), asyncio.Event())
        self._running.add(running)
        try:
            async for piece in self._stream(scope, render, running):
                yield piece
        finally:
            self._running.discard(running)

    async def _stream(self, scope: Scope, render: Render, running: _Running) -> AsyncIterator[bytes]:
        options = scope.options
        log = self._store.log(storage_resource(scope.kind))
        deadline = time.monotonic() + (options.timeout or random.randint(1800, 3600))
        try:
            initial = self._initial(scope, render)
            position = log.end if initial is not None else log.after(int(options.version))
        except ApiError as error:
            yield error_line(error)
            return
        sent = self._store.version
        for piece in initial or ():
            yield piece
        if options.initial_events and options.bookmarks:
            yield _bookmark(scope.kind, sent, {INITIAL_EVENTS_END: "true"})
        log.subscribe(running.wake)
        try:
            next_bookmark, written = time.monotonic() + self._bookmark_interval, 0.0
            while not running.ended:
                running.wake.clear()
                try:
                    changes = log.since(position)
                except ApiError as error:
                    yield error_line(error)
                    return
                for start in range(0, len(changes), _BATCH):
                    piece = b"".join(self._events(scope, render, changes[start : start + _BATCH]))
                    if piece:
                        yield piece
                        written = time.monotonic()
                position += len(changes)
                if position < log.end:
                    continue
                sent, now = self._store.version, time.monotonic()
                if now >= deadline:
                    break
                if options.bookmarks and now >= next_bookmark:
                    next_bookmark = now + self._bookmark_interval
                    yield _bookmark(scope.kind, sent, {})
                    continue
                limit = min(deadline, next_bookmark) if options.bookmarks else deadline
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(limit - now):
                        await running.wake.wait()
                await asyncio.sleep(max(0.0, written + _PAUSE - time.monotonic()))
            if options.bookmarks and not running.ended:
                yield _bookmark(scope.kind, sent, {})
        finally:
            log.unsubscribe(running.wake)

    def _initial(self, scope: Scope, render: Render) -> list[bytes] | None:
        """What exists, for watches that begin with it; None for those that resume."""
        options = scope.options
        if options.version not in ("", "0") and not options.initial_events:
            return None
        chosen = options.selection
        found = []
        for stored in self._store.items(storage_resource(scope.kind), scope.namespace):
            metadata = stored.obj["metadata"]
            if not scope.has(metadata.get("namespace", ""), metadata["name"]):
                continue
            obj = from_storage(stored.obj, scope.kind)
            if chosen is None or chosen(obj):
                found.append(_event("ADDED", obj, stored if obj is stored.obj else None, render))
        return [b"".join(found[start : start + _BATCH]) for start in range(0, len(found), _BATCH)]

    def _events(self, scope: Scope, render: Render, changes: list[Change]) -> list[bytes]:
        chosen, found = scope.options.selection, []
        for change in changes:
            if not scope.has(*change.key):
                continue
            obj = from_storage(change.new.obj, scope.kind)
            stored = change.new if obj is change.new.obj else None
            if chosen is None:
                found.append(_event(change.op.value, obj, stored, render))
                continue
            before = change.old is not None and chosen(from_storage(change.old.obj, scope.kind))
            after = change.op is not Op.DELETED and chosen(obj)
            if after:
                found.append(_event("MODIFIED" if before else "ADDED", obj, stored, render))
            elif before and change.op is Op.DELETED:
                found.append(_event("DELETED", obj, stored, render))
            elif before and change.old is not None:
                last = dict(from_storage(change.old.obj, scope.kind))
                last["metadata"] = {**last["metadata"], "resourceVersion": str(change.version)}
                found.append(_event("DELETED", last, None, render))
        return found


def _bookmark(kind: Kind, version: int, annotations: Object) -> bytes:
    metadata: Object = {"resourceVersion": str(version), "creationTimestamp": None}
    if annotations:
        metadata["annotations"] = annotations
    obj = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata}
    return line("BOOKMARK", msgspec.json.encode(obj))
