"""A copy of a resource's objects that follows the server: list once, then watch.

After a broken watch it resumes at the last resourceVersion that it saw; when the server no longer has that one
(410), it lists again and reports the differences, so a change may be skipped but never the last state.
https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping, ValuesView
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any

import msgspec

from undermesh.lab.client.client import Client, selectors
from undermesh.lab.client.errors import ClientError, Expired, Unreachable, from_status
from undermesh.lab.client.resources import Object, Resource

_log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
"""Seconds between attempts: doubled after each failure, with jitter."""
_WATCH_SECONDS = (300, 600)
"""How long the server keeps one watch; random, so that watches do not all end at once."""

_lines: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list)

Key = tuple[str, str]
"""Namespace (empty if there is none) and name."""
Index = Callable[[Object], Iterable[Hashable]]
"""The values under which an object shall be found."""


class ChangeType(Enum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


@dataclass(frozen=True)
class Change:
    """What happened to one object."""

    type: ChangeType
    old: Object | None
    """None when it is new."""
    new: Object | None
    """None when it is deleted: the last state is `old`."""

    @property
    def obj(self) -> Object:
        """The latest state."""
        obj = self.new if self.new is not None else self.old
        assert obj is not None
        return obj


Handler = Callable[[Change], None]


class Informer:
    """Follows the objects of one resource; an async context manager that is entered when they are listed.

    Args:
        client: stays the caller's to close.
        namespace: empty for all.
        indexes: by name, what `by` finds objects by.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
        indexes: Mapping[str, Index] | None = None,
    ) -> None:
        self.resource = resource
        self._client = client
        self._namespace = namespace
        self._labels = label_selector
        self._fields = field_selector
        self._objects: dict[Key, Object] = {}
        self._index_of = dict(indexes or {})
        self._indexed: dict[str, dict[Hashable, dict[Key, Object]]] = {name: {} for name in self._index_of}
        self._handlers: list[Handler] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self._listed = asyncio.Event()
        self._version = ""
        self._removed: set[str] = set()
        """The uids of objects whose deletion was answered and has not come by watch."""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Informer:
        """Returns when the objects are listed, however long the server is away."""
        self.start()
        try:
            await self.synced()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin to follow, without waiting."""
        if self._task is None:
            self._task = asyncio.create_task(self._follow(), name=f"informer {self.resource.plural}")
            self._task.add_done_callback(_report_end)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def synced(self) -> None:
        """Wait until the objects were listed once. Raises what ended the informer, if something did."""
        assert self._task is not None, "the informer is not started"
        listed = asyncio.create_task(self._listed.wait())
        try:
            await asyncio.wait({listed, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listed.cancel()
        if self._task.done():
            self._task.result()

    def get(self, name: str, namespace: str = "") -> Object | None:
        """The object as last seen, or None."""
        return self._objects.get((namespace, name))

    def items(self) -> ValuesView[Object]:
        """All objects; take a list of it before awaiting."""
        return self._objects.values()

    def by(self, index: str, value: Hashable) -> list[Object]:
        """The objects that the index finds under `value`."""
        return list(self._indexed[index].get(value, {}).values())

    def add_handler(self, handler: Handler) -> None:
        """Call `handler` for each object that is there, then for each change. It must not raise."""
        self._handlers.append(handler)
        for obj in list(self._objects.values()):
            handler(Change(ChangeType.ADDED, None, obj))

    def subscribe(self) -> asyncio.Queue[Change]:
        """A queue that gets what a handler would."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self.add_handler(queue.put_nowait)
        return queue

    async def changed(self) -> None:
        """Wait for the next change of any object."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def absorb(self, obj: Object) -> None:
        """Take in what an own write was answered with, before the watch brings it: what is read next is not older.

        For informers without selectors only.
        """
        if _version(obj) > int(self._version or 0):
            self._store(_key(obj), obj)

    def absorb_removal(self, obj: Object) -> None:
        """As `absorb`, for an object that is gone for good; `obj` is any state of it."""
        key = _key(obj)
        there = self._objects.get(key)
        if there is not None and there["metadata"]["uid"] == obj["metadata"]["uid"]:
            self._removed.add(obj["metadata"]["uid"])
            self._forget(key, there)

    async def _follow(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                pause = _FIRST_PAUSE
            except Expired as error:
                _log.info("%s are listed again: %s", self.resource.plural, error)
                self._version = ""
            except ClientError as error:
                _log.warning("%s are not followed for now: %s", self.resource.plural, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _list(self) -> None:
        found, version = await self._client.list(
            self.resource, self._namespace, label_selector=self._labels, field_selector=self._fields
        )
        there = {_key(obj): obj for obj in found}
        for key, old in list(self._objects.items()):
            if key not in there and _version(old) <= int(version):
                self._forget(key, old)
        for key, obj in there.items():
            self._store(key, obj)
        self._removed &= {obj["metadata"]["uid"] for obj in found}
        self._version = version
        self._listed.set()

    async def _watch(self) -> None:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),
            **selectors(self._labels, self._fields),
        }
        path = self.resource.path(self._namespace)
        async with self._client.stream(path, query) as pieces:
            async for events in _events(pieces, f"watch {path}"):
                for event in events:
                    self._take(event, path)

    def _take(self, event: Any, path: str) -> None:
        kind, obj = event["type"], event["object"]
        if kind == "ERROR":
            raise from_status(f"watch {path}", obj)
        if kind != "BOOKMARK":
            if kind == "DELETED":
                self._removed.discard(obj["metadata"]["uid"])
                self._forget(_key(obj), obj)
            else:
                self._store(_key(obj), obj)
        self._version = obj["metadata"]["resourceVersion"]

    def _store(self, key: Key, obj: Object) -> None:
        old = self._objects.get(key)
        if obj["metadata"]["uid"] in self._removed or (old is not None and _version(old) >= _version(obj)):
            return
        if old is not None and old["metadata"]["uid"] != obj["metadata"]["uid"]:
            self._forget(key, old)
            old = None
        self._unindex(key, old)
        self._objects[key] = obj
        for name, index in self._index_of.items():
            for value in index(obj):
                self._indexed[name].setdefault(value, {})[key] = obj
        self._report(Change(ChangeType.ADDED if old is None else ChangeType.MODIFIED, old, obj))

    def _forget(self, key: Key, last: Object) -> None:
        old = self._objects.get(key)
        if old is None or old["metadata"]["uid"] != last["metadata"]["uid"]:
            return
        del self._objects[key]
        self._unindex(key, old)
        self._report(Change(ChangeType.DELETED, last, None))

    def _unindex(self, key: Key, old: Object | None) -> None:
        if old is None:
            return
        for name, index in self._index_of.items():
            for value in index(old):
                under = self._indexed[name].get(value, {})
                under.pop(key, None)
                if not under:
                    self._indexed[name].pop(value, None)

    def _report(self, change: Change) -> None:
        for handler in self._handlers:
            handler(change)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


async def _events(pieces: AsyncIterator[bytes], request: str) -> AsyncIterator[list[Any]]:
    """The events of a watch, as many at once as came together."""
    rest = b""
    async for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            try:
                yield _lines.decode(b"[" + b",".join(whole.split(b"\n")) + b"]")
            except msgspec.DecodeError as error:
                raise Unreachable(f"{request}: an event is no JSON: {error}") from error


def _version(obj: Object) -> int:
    """Of one resource they compare as numbers, so that the newer of two states is known."""
    return int(obj["metadata"]["resourceVersion"])


def _report_end(task: asyncio.Task[None]) -> None:
    """An informer that ends by itself is a defect of a handler or of this module: never go stale in silence."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.critical("%s ended: its objects are stale from now on", task.get_name(), exc_info=error)


def _key(obj: Object) -> Key:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
