"""The living replicas of the control plane, each known by a Lease that it renews, and what each has acknowledged.

Nobody's clock is compared with another's: a replica is taken for dead when its lease has not changed for
`LIVE_SECONDS` by the observer's own clock, while the observer saw its own lease change in the same watch. Its
agents reconnect to another one, which brings them up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec

from undermesh.api.decode import DecodeError
from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.api.kubernetes.resources import Resource
from undermesh.api.kubernetes.table import Table
from undermesh.api.kubernetes.watching import Listener, endless_watch
from undermesh.controlplane.kubernetes.complaint import Complaint
from undermesh.controlplane.kubernetes.objects import Meta
from undermesh.controlplane.signal import Signal

log = logging.getLogger(__name__)

PREFIX: Final = "undermesh-replica-"
ACKNOWLEDGED: Final = "undermesh.io/acknowledged"
RENEW_SECONDS: Final = 3.0
LIVE_SECONDS: Final = 10.0
FORGET_SECONDS: Final = 60.0
"""After which the lease of a dead replica is deleted by whoever sees it."""


class _Lease(msgspec.Struct, frozen=True):
    metadata: Meta

    @property
    def acknowledged(self) -> int:
        return int((self.metadata.annotations or {}).get(ACKNOWLEDGED, "0"))


_DECODER: Final = msgspec.json.Decoder(_Lease)


def _decode(data: bytes) -> _Lease:
    try:
        lease = _DECODER.decode(data)
        _ = lease.acknowledged
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    return lease


class Replicas:
    """This replica's lease, and its view of the others'.

    Args:
        api: The server.
        namespace: Of the leases.
        identity: Of this replica; no other process may have it at the same time.
    """

    def __init__(self, api: Api, namespace: str, identity: str) -> None:
        self._api = api
        self._namespace = namespace
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._own = PREFIX + identity
        self._identity = identity
        self._table = Table(Resource("Lease", self._path, _decode), api.server)
        self._moved = Signal()
        self._seen: dict[str, tuple[str, float]] = {}
        """Lease -> its last version and when that was first seen."""
        self._acknowledged = 0
        self._due = asyncio.Event()
        """The lease is to be written at once."""
        self._complaint = Complaint(log)

    async def acknowledged(self, revision: int, seconds: float) -> list[str]:
        """Waits until every other living replica has acknowledged `revision`, or so long; who has not.

        While the API server cannot be seen, nothing is known and no time-out runs.
        """
        deadline = time.monotonic() + seconds
        while True:
            late = self._behind(revision)
            if not self._in_touch() and self._others():
                late, deadline = ["another"], time.monotonic() + seconds
            left = deadline - time.monotonic()
            if not late or left <= 0:
                return [f"those of replica {name.removeprefix(PREFIX)}" for name in late]
            # A replica may die without a change that would wake us.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 1.0)):
                    await self._moved.wait()

    def acknowledge(self, revision: int) -> None:
        """All agents that are connected here have acknowledged `revision`."""
        self._acknowledged = max(self._acknowledged, revision)
        if self._living():
            self._due.set()

    def jobs(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """The watch, and the renewal of the own lease."""
        return (self._watch, self._keep_alive)

    async def leave(self) -> None:
        """Deletes the own lease."""
        try:
            async with asyncio.timeout(2):
                await self._api.request("DELETE", f"{self._path}/{self._own}")
        except (errors.ApiError, TimeoutError) as error:
            log.info("lease %s stays for %.0f s: %s", self._own, FORGET_SECONDS, error)

    async def _watch(self) -> None:
        listener = Listener(changed=self._changed, failed=self._failed, recovered=self._complaint.end)
        await endless_watch(self._api, self._table, listener)

    async def _keep_alive(self) -> None:
        while True:
            await self._renew()
            await self._forget_dead()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._due.wait()
            self._due.clear()

    async def _renew(self) -> None:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self._identity, "leaseDurationSeconds": int(LIVE_SECONDS), "renewTime": now}
        metadata: dict[str, Any] = {"annotations": {ACKNOWLEDGED: str(self._acknowledged)}}
        try:
            try:
                body: dict[str, Any] = {"metadata": metadata, "spec": spec}
                path = f"{self._path}/{self._own}"
                await self._api.request("PATCH", path, body=body, content_type=MERGE_PATCH)
            except errors.NotFound:
                metadata |= {"name": self._own, "namespace": self._namespace}
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
                await self._api.request("POST", self._path, body=body)
        except errors.ApiError as error:
            self._complaint.say(f"lease {self._own} cannot be renewed: {error}")

    async def _forget_dead(self) -> None:
        now = time.monotonic()
        for name, (_, since) in list(self._seen.items()):
            if name != self._own and now - since > FORGET_SECONDS:
                try:
                    await self._api.request("DELETE", f"{self._path}/{name}")
                except errors.NotFound:
                    continue
                except errors.ApiError as error:
                    self._complaint.say(f"lease {name} of a replica that is gone cannot be deleted: {error}")

    def _behind(self, revision: int) -> list[str]:
        return sorted(lease.metadata.name for lease in self._living() if lease.acknowledged < revision)

    def _living(self) -> list[_Lease]:
        """The other replicas' leases that have changed of late."""
        return [lease for lease in self._others() if self._age(lease.metadata.name) <= LIVE_SECONDS]

    def _others(self) -> list[_Lease]:
        return [lease for lease in self._leases() if lease.metadata.name != self._own]

    def _in_touch(self) -> bool:
        """Whether the watch has brought our own renewals of late."""
        return self._own in self._seen and self._age(self._own) <= RENEW_SECONDS + LIVE_SECONDS / 4

    def _age(self, name: str) -> float:
        """Seconds since the lease was last seen to change."""
        return time.monotonic() - self._seen[name][1]

    def _leases(self) -> list[_Lease]:
        return [lease for lease in self._table.snapshot().values() if lease.metadata.name.startswith(PREFIX)]

    def _changed(self) -> None:
        now = time.monotonic()
        seen = {}
        for lease in self._leases():
            name, version = lease.metadata.name, lease.metadata.resource_version
            old = self._seen.get(name)
            seen[name] = old if old is not None and old[0] == version else (version, now)
        if seen.keys() - self._seen.keys():
            # Somebody new wants to know how far we are.
            self._due.set()
        self._seen = seen
        self._moved.notify()

    def _failed(self, error: errors.ApiError) -> None:
        self._complaint.say(f"the other replicas cannot be seen, what was known stands: {error}")
