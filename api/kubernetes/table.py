"""The last known state of one resource, kept in step with lists and watch events. Pure, no I/O.

A new list is compared with the state: what it lacks has been deleted, what is equal has not changed. So a
list after a gap costs consumers nothing but the difference. Lists are read without a resourceVersion, which
makes the server answer with what is true now: one that lags behind cannot bring the deleted back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Generic, TypeVar

import msgspec

from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes.resources import Resource
from undermesh.api.problems import Problem

T = TypeVar("T")


class _HeadMeta(msgspec.Struct, rename="camel"):
    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""


class _Head(msgspec.Struct):
    metadata: _HeadMeta


_HEAD: Final = msgspec.json.Decoder(_Head)


class _Row(msgspec.Struct, Generic[T]):
    uid: str
    object: T | None
    problem: Problem | None = None


class Table(Generic[T]):
    """Objects of one resource by key.

    Args:
        resource: What is kept.
        server: Where it comes from, for problems.
    """

    def __init__(self, resource: Resource[T], server: str) -> None:
        self.resource = resource
        self.version = ""
        """From where a watch goes on; empty: a list is needed."""
        self.listed = False
        """It has been complete once."""
        self._server = server
        self._rows: dict[ObjectKey, _Row[T]] = {}
        self._snapshot: dict[ObjectKey, T] | None = {}

    @property
    def problems(self) -> Iterable[Problem]:
        """Objects that are not in the state as they are on the server."""
        return [row.problem for row in self._rows.values() if row.problem is not None]

    def snapshot(self) -> Mapping[ObjectKey, T]:
        """The state by key, sorted; the same object until something changes."""
        if self._snapshot is None:
            self._rows = dict(sorted(self._rows.items()))
            self._snapshot = {key: row.object for key, row in self._rows.items() if row.object is not None}
        return self._snapshot

    def read(self, items: Iterable[msgspec.Raw]) -> list[tuple[ObjectKey, _Row[T]]]:
        """Decode a part of a list, for `replace`; each item by itself.

        Raises:
            DecodeError: an item names no object at all.
        """
        return [self._row(bytes(item)) for item in items]

    def replace(self, rows: Iterable[tuple[ObjectKey, _Row[T]]], version: str) -> bool:
        """Take a complete list; True if that changes the state."""
        fresh = {key: self._kept_or(key, row) for key, row in rows}
        changed = fresh.keys() != self._rows.keys() or any(row is not self._rows[key] for key, row in fresh.items())
        self._rows = fresh
        self.version = version
        self.listed = True
        if changed:
            self._snapshot = None
        return changed

    def apply(self, kind: str, data: bytes) -> bool:
        """Take one event: ADDED, MODIFIED, DELETED or BOOKMARK. True if that changes the state.

        Raises:
            DecodeError: the event names no object at all.
        """
        head = self._head(data)
        changed = kind != "BOOKMARK" and self._apply(kind, head, data)
        self.version = head.resource_version or self.version
        return changed

    def _apply(self, kind: str, head: _HeadMeta, data: bytes) -> bool:
        key = ObjectKey(head.namespace, head.name)
        old = self._rows.get(key)
        if kind == "DELETED":
            self._rows.pop(key, None)
            changed = old is not None
        else:
            self._rows[key] = self._kept_or(key, self._decoded(key, head, data))
            changed = self._rows[key] is not old
        if changed:
            self._snapshot = None
        return changed

    def _row(self, data: bytes) -> tuple[ObjectKey, _Row[T]]:
        head = self._head(data)
        key = ObjectKey(head.namespace, head.name)
        return key, self._decoded(key, head, data)

    def _decoded(self, key: ObjectKey, head: _HeadMeta, data: bytes) -> _Row[T]:
        """The object, or what stands for it with the problem beside it."""
        try:
            return _Row(head.uid, self.resource.decode(data))
        except DecodeError as error:
            cause = error
        old = self._rows.get(key)
        if old is not None and old.object is not None and old.uid == head.uid:
            left, outcome = old.object, "what it was before stays in force"
        elif (stand_in := self.resource.stand_in(data)) is not None:
            left, outcome = stand_in, "the strictest policy that it may be is in force until it is mended"
        else:
            left, outcome = None, "it is left out until it is mended"
        subject = f"{self.resource.kind} {key}"
        problem = Problem(self._server, f"{cause.message}; {outcome}", subject=subject, field=cause.field)
        return _Row(head.uid, left, problem)

    def _kept_or(self, key: ObjectKey, row: _Row[T]) -> _Row[T]:
        """The row that is there already, if the new one says the same: consumers may compare by identity."""
        old = self._rows.get(key)
        return old if old == row else row

    def _head(self, data: bytes) -> _HeadMeta:
        try:
            return _HEAD.decode(data).metadata
        except (msgspec.DecodeError, RecursionError) as error:
            raise DecodeError(f"an object without metadata.name ({error})", subject=self.resource.kind) from error
