"""Events as `kubectl describe` shows them, written in the background.

Equal events are one object whose count grows, as client-go's recorder does it. An event that cannot be written is
logged and lost: no component waits for its events.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from types import TracebackType

from undermesh.lab.client import times
from undermesh.lab.client.client import Client
from undermesh.lab.client.errors import ClientError, NotFound
from undermesh.lab.client.resources import EVENTS, Object

_log = logging.getLogger(__name__)

_WAITING = 2000
"""Events that may wait to be written; more are dropped."""
_REMEMBERED = 4096
"""Events that an equal one adds to."""

_Same = tuple[str, str, str, str, str]


class Recorder:
    """Writes the events of one component; an async context manager.

        recorder.event(pod, "Normal", "Pulled", "Container image already present", field_path="spec.containers{app}")

    `host` is the node of a component that has one.
    """

    def __init__(self, client: Client, component: str, *, host: str = "") -> None:
        self._client = client
        self._component = component
        self._host = host
        self._queue: asyncio.Queue[Object] = asyncio.Queue(_WAITING)
        self._written: OrderedDict[_Same, Object] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._last = 0

    async def __aenter__(self) -> Recorder:
        self._task = asyncio.create_task(self._run(), name="events")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def event(self, obj: Object, kind: str, reason: str, message: str, *, field_path: str = "", by: str = "") -> None:
        """Record that something happened to `obj`; `kind` is Normal or Warning, `by` another component's name."""
        now, component = times.now(), by or self._component
        involved = _reference(obj)
        if field_path:
            involved["fieldPath"] = field_path
        event: Object = {
            "metadata": {"namespace": involved.get("namespace", "default"), "name": self._name(involved["name"])},
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": component, **({"host": self._host} if self._host else {})},
            "reportingComponent": component,
            "reportingInstance": self._host,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            _log.warning("event %s of %s is dropped: %d others wait", reason, involved["name"], _WAITING)

    def _name(self, name: str) -> str:
        """By the time, as client-go names them; never the same twice."""
        self._last = max(time.time_ns(), self._last + 1)
        return f"{name[:200]}.{self._last:x}"

    async def _run(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                await self._write(event)
            except ClientError as error:
                _log.warning("event %s of %s is lost: %s", event["reason"], event["involvedObject"]["name"], error)

    async def _write(self, event: Object) -> None:
        involved = event["involvedObject"]
        where = involved["uid"] + involved.get("fieldPath", "")
        same = (where, event["type"], event["reason"], event["message"], event["reportingComponent"])
        before = self._written.get(same)
        if before is not None:
            try:
                await self._count(before, event)
                return
            except NotFound:
                del self._written[same]
        self._written[same] = await self._client.create(EVENTS, event)
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)

    async def _count(self, before: Object, event: Object) -> None:
        before["count"] += 1
        body = {"count": before["count"], "lastTimestamp": event["lastTimestamp"]}
        await self._client.patch(EVENTS, before["metadata"]["name"], before["metadata"]["namespace"], body)


def _reference(obj: Object) -> Object:
    metadata = obj["metadata"]
    found = {"kind": obj["kind"], "apiVersion": obj["apiVersion"], "name": metadata["name"], "uid": metadata["uid"]}
    for key in ("namespace", "resourceVersion"):
        if key in metadata:
            found[key] = metadata[key]
    return found
