"""Snapshots of all watched resources: the Kubernetes side of `undermesh.api.source.Source`.

Tasks while somebody watches: one `endless_watch` per resource. The first watcher begins them, the last one that
leaves ends them and closes the connections; the state stays and is gone on from by the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from undermesh.api.changes import changes
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.assembly import FIELDS, Assembly
from undermesh.api.kubernetes.errors import ApiError, NotFound
from undermesh.api.kubernetes.resources import Resource, for_agent, for_control_plane
from undermesh.api.kubernetes.table import Table
from undermesh.api.kubernetes.watching import Listener, endless_watch
from undermesh.api.objects import Objects
from undermesh.api.problems import Problem

log = logging.getLogger(__name__)


class KubernetesSource:
    """Objects from an API server. Single-threaded: use it in one event loop.

    Args:
        api: The server.
        resources: What is watched; the other kinds of `Objects` stay empty.
    """

    def __init__(self, api: Api, resources: Sequence[Resource[Any]]) -> None:
        self._api = api
        self._tables = {resource.kind: Table(resource, api.server) for resource in resources}
        self._failures: dict[str, Problem] = {}
        self._objects = Objects()
        self._assembly = Assembly(self._tables)
        self._errors: tuple[Problem, ...] = ()
        self._generation = 0
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watchers = 0

    @classmethod
    def of_control_plane(cls, api: Api) -> KubernetesSource:
        """Everything of the cluster."""
        return cls(api, for_control_plane())

    @classmethod
    def of_agent(cls, kubeconfig: Path | None, node: str) -> KubernetesSource:
        """What the agent of a node needs. Raises InputError when there are no usable credentials."""
        return cls(Api(Access(kubeconfig)), for_agent(node))

    @property
    def current(self) -> Objects:
        """The last good state; empty before every resource was listed once."""
        return self._objects

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What cannot be read now: resources that fail, objects that do not decode."""
        return self._errors

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """Nothing: the first state is complete, and the strictest policy stands for an unreadable one."""
        return ()

    async def watch(self) -> AsyncIterator[Objects]:
        """Yield the first complete state, then each that differs. See `Source.watch`."""
        self._enter()
        try:
            seen = 0
            while True:
                if self._generation != seen:
                    seen = self._generation
                    yield self._objects
                    continue
                self._raise_if_ended()
                await self._news.wait()
        finally:
            await self._leave()

    def _enter(self) -> None:
        self._watchers += 1
        if self._tasks:
            return
        for kind, table in self._tables.items():
            listener = Listener(self._changed, partial(self._failed, kind), partial(self._recovered, kind))
            task = asyncio.create_task(endless_watch(self._api, table, listener), name=f"watch {kind}")
            task.add_done_callback(lambda _: self._wake())
            self._tasks.append(task)

    async def _leave(self) -> None:
        self._watchers -= 1
        if self._watchers:
            return
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._api.close()

    def _raise_if_ended(self) -> None:
        """A watch ends only by a fault of ours: that must not look like a cluster in which nothing happens."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _changed(self) -> None:
        if self._timer is None and all(table.listed for table in self._tables.values()):
            delay = self._api.timing.coalesce if self._generation else 0.0
            self._timer = asyncio.get_running_loop().call_later(delay, self._publish)

    def _publish(self) -> None:
        self._timer = None
        self._report()
        objects = self._assembly.objects()
        if self._generation and not any(_differ(self._objects, objects, kind) for kind in self._tables):
            return
        self._objects = objects
        self._generation += 1
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _failed(self, kind: str, error: ApiError) -> None:
        table = self._tables[kind]
        if isinstance(error, NotFound) and table.resource.optional and not table.snapshot():
            state = "there are none until the kind is installed"
        else:
            state = "the last state stands" if table.listed else "nothing starts before this can be read"
        self._failures[kind] = Problem(self._api.server, f"{error}; {state}", subject=kind)
        self._report()

    def _recovered(self, kind: str) -> None:
        if self._failures.pop(kind, None) is not None:
            self._report()

    def _report(self) -> None:
        """Log each problem once: when it appears and when it has gone."""
        objects = [problem for table in self._tables.values() for problem in table.problems]
        fresh = tuple(sorted([*self._failures.values(), *objects]))
        for problem in sorted(set(fresh) - set(self._errors)):
            log.error("%s", problem)
        for subject in sorted({p.subject for p in self._errors} - {p.subject for p in fresh}):
            log.info("%s: in order again", subject)
        self._errors = fresh


def _differ(before: Objects, after: Objects, kind: str) -> bool:
    return any(True for _ in changes(getattr(before, FIELDS[kind]), getattr(after, FIELDS[kind])))
