"""One certificate per service account on this node: asked for, checked, renewed, handed on.

manager = CertificateManager(control, state=run_dir / "certificates") task =
asyncio.create_task(manager.run()) manager.set_wanted({"spiffe://cluster.local/ns/shop/sa/web", ...})   # at
any time, returns at once certificate = await manager.wait_for(identity)                       #
leaf.Certificate; for CNI ADD event = await manager.events.get()                                   # Issued
| Withdrawn | RootsChanged manager.current(), manager.roots_pem, manager.status()               # snapshots,
for ztunnel and the API manager.retry_now()                                                  # the control
plane came back

An identity that is new is asked for at once, several in parallel. A certificate is renewed from half of its
life on (with jitter); if that fails the old one stays in force until it expires, and is then withdrawn:
fail closed. An identity that is no longer wanted is withdrawn and forgotten.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import struct_pb2

from undermesh.agent import leaf
from undermesh.agent.backoff import Backoff
from undermesh.agent.certificate_store import CertificateStore
from undermesh.agent.control import ControlPlane, ControlPlaneError
from undermesh.agent.roots import RootBundleError
from undermesh.proto import ca_pb2, ca_pb2_grpc

log = logging.getLogger(__name__)

TIME_HEADER = "undermesh-time"
_SHORTEST_RENEWAL = dt.timedelta(seconds=5)  # when the CA itself is about to expire


@dataclass(frozen=True)
class CertificateSettings:
    """Times in seconds."""

    validity: int = 86_400
    timeout: float = 10.0  # of one call to the CA
    backoff_first: float = 0.5
    backoff_limit: float = 150.0
    # Requests at a time. Renewals have their own, so that a new pod never waits behind them.
    parallel: int = 8
    parallel_renewals: int = 2
    jitter: float = 0.1  # renewal begins within this share of the life around its half
    roots_poll: float = 1.0
    skew_warning: float = 30.0
    # Longest sleep: a clock that was set is noticed within it.
    clock_check: float = 60.0


@dataclass(frozen=True)
class Issued:
    """A certificate is there, or was replaced by a newer one."""

    certificate: leaf.Certificate


@dataclass(frozen=True)
class Withdrawn:
    """The identity has no certificate any more: unwanted or expired."""

    identity: str
    reason: str


@dataclass(frozen=True)
class RootsChanged:
    """The root bundle, at start and after every change."""

    roots_pem: bytes


Event = Issued | Withdrawn | RootsChanged


@dataclass(frozen=True)
class CertificateState:
    """One identity, for the API. Times are Unix seconds."""

    identity: str
    serial: str | None
    not_after: float | None
    last_error: str | None
    next_attempt: float | None


@dataclass
class _Slot:
    identity: str
    backoff: Backoff
    certificate: leaf.Certificate | None = None
    due: dt.datetime | None = None  # of the next request; None: at once
    last_error: str | None = None
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def retry(self) -> None:
        """The next request is due now."""
        self.due = None
        self.poke.set()

    def notify(self) -> None:
        """Wakes whoever waits for this identity now."""
        self.changed.set()
        self.changed = asyncio.Event()


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class CertificateManager:
    """Keeps the wanted identities supplied. Methods belong to one event loop."""

    def __init__(
        self,
        control: ControlPlane,
        *,
        state: Path | None = None,
        settings: CertificateSettings | None = None,
        clock: Callable[[], dt.datetime] = _utc_now,
    ) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.roots_pem = b""
        self.roots_error: str | None = None
        self.clock_skew: float | None = None  # control plane minus this node; None: not known yet
        self._control = control
        self._settings = settings or CertificateSettings()
        self._clock = clock
        self._store = CertificateStore(state)
        self._slots: dict[str, _Slot] = {}
        self._wanted: frozenset[str] = frozenset()
        self._running = False
        self._change = asyncio.Event()
        self._roots_ready = asyncio.Event()
        self._new = asyncio.Semaphore(self._settings.parallel)
        self._renewals = asyncio.Semaphore(self._settings.parallel_renewals)

    def set_wanted(self, identities: Iterable[str]) -> None:
        """The identities of this node's pods as of now; takes effect while `run` runs."""
        self._wanted = frozenset(identities)
        self._change.set()

    def current(self) -> list[leaf.Certificate]:
        """Every certificate in force, by identity."""
        now = self._clock()
        held = (slot.certificate for _, slot in sorted(self._slots.items()))
        return [certificate for certificate in held if certificate and not certificate.expired(now)]

    def get(self, identity: str) -> leaf.Certificate | None:
        """The certificate of one identity, if it is in force."""
        slot = self._slots.get(identity)
        if slot is None or slot.certificate is None or slot.certificate.expired(self._clock()):
            return None
        return slot.certificate

    async def wait_for(self, identity: str) -> leaf.Certificate:
        """The certificate of a wanted identity as soon as it is there; cuts a back-off short.

        Waits without end: bound it with `asyncio.timeout`, then tell the reason from `error_of`.
        Raises KeyError when the identity is not wanted (any more).
        """
        self._adjust()
        slot = self._slots[identity]
        if self.get(identity) is None:
            slot.retry()
        while (certificate := self.get(identity)) is None:
            await slot.changed.wait()
            if self._slots.get(identity) is not slot:
                raise KeyError(identity)
        return certificate

    def error_of(self, identity: str) -> str | None:
        """Why the last attempt failed."""
        slot = self._slots.get(identity)
        return slot.last_error if slot else None

    def status(self) -> list[CertificateState]:
        """All wanted identities, by name."""
        return [_state(slot) for _, slot in sorted(self._slots.items())]

    def retry_now(self) -> None:
        """Identities whose last attempt failed are tried again at once: call it when the CA came back."""
        for slot in self._slots.values():
            if slot.last_error is not None:
                slot.retry()

    def renew(self) -> list[str]:
        """Asks for a new certificate of every wanted identity at once, and returns their names.

        The old one stays in force until its successor is there: for a key that is no secret any more.
        """
        for slot in self._slots.values():
            slot.retry()
        return sorted(self._slots)

    async def run(self) -> None:
        """Runs until cancelled."""
        await asyncio.to_thread(self._store.prune, self._clock())
        watch = asyncio.create_task(self._watch_roots())
        self._running = True
        try:
            while True:
                self._change.clear()
                self._adjust()
                await self._change.wait()
        finally:
            self._running = False
            tasks = [watch, *(slot.task for slot in self._slots.values() if slot.task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for slot in self._slots.values():
                slot.task = None

    def _adjust(self) -> None:
        for identity in self._slots.keys() - self._wanted:
            self._drop(self._slots.pop(identity))
        for identity in sorted(self._wanted):
            slot = self._slots.get(identity)
            if slot is None:
                backoff = Backoff(self._settings.backoff_first, self._settings.backoff_limit)
                slot = self._slots[identity] = _Slot(identity, backoff)
            if slot.task is None and self._running:
                slot.task = asyncio.create_task(self._keep(slot), name=f"certificate {identity}")

    def _drop(self, slot: _Slot) -> None:
        if slot.task is not None:
            slot.task.cancel()
        self._store.forget(slot.identity)
        if slot.certificate is not None:
            self.events.put_nowait(Withdrawn(slot.identity, "no pod of this node has this identity any more"))
        slot.notify()

    async def _keep(self, slot: _Slot) -> None:
        """The life of one identity."""
        await self._roots_ready.wait()
        if slot.certificate is None:
            kept = await asyncio.to_thread(
                self._store.load, slot.identity, self._control.roots.certificates, self._clock()
            )
            if kept is not None:
                self._publish(slot, kept, kept.not_before)
        while True:
            await self._until_due(slot)
            await self._attempt(slot)

    async def _until_due(self, slot: _Slot) -> None:
        """Waits for the next request; meanwhile withdraws a certificate that expires."""
        while True:
            now = self._clock()
            held = slot.certificate
            if held is not None and held.expired(now):
                slot.certificate = None
                reason = f"expired at {held.not_after:%Y-%m-%d %H:%M:%SZ}; renewal: {slot.last_error}"
                log.error("certificate of %s %s", slot.identity, reason)
                self.events.put_nowait(Withdrawn(slot.identity, reason))
                held = None
            if slot.due is None or slot.due <= now:
                return
            next_step = slot.due if held is None else min(slot.due, held.not_after)
            delay = min(max((next_step - now).total_seconds(), 0.01), self._settings.clock_check)
            try:
                async with asyncio.timeout(delay):
                    await slot.poke.wait()
            except TimeoutError:
                continue
            slot.poke.clear()

    async def _attempt(self, slot: _Slot) -> None:
        limit = self._new if slot.certificate is None else self._renewals
        try:
            async with limit:
                certificate = await self._fetch(slot.identity)
        except (ControlPlaneError, leaf.LeafError) as error:
            self._failed(slot, str(error))
            return
        except Exception as error:
            log.exception("a certificate request failed in an unforeseen way")
            self._failed(slot, f"{type(error).__name__}: {error}; see the agent's log")
            return
        slot.backoff.reset()
        slot.last_error = None
        await asyncio.to_thread(self._store.keep, certificate)
        self._publish(slot, certificate, self._clock())

    def _failed(self, slot: _Slot, reason: str) -> None:
        delay = slot.backoff.next()
        slot.last_error = reason
        slot.due = self._clock() + dt.timedelta(seconds=delay)
        log.warning("no new certificate for %s, next attempt in %.1f s: %s", slot.identity, delay, reason)

    def _publish(self, slot: _Slot, certificate: leaf.Certificate, start: dt.datetime) -> None:
        slot.certificate = certificate
        slot.due = self._renewal_time(certificate, start)
        log.info(
            "certificate of %s: serial %s, until %s, renewed from %s",
            slot.identity,
            certificate.serial,
            certificate.not_after.isoformat(),
            slot.due.isoformat(),
        )
        self.events.put_nowait(Issued(certificate))
        slot.notify()

    def _renewal_time(self, certificate: leaf.Certificate, start: dt.datetime) -> dt.datetime:
        """Half of what is left at `start`, which for a fresh certificate is now: its notBefore is backdated."""
        left = certificate.not_after - start
        spread = random.uniform(-self._settings.jitter, self._settings.jitter) / 2
        return start + max(left * (0.5 + spread), _SHORTEST_RENEWAL)

    async def _fetch(self, identity: str) -> leaf.Certificate:
        key, csr = leaf.request(identity)
        request = ca_pb2.IstioCertificateRequest(
            csr=csr.decode(),
            validity_duration=self._settings.validity,
            metadata=struct_pb2.Struct(fields={"ImpersonatedIdentity": struct_pb2.Value(string_value=identity)}),
        )
        async with self._control.channel() as channel:
            call = ca_pb2_grpc.IstioCertificateServiceStub(channel).CreateCertificate(
                request, metadata=self._control.metadata(), timeout=self._settings.timeout
            )
            try:
                response = await call
            except grpc.aio.AioRpcError as error:
                self._note_time(error.trailing_metadata())
                raise self._control.explain(error) from error
            self._note_time(await call.trailing_metadata())
        if len(response.cert_chain) < 2:
            raise leaf.LeafError("the CA's answer has no chain: leaf and root bundle are expected")
        chain = "".join(response.cert_chain[:-1]).encode()
        roots = self._control.roots.certificates
        return leaf.checked(identity, chain, leaf.private_key_pem(key), roots, self._clock())

    def _note_time(self, metadata: Any) -> None:
        """Compares the clocks by the CA's own time; the error is at most the duration of the call."""
        value = next((value for key, value in metadata or () if key == TIME_HEADER), None)
        try:
            theirs = float(value) if value is not None else None
        except (TypeError, ValueError):
            theirs = None
        if theirs is None:
            return
        skew = theirs - self._clock().timestamp()
        if abs(skew) > self._settings.skew_warning >= abs(self.clock_skew or 0.0):
            log.warning("this node's clock is %+.0f s off the control plane's: check time synchronisation", -skew)
        self.clock_skew = skew

    async def _watch_roots(self) -> None:
        while True:
            await self._read_roots()
            await asyncio.sleep(self._settings.roots_poll)

    async def _read_roots(self) -> None:
        try:
            pem = await asyncio.to_thread(self._control.roots.read)
        except RootBundleError as error:
            if str(error) != self.roots_error:
                log.warning("the last good roots stand: %s", error)
            self.roots_error = str(error)
            for slot in self._slots.values():
                slot.last_error = slot.last_error or self.roots_error
            return
        self.roots_error = None
        if pem == self.roots_pem:
            return
        self.roots_pem = pem
        self.events.put_nowait(RootsChanged(pem))
        self._roots_ready.set()
        self._renew_untrusted()

    def _renew_untrusted(self) -> None:
        """Certificates that the new roots no longer vouch for are replaced at once."""
        for slot in self._slots.values():
            held = slot.certificate
            if held is None:
                continue
            try:
                roots = self._control.roots.certificates
                leaf.checked(held.identity, held.chain_pem, held.key_pem, roots, self._clock())
            except leaf.LeafError as error:
                log.warning("certificate of %s is renewed now: %s", held.identity, error)
                slot.retry()


def _state(slot: _Slot) -> CertificateState:
    held = slot.certificate
    return CertificateState(
        identity=slot.identity,
        serial=held.serial if held else None,
        not_after=held.not_after.timestamp() if held else None,
        last_error=slot.last_error,
        next_attempt=slot.due.timestamp() if slot.due else None,
    )
