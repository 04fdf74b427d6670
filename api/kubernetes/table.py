"""The last known state of one resource, kept in step with lists and watch events. Pure, no I/O.

A new list is compared with the state: what it lacks has been deleted, what is equal has not changed. So a
list after a gap costs consumers nothing but the difference. Lists are read without a resourceVersion, which
makes the server answer with what is true now: one that lags behind cannot bring the deleted back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from undermesh.api.changes import Snapshot
from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes.resources import Resource
from undermesh.api.problems import Problem


class _HeadMeta(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""


class _Head(msgspec.Struct):
    metadata: _HeadMeta


_HEAD: Final = msgspec.json.Decoder(_Head)


class _Meta(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def uid(self) -> str: ...


class Kept(Protocol):
    """What can be kept: anything with Kubernetes' metadata."""

    @property
    def metadata(self) -> _Meta: ...


T = TypeVar("T", bound=Kept)


class Row(NamedTuple, Generic[T]):
    """One item of a list, decoded: the object or what stands for it, and what is wrong with it."""

    key: ObjectKey
    object: T | None
    problem: Problem | None


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
        self._objects: dict[ObjectKey, T] = {}
        self._problems: dict[ObjectKey, Problem] = {}
        self._snapshot: Snapshot[ObjectKey, T] = Snapshot({})
        self._touched: set[ObjectKey] = set()
        self._replaced = False
        """Since the snapshot: which entries have changed, and whether a list took the place of all."""

    @property
    def problems(self) -> Iterable[Problem]:
        """Objects that are not in the state as they are on the server."""
        return self._problems.values()

    def snapshot(self) -> Snapshot[ObjectKey, T]:
        """The state by key; the same one until something changes, and then one that knows what."""
        if self._replaced:
            self._snapshot = Snapshot(self._objects)
        elif self._touched:
            self._snapshot = self._snapshot.after({key: self._objects.get(key) for key in self._touched})
        self._touched, self._replaced = set(), False
        return self._snapshot

    def read(self, items: Iterable[msgspec.Raw]) -> list[Row[T]]:
        """Decode a part of a list, for `replace`; each item by itself.

        Raises:
            DecodeError: an item names no object at all.
        """
        return [self._row(self._head(data), data) for data in map(bytes, items)]

    def replace(self, rows: Iterable[Row[T]], version: str) -> bool:
        """Take a complete list; True if that changes the state."""
        objects: dict[ObjectKey, T] = {}
        problems: dict[ObjectKey, Problem] = {}
        for key, obj, problem in rows:
            if obj is not None:
                objects[key] = self._kept_or(key, obj)
            if problem is not None:
                problems[key] = problem
        changed = (objects, problems) != (self._objects, self._problems)
        self._objects, self._problems = objects, problems
        self.version = version
        self.listed = True
        self._replaced |= changed
        return changed

    def apply(self, kind: str, data: bytes) -> bool:
        """Take one event: ADDED, MODIFIED, DELETED or BOOKMARK. True if that changes the state.

        Raises:
            DecodeError: the event names no object at all.
        """
        head = self._head(data, named=kind != "BOOKMARK")
        if kind == "BOOKMARK":
            changed = False
        elif kind == "DELETED":
            changed = self._put(Row(ObjectKey(head.namespace, head.name), None, None))
        else:
            changed = self._put(self._row(head, data))
        self.version = head.resource_version or self.version
        return changed

    def _put(self, row: Row[T]) -> bool:
        key, obj, problem = row
        if (obj, problem) == (self._objects.get(key), self._problems.get(key)):
            return False
        self._touched.add(key)
        if obj is None:
            self._objects.pop(key, None)
        else:
            self._objects[key] = self._kept_or(key, obj)
        if problem is None:
            self._problems.pop(key, None)
        else:
            self._problems[key] = problem
        return True

    def _row(self, head: _HeadMeta, data: bytes) -> Row[T]:
        """The object, or what stands for it with the problem beside it."""
        try:
            obj = self.resource.decode(data)
        except DecodeError as error:
            return self._unreadable(ObjectKey(head.namespace, head.name), head.uid, data, error)
        return Row(ObjectKey(obj.metadata.namespace, obj.metadata.name), obj, None)

    def _unreadable(self, key: ObjectKey, uid: str, data: bytes, error: DecodeError) -> Row[T]:
        left = self._objects.get(key)
        if left is not None and left.metadata.uid == uid:
            outcome = "what it was before stays in force"
        else:
            left = self.resource.stand_in(data)
            outcome = "the strictest policy that it may be is in force" if left is not None else "it is left out"
        message = f"{error.message}; {outcome} until it is mended"
        return Row(key, left, Problem(self._server, message, subject=f"{self.resource.kind} {key}", field=error.field))

    def _kept_or(self, key: ObjectKey, obj: T) -> T:
        """The object that is there already, if the new one says the same: consumers may compare by identity."""
        old = self._objects.get(key)
        return old if old is not None and old == obj else obj

    def _head(self, data: bytes, *, named: bool = True) -> _HeadMeta:
        """`named`: whether it is an object; that of a bookmark has nothing but a version."""
        try:
            head = _HEAD.decode(data).metadata
        except (msgspec.DecodeError, RecursionError) as error:
            raise DecodeError(f"an object without metadata ({error})", subject=self.resource.kind) from error
        if named and not head.name:
            raise DecodeError("an object without metadata.name", subject=self.resource.kind)
        return head
