"""The loop that every controller is: keys in, one reconciliation of one object at a time out."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from undermesh.lab.client import Change, ClientError, Conflict, NotFound, Resource
from undermesh.lab.controllers.cluster import Cluster
from undermesh.lab.controllers.objects import Key, controller_of, key_of
from undermesh.lab.controllers.workqueue import WorkQueue

_log = logging.getLogger(__name__)

_SETTLE = 0.03
"""Seconds that a key rests after each reconciliation: changes that come together are handled together."""


class Controller(ABC):
    """One kind of object that is kept as its spec asks."""

    workers = 4

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.queue: WorkQueue[Key] = WorkQueue()
        self.watch()

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def watch(self) -> None:
        """Register with the informers what adds keys to the queue."""

    @abstractmethod
    async def sync(self, key: Key) -> None:
        """Bring one object to what its spec asks for.

        Raises ClientError: it is tried again, after a growing delay.
        """

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.workers):
                    group.create_task(self._work())
        finally:
            self.queue.close()

    def follow(self, resource: Resource, also: Callable[[Change], None] | None = None) -> None:
        """Queue each object of `resource` that changes."""

        def changed(change: Change) -> None:
            self.queue.add(key_of(change.obj))
            if also is not None:
                also(change)

        self.cluster.of(resource).add_handler(changed)

    def follow_controlled(self, resource: Resource, owner: Resource, *, orphans: bool = True) -> None:
        """Queue the owner of each object of `resource` that changes, before and after the change.

        With `orphans`, those of an owner's namespace that nothing controls wake all owners there: they may adopt it.
        """

        def changed(change: Change) -> None:
            for obj in (change.old, change.new):
                reference = controller_of(obj) if obj is not None else None
                if obj is not None and reference is not None and reference["kind"] == owner.kind:
                    self.queue.add((key_of(obj)[0], reference["name"]))
            if orphans and change.new is not None and controller_of(change.new) is None:
                for found in self.cluster.of(owner).by("namespace", key_of(change.new)[0]):
                    self.queue.add(key_of(found))

        self.cluster.of(resource).add_handler(changed)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            key = await self.queue.get()
            rest = 0.0
            try:
                await self.sync(key)
                self.queue.forget(key)
                rest = _SETTLE
            except (Conflict, NotFound) as error:
                _log.debug("%s %s/%s: seen too late: %s", self.name, *key, error)
                self.queue.retry(key)
            except ClientError as error:
                _log.warning("%s %s/%s is tried again: %s", self.name, *key, error)
                self.queue.retry(key)
            except Exception:  # noqa: BLE001 - one object that a controller cannot handle must not stop the others
                _log.exception("%s %s/%s is tried again after a defect", self.name, *key)
                self.queue.retry(key)
            finally:
                loop.call_later(rest, self.queue.done, key)
