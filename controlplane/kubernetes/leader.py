"""One of several replicas at a time does a work: election by a Lease (coordination.k8s.io/v1).

Nobody's clock is compared with another's. A candidate takes a lease over when it has seen no change of it for
the whole of its duration, by the candidate's own clock; the leader stops when it could not renew for the renewal
deadline, by its own clock and counted from before the last renewal that succeeded was sent. The deadline is shorter
than the duration, so the old one stops before a new one can begin, whatever their clocks say. The times in the
lease are for people.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import msgspec

from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.api import Api
from undermesh.controlplane.kubernetes.complaint import Complaint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseTiming:
    """Times in seconds; Kubernetes' own components use the same.

    Raises:
        ValueError: the deadline is not shorter than the duration.
    """

    duration: int = 15
    deadline: float = 10.0
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not self.retry < self.deadline < self.duration:
            raise ValueError(f"retry < deadline < duration does not hold for {self}")


class _Meta(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Spec(msgspec.Struct, rename="camel", omit_defaults=True):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Lease(msgspec.Struct):
    metadata: _Meta
    spec: _Spec = msgspec.field(default_factory=_Spec)


_LEASES: Final = msgspec.json.Decoder(_Lease)


class LeaderElection:
    """Candidacy of one replica.

    Args:
        api: The server.
        namespace: Of the lease.
        name: Of the lease.
        identity: Of this replica; no two may have the same.
        timing: How fast.
    """

    def __init__(self, api: Api, namespace: str, name: str, identity: str, timing: LeaseTiming | None = None) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._timing = timing or LeaseTiming()
        self._seen: _Spec | None = None
        self._seen_at = 0.0
        self._version = ""
        self._renewed_at = 0.0
        self._complaint = Complaint(log)
        self.leading = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> NoReturn:
        """Runs `work` whenever this replica leads, and cancels it when it no longer does.

        An error of `work` is raised, after the lease was given up for another replica to try.
        """
        while True:
            await self._acquire()
            self._complaint.end()
            log.info("leading as %s by lease %s/%s", self._identity, self._namespace, self._name)
            self.leading = True
            try:
                await self._lead(work)
            finally:
                self.leading = False
            log.warning("lost the lease %s/%s: another replica writes now", self._namespace, self._name)

    async def _lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Works until the lease is lost."""
        job = asyncio.ensure_future(work())
        renewal = asyncio.ensure_future(self._renew_until_lost())
        try:
            await asyncio.wait((job, renewal), return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                job.result()
                raise RuntimeError("the leader's work has ended by itself")
            renewal.result()
        finally:
            lost = renewal.done()
            for task in (job, renewal):
                task.cancel()
            await asyncio.gather(job, renewal, return_exceptions=True)
            if not lost:
                await self._release()

    async def _renew_until_lost(self) -> None:
        while True:
            await asyncio.sleep(min(self._timing.retry, self._left()))
            try:
                async with asyncio.timeout(self._left()):
                    if not await self._renew():
                        return
            except TimeoutError:
                log.warning("lease %s/%s was not renewed in time", self._namespace, self._name)
                return
            except errors.ApiError as error:
                self._complain("is not renewed yet", error)

    def _left(self) -> float:
        return max(0.0, self._renewed_at + self._timing.deadline - time.monotonic())

    async def _acquire(self) -> None:
        while True:
            if await self._try_to_acquire():
                return
            await asyncio.sleep(self._timing.retry)

    async def _try_to_acquire(self) -> bool:
        """One attempt; False when somebody else leads, or it cannot be told."""
        began = time.monotonic()
        try:
            lease = await self._get()
            if lease is None:
                await self._write("POST", self._collection, self._spec(transitions=0))
            else:
                self._observe(lease)
                if not self._free(lease.spec):
                    return False
                ours = lease.spec.holder_identity == self._identity
                transitions = (lease.spec.lease_transitions or 0) + (0 if ours else 1)
                await self._write("PUT", self._path, self._spec(transitions=transitions))
        except errors.Conflict:
            return False
        except errors.ApiError as error:
            self._complain("cannot be taken", error)
            return False
        self._renewed_at = began
        return True

    async def _renew(self) -> bool:
        """One renewal; False when another holds the lease. Raises ApiError when it cannot be told."""
        began = time.monotonic()
        lease = await self._get()
        if lease is None or lease.spec.holder_identity != self._identity:
            return False
        self._version = lease.metadata.resource_version
        fresh = self._spec(transitions=lease.spec.lease_transitions or 0)
        fresh.acquire_time = lease.spec.acquire_time or fresh.acquire_time
        try:
            await self._write("PUT", self._path, fresh)
        except errors.Conflict:
            return True  # changed in between: the next look tells by whom, the deadline runs on
        self._renewed_at = began
        return True

    async def _release(self) -> None:
        """Lets the next one in at once. Not vital: without it the lease runs out."""
        with contextlib.suppress(errors.ApiError, TimeoutError):
            async with asyncio.timeout(1):
                lease = await self._get()
                if lease is not None and lease.spec.holder_identity == self._identity:
                    self._version = lease.metadata.resource_version
                    spec = self._spec(transitions=lease.spec.lease_transitions or 0)
                    spec.holder_identity, spec.lease_duration_seconds = "", 1
                    await self._write("PUT", self._path, spec)

    def _complain(self, what: str, error: errors.ApiError) -> None:
        self._complaint.say(f"lease {self._namespace}/{self._name} {what}: {error}", cause=str(error))

    def _observe(self, lease: _Lease) -> None:
        self._version = lease.metadata.resource_version
        if lease.spec != self._seen:
            self._seen = lease.spec
            self._seen_at = time.monotonic()

    def _free(self, spec: _Spec) -> bool:
        if not spec.holder_identity or spec.holder_identity == self._identity:
            return True
        duration = spec.lease_duration_seconds or self._timing.duration
        return time.monotonic() - self._seen_at > duration

    def _spec(self, *, transitions: int) -> _Spec:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return _Spec(self._identity, self._timing.duration, now, now, transitions)

    async def _get(self) -> _Lease | None:
        try:
            return _LEASES.decode(await self._api.request("GET", self._path))
        except errors.NotFound:
            return None
        except msgspec.DecodeError as error:
            raise errors.Malformed(f"GET {self._path}", str(error)) from error

    async def _write(self, method: str, path: str, spec: _Spec) -> None:
        metadata: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        if method == "PUT":
            metadata["resourceVersion"] = self._version
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        await self._api.request(method, path, body=body)

    @property
    def _collection(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases"

    @property
    def _path(self) -> str:
        return f"{self._collection}/{self._name}"
