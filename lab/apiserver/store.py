"""The objects, one version counter over all of them, and for each resource the recent changes for watches.

Writes are plain calls on one event loop, so each is atomic. What is stored is never modified afterwards: readers and
watchers share it, and its JSON is made once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

from undermesh.lab.apiserver.errors import Object, expired

Key = tuple[str, str]
"""Namespace (empty when cluster-scoped) and name."""

HISTORY = 8192
"""Changes kept per resource; a watch from before them gets 410."""


class Stored:
    """One object at one version, with its JSON."""

    __slots__ = ("_lines", "_raw", "obj", "version")

    def __init__(self, obj: Object, version: int) -> None:
        self.obj = obj
        self.version = version
        self._raw: bytes | None = None
        self._lines: dict[str, bytes] = {}

    @property
    def raw(self) -> bytes:
        """The object as JSON."""
        if self._raw is None:
            self._raw = msgspec.json.encode(self.obj)
        return self._raw

    def line(self, op: str) -> bytes:
        """The object as an event of a watch, made once for all watchers."""
        found = self._lines.get(op)
        if found is None:
            found = self._lines[op] = b'{"type":"%s","object":%s}\n' % (op.encode(), self.raw)
        return found


class Op(Enum):
    """What happened to an object, in the words of a watch."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Change:
    """One write. `new` of a deletion is the last state with the version of the deletion."""

    op: Op
    version: int
    key: Key
    new: Stored
    old: Stored | None


class Log:
    """The recent changes of one resource, numbered from the first one ever."""

    def __init__(self, start_version: int, limit: int) -> None:
        self._changes: deque[Change] = deque()
        self._limit = limit
        self._first = 0
        self.compacted = start_version
        """Changes up to this version are no longer here."""
        self._waiters: set[asyncio.Event] = set()

    @property
    def end(self) -> int:
        """The number that the next change will have."""
        return self._first + len(self._changes)

    def append(self, change: Change) -> None:
        self._changes.append(change)
        while len(self._changes) > self._limit:
            self._drop()
        for waiter in self._waiters:
            waiter.set()

    def compact(self, version: int) -> None:
        """Forget all changes; later watches start at `version` at the earliest."""
        while self._changes:
            self._drop()
        self.compacted = max(self.compacted, version)

    def _drop(self) -> None:
        self.compacted = self._changes.popleft().version
        self._first += 1

    def after(self, version: int) -> int:
        """The number of the first change after `version`. Raises ApiError 410 when it is gone."""
        if version < self.compacted:
            raise expired(f"too old resource version: {version} ({self.compacted})")
        low, high = 0, len(self._changes)
        while low < high:
            middle = (low + high) // 2
            if self._changes[middle].version <= version:
                low = middle + 1
            else:
                high = middle
        return self._first + low

    def since(self, number: int) -> list[Change]:
        """Changes from that number on. Raises ApiError 410 when they are gone."""
        if number < self._first:
            raise expired("The resourceVersion for the provided watch is too old.")
        skipped = number - self._first
        length = len(self._changes)
        if skipped >= length:
            return []
        if skipped < length // 2:
            return list(self._changes)[skipped:]
        recent = []
        for change in reversed(self._changes):
            recent.append(change)
            if len(recent) == length - skipped:
                break
        recent.reverse()
        return recent

    def subscribe(self, waiter: asyncio.Event) -> None:
        """`waiter` is set at each change."""
        self._waiters.add(waiter)

    def unsubscribe(self, waiter: asyncio.Event) -> None:
        self._waiters.discard(waiter)


class Journal(Protocol):
    """Where writes are kept over a restart."""

    def record(self, resource: str, key: Key, version: int, stored: Stored | None) -> None: ...


class Store:
    """All objects by resource (`pods`, `deployments.apps`)."""

    def __init__(self, *, history: int = HISTORY, journal: Journal | None = None) -> None:
        self.version = 1
        self._base = 1
        self._history = history
        self._tables: dict[str, dict[Key, Stored]] = {}
        self._logs: dict[str, Log] = {}
        self._observers: list[Callable[[str, Change], None]] = []
        self._journal = journal

    def restore(self, resource: str, key: Key, stored: Stored) -> None:
        """Put back an object read from the journal, without a change."""
        self._tables.setdefault(resource, {})[key] = stored
        self.advance(stored.version)

    def advance(self, version: int) -> None:
        """What happened up to `version` is not known to this process."""
        self.version = self._base = max(self.version, version)

    def observe(self, observer: Callable[[str, Change], None]) -> None:
        """Call `observer` after each write with the resource and the change."""
        self._observers.append(observer)

    def get(self, resource: str, key: Key) -> Stored | None:
        return self._tables.get(resource, {}).get(key)

    def resources(self) -> Iterator[str]:
        """Resources that have or had objects."""
        return iter(tuple(self._tables))

    def items(self, resource: str, namespace: str = "") -> list[Stored]:
        """The objects in order of namespace and name; of one namespace if given."""
        table = self._tables.get(resource, {})
        return [table[key] for key in sorted(table) if not namespace or key[0] == namespace]

    def names(self, resource: str, namespace: str) -> list[Key]:
        return [key for key in self._tables.get(resource, {}) if key[0] == namespace]

    def log(self, resource: str) -> Log:
        """The changes of a resource."""
        if resource not in self._logs:
            self._logs[resource] = Log(self._base, self._history)
        return self._logs[resource]

    def put(self, resource: str, key: Key, obj: Object) -> Stored:
        """Write `obj`, which is the store's from now on, and give it the next version."""
        table = self._tables.setdefault(resource, {})
        log = self.log(resource)
        old = table.get(key)
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        stored = Stored(obj, self.version)
        table[key] = stored
        change = Change(Op.MODIFIED if old else Op.ADDED, self.version, key, stored, old)
        self._publish(resource, log, change, stored)
        return stored

    def remove(self, resource: str, key: Key) -> Stored:
        """Delete; the last state carries the version of the deletion."""
        log = self.log(resource)
        old = self._tables[resource].pop(key)
        self.version += 1
        last = dict(old.obj)
        last["metadata"] = {**old.obj["metadata"], "resourceVersion": str(self.version)}
        stored = Stored(last, self.version)
        self._publish(resource, log, Change(Op.DELETED, self.version, key, stored, old), None)
        return stored

    def _publish(self, resource: str, log: Log, change: Change, kept: Stored | None) -> None:
        if self._journal is not None:
            self._journal.record(resource, change.key, change.version, kept)
        log.append(change)
        for observer in self._observers:
            observer(resource, change)

    def compact(self) -> None:
        """Forget all history now: watches and continue tokens from before get 410."""
        self._base = self.version
        for log in self._logs.values():
            log.compact(self.version)
