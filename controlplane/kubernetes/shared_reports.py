"""Reports that all replicas of the control plane share: a ConfigMap per node, and who has passed on what.

A replica stores a report before it publishes it, and every replica publishes what is stored; so any of them may
be asked, and all of them may be replaced, without a pod counting as plain in between. A report is answered when
the agents of every living replica have acknowledged what holds it. That is told by one number per replica: the
greatest resourceVersion among the stored reports that its agents have acknowledged (resourceVersions of one
resource are ordered, Kubernetes API concepts, KEP-5504). A replica that cannot store does not answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

import msgspec

from undermesh.api.changes import changes
from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes import errors as api_errors
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.resources import Resource
from undermesh.api.kubernetes.table import Table
from undermesh.api.kubernetes.watching import Listener, endless_watch
from undermesh.controlplane import errors
from undermesh.controlplane.discovery import Hub
from undermesh.controlplane.keeping import ReportStream, Revision
from undermesh.controlplane.kubernetes.complaint import Complaint
from undermesh.controlplane.kubernetes.objects import ConfigMap, Meta
from undermesh.controlplane.kubernetes.replicas import Replicas
from undermesh.controlplane.publisher import Publisher, Ticket
from undermesh.controlplane.report_book import ReportBook, reported
from undermesh.controlplane.signal import Signal
from undermesh.proto import report_pb2

log = logging.getLogger(__name__)

PREFIX: Final = "undermesh-report-"
LABELS: Final = {"app.kubernetes.io/managed-by": "undermesh"}
_LONGEST_NODE: Final = 200
_CATCH_UP_SECONDS: Final = 0.2
"""After a conflict: in which the watch brings what the other writer wrote."""


class StoredReport(msgspec.Struct, frozen=True):
    """A ConfigMap of the namespace; one that holds no report has no node."""

    metadata: Meta
    node: str = ""
    stream: str = ""
    states: dict[str, int] = {}
    """Pod uid -> report.PodState; a state that this version does not know counts as PLAIN."""
    roots: tuple[str, ...] = ()

    @property
    def revision(self) -> Revision:
        return int(self.metadata.resource_version)


_DECODER: Final = msgspec.json.Decoder(ConfigMap)


def _decode(data: bytes) -> StoredReport:
    try:
        config = _DECODER.decode(data)
        if not config.metadata.name.startswith(PREFIX):
            return StoredReport(config.metadata)
        entries = config.data or {}
        named = msgspec.json.decode(entries.get("pods", "{}"), type=dict[str, str])
        roots = msgspec.json.decode(entries.get("roots", "[]"), type=tuple[str, ...])
    except (msgspec.DecodeError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    known = report_pb2.PodState.keys()
    states: dict[str, int] = {uid: report_pb2.PodState.Value(name) for uid, name in named.items() if name in known}
    return StoredReport(config.metadata, entries.get("node", ""), entries.get("stream", ""), states, roots)


class SharedReports:
    """A `keeping.Keeping` on the API server.

    Args:
        api: The server.
        namespace: Of the ConfigMaps.
        replicas: The living replicas.
        book: Filled with what is stored.
        publisher: Told of changes.
        hub: The agents that are connected here.
        answer_seconds: How long an agent is waited for.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        replicas: Replicas,
        *,
        book: ReportBook,
        publisher: Publisher,
        hub: Hub,
        answer_seconds: float,
    ) -> None:
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/configmaps"
        self._namespace = namespace
        self._replicas = replicas
        self._book = book
        self._publisher = publisher
        self._hub = hub
        self._answer_seconds = answer_seconds
        self._table = Table(Resource("ConfigMap", self._path, _decode), api.server)
        self._taken = self._table.snapshot()
        """What of it is in the book."""
        self._moved = Signal()
        self._listed = asyncio.Event()
        self._unacknowledged = asyncio.Event()
        self._ticket = Ticket(0)
        self._wrote: set[str] = set()
        """Streams that have stored a report."""
        self._watching: asyncio.Task[NoReturn] | None = None
        self._complaint = Complaint(log)

    async def start(self) -> None:
        """Returns when the book holds all stored reports."""
        listener = Listener(changed=self._changed, failed=self._failed, recovered=self._complaint.end)
        self._watching = asyncio.create_task(endless_watch(self._api, self._table, listener))
        await self._listed.wait()

    async def keep(self, stream: ReportStream, report: report_pb2.NodeReport) -> Revision:
        """Stores the report, however long the API server takes.

        Raises:
            Superseded: a later stream of the node has stored one.
        """
        states, roots = reported(report), tuple(report.roots)
        failures = 0
        while True:
            stored = self._stored(stream.node)
            self._check(stream, stored)
            if stored is not None and (stored.stream, stored.states, stored.roots) == (stream.id, states, roots):
                return stored.revision
            try:
                revision = await self._store(stream, states, roots, stored)
            except (api_errors.Conflict, api_errors.NotFound):
                await self._next_change(_CATCH_UP_SECONDS)
                continue
            except api_errors.ApiError as error:
                failures += 1
                self._complaint.say(f"report of node {stream.node} cannot be stored, its agent waits: {error}")
                await asyncio.sleep(self._api.timing.retry(failures, error.retry_after))
                continue
            self._wrote.add(stream.id)
            while (seen := self._stored(stream.node)) is None or seen.revision < revision:
                await self._moved.wait()
            return revision

    async def superseded(self, stream: ReportStream) -> NoReturn:
        """Raises Superseded when a later stream of the node has stored a report."""
        try:
            while True:
                await self._moved.wait()
                self._check(stream, self._stored(stream.node))
        finally:
            self._wrote.discard(stream.id)

    async def seen_elsewhere(self, revision: Revision, seconds: float) -> list[str]:
        """Waits for the other living replicas."""
        return await self._replicas.acknowledged(revision, seconds)

    async def forget(self, nodes: Iterable[str]) -> None:
        """Deletes their reports; what cannot be deleted now is asked for again."""
        for node in nodes:
            stored = self._stored(node)
            if stored is None:
                self._book.forget(node)
                continue
            # Not one that was stored meanwhile.
            body = {"preconditions": {"resourceVersion": stored.metadata.resource_version}}
            try:
                await self._api.request("DELETE", f"{self._path}/{stored.metadata.name}", body=body)
            except (api_errors.Conflict, api_errors.NotFound):
                continue
            except api_errors.ApiError as error:
                self._complaint.say(f"report of node {node} cannot be deleted: {error}")

    def jobs(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """What runs beside the server."""
        return (self._acknowledge, *self._replicas.jobs())

    async def close(self) -> None:
        """Ends the watch, and tells the other replicas not to wait for this one."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._replicas.leave()

    async def _acknowledge(self) -> None:
        """Says up to which report the agents that are connected here have acknowledged."""
        while True:
            await self._unacknowledged.wait()
            self._unacknowledged.clear()
            revision = max((stored.revision for stored in self._reports()), default=0)
            generation = await self._publisher.contains(self._ticket)
            if late := await self._hub.seen_by_all(generation, self._answer_seconds):
                log.warning("reports count as seen though these nodes did not acknowledge them: %s", ", ".join(late))
            self._replicas.acknowledge(revision)

    def _changed(self) -> None:
        before, self._taken = self._taken, self._table.snapshot()
        changed = not self._listed.is_set()
        for _, old, new in changes(before, self._taken):
            if old is not None and old.node and (new is None or new.node != old.node):
                changed |= self._book.forget(old.node)
            if new is not None and new.node:
                changed |= self._book.replace(new.node, new.states, new.roots)
        if changed:
            self._ticket = self._publisher.poke()
        self._listed.set()
        self._unacknowledged.set()
        self._moved.notify()

    def _failed(self, error: api_errors.ApiError) -> None:
        self._complaint.say(f"reports of the other replicas cannot be read, what was known stands: {error}")

    def _check(self, stream: ReportStream, stored: StoredReport | None) -> None:
        if stream.id in self._wrote and stored is not None and stored.stream != stream.id:
            raise errors.Superseded(f"stream {stored.stream} has reported for node {stream.node} since")

    def _reports(self) -> list[StoredReport]:
        return [stored for stored in self._table.snapshot().values() if stored.node]

    def _stored(self, node: str) -> StoredReport | None:
        return self._table.snapshot().get(ObjectKey(self._namespace, _name(node)))

    async def _next_change(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._moved.wait()
        except TimeoutError:
            return

    async def _store(
        self, stream: ReportStream, states: dict[str, int], roots: tuple[str, ...], stored: StoredReport | None
    ) -> Revision:
        names = {uid: report_pb2.PodState.Name(state) for uid, state in states.items()}  # type: ignore[arg-type]
        metadata: dict[str, Any] = {"name": _name(stream.node), "namespace": self._namespace, "labels": LABELS}
        data = {"node": stream.node, "stream": stream.id, "pods": msgspec.json.encode(names).decode()}
        data["roots"] = msgspec.json.encode(roots).decode()
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        if stored is None:
            answer = await self._api.request("POST", self._path, body=body)
        else:
            metadata["resourceVersion"] = stored.metadata.resource_version
            answer = await self._api.request("PUT", f"{self._path}/{_name(stream.node)}", body=body)
        return _decode(answer).revision


def _name(node: str) -> str:
    """The ConfigMap's name: the node's, or its hash where that would be too long for one."""
    fits = len(node) <= _LONGEST_NODE
    return PREFIX + (node if fits else hashlib.sha256(node.encode()).hexdigest())
