"""Enrols and un-enrols one pod: make before break, each step acknowledged before the next.

Enrol: routing and listeners; ztunnel accepts on them and has the pod's certificate; inbound steering; publish
"accepts tunnels"; outbound capture; publish "sends tunnels".
Un-enrol: outbound capture off; publish "plain"; peers' tunnels drained; inbound steering off when no peer
tunnels to it any more; the rest when the last captured connection has ended.

`step` is one iteration, made to be repeated: it looks at the kernel, mends, and goes one way as far as it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, ParamSpec, Protocol, TypeVar

from undermesh.agent import netns
from undermesh.agent.bpf.layout import EnrolmentFlags, IPAddress, ListenerSlot
from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.listeners import PortRange
from undermesh.agent.netlink_watch import NetlinkWatch
from undermesh.agent.netns import NetnsError
from undermesh.agent.pod_kernel import PodKernel
from undermesh.agent.pod_stats import PodStatsBook
from undermesh.agent.routing import RoutingError
from undermesh.agent.ztunnel_link import ServedPod, ZtunnelAway, ZtunnelLink, ZtunnelRefused
from undermesh.proto import node_pb2 as wire
from undermesh.proto import report_pb2

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# On the way into the mesh.
STEP_INTERVAL_S: Final = 5.0
# In it, where inspection.py looks at the kernel: whatever else may have been missed.
_SETTLED_INTERVAL_S: Final = 60.0
_PUBLISH_TIMEOUT_S: Final = 15.0
_UNENROL_POLL_S: Final = 0.3
_WHOLE: Final = EnrolmentFlags.INBOUND | EnrolmentFlags.OUTBOUND
_FAILURES: Final = (BpfError, NetnsError, RoutingError, OSError)

Look = tuple[EnrolmentFlags, list[str]]


class State(StrEnum):
    """Where a pod stands, as `undermesh status` shows it."""

    PLAIN = "plain"
    ENROLLING = "enrolling"
    ENROLLED = "enrolled"
    UNENROLLING = "unenrolling"
    FAILED = "failed"


_INTERVALS: Final = {State.UNENROLLING: _UNENROL_POLL_S, State.ENROLLED: _SETTLED_INTERVAL_S}


@dataclass(frozen=True)
class PodFacts:
    """What the Kubernetes side says of a pod that is in the mesh or leaves it."""

    uid: str
    namespace: str
    name: str
    service_account: str
    identity: str
    workload_uid: str
    addresses: tuple[IPAddress, ...]
    declared_ports: frozenset[int]
    enrolled: bool
    reason: str
    cut_at: float | None = None
    """Un-enrolling waits for the pod's connections no longer than this; seconds since the epoch; None: as they last."""


class Publisher(Protocol):
    """Tells the control plane what a pod can do, and when all agents know."""

    def set_state(self, uid: str, state: report_pb2.PodState.ValueType, error: str) -> int: ...

    async def wait_published(self, sequence: int) -> None: ...


class _Waiting(Exception):
    """A step cannot go on yet; the message says for what."""


class PodWorker:
    """One pod that is, or was, in the mesh.

    Args:
        facts: the newest wish; replaced by `update`.
        kernel: its namespace; ownership passes to the worker.
        certificate_error: why an identity has no certificate yet, for the reason in status.
        on_gone: called once nothing of the pod is left.
        fresh: no process of the pod runs yet, so there is no connection that publication must come before.
    """

    def __init__(
        self,
        facts: PodFacts,
        kernel: PodKernel,
        link: ZtunnelLink,
        stats: PodStatsBook,
        publisher: Publisher,
        certificate_error: Callable[[str], str | None],
        on_gone: Callable[[PodWorker], None],
        *,
        fresh: bool = False,
    ) -> None:
        self.facts = facts
        self.kernel = kernel
        self.state = State.ENROLLING if facts.enrolled else State.UNENROLLING
        self.reason = ""
        self.stats = wire.PodStats()
        self.captured = asyncio.Event()
        self.looked = 0.0  # when the kernel was last compared; time.monotonic()
        self._fresh = fresh
        self._link = link
        self._stats = stats
        self._publisher = publisher
        self._certificate_error = certificate_error
        self._on_gone = on_gone
        self._wake = asyncio.Event()
        self._watch: NetlinkWatch | None = None
        self._told_ports: list[PortRange] = []  # what ztunnel delivers from
        self._kernel_lock = asyncio.Lock()
        self._gone = False
        self._left = False  # everyone knows that the pod is plain
        self._closed = False  # inbound steering has been off for one step
        self._task = asyncio.create_task(self._run(), name=f"pod {facts.namespace}/{facts.name}")

    def update(self, facts: PodFacts) -> None:
        if facts is not self.facts and facts != self.facts:
            self.facts = facts
            self._wake.set()

    def wake(self) -> None:
        """Have the pod looked at now: something in its namespace changed."""
        self._wake.set()

    async def adopt(self, held: Mapping[ListenerSlot, int]) -> None:
        """ztunnel holds listeners of this pod from before: they become the pod's, in place of any made since."""
        if self._gone:
            for fd in held.values():
                os.close(fd)
            return
        await self._in_thread(self.kernel.replace_listeners, held)
        self._wake.set()

    async def abandon(self) -> None:
        """The pod or its namespace is gone: takes out what is left, without waiting for anyone."""
        self._gone = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._remove(namespace_lives=False)

    async def stop(self) -> None:
        """The agent ends: stops working and leaves the kernel as it is."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._close_watch()

    async def _run(self) -> None:
        while not self._gone:
            self._wake.clear()
            try:
                await self.step()
            except (*_FAILURES, ZtunnelRefused) as e:
                self._fail(str(e))
            if self._gone:
                return
            self.looked = time.monotonic()
            try:
                async with asyncio.timeout(_INTERVALS.get(self.state, STEP_INTERVAL_S)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def step(self) -> None:
        """One iteration towards what the facts wish for."""
        enrolled = self.facts.enrolled
        try:
            await (self._enrol() if enrolled else self._unenrol())
        except (_Waiting, ZtunnelAway) as e:
            waiting = State.ENROLLING if enrolled else State.UNENROLLING
            self._set(self.state if self.state is State.ENROLLED else waiting, str(e))

    # === looks between the steps (inspection.py) ===

    @property
    def is_settled(self) -> bool:
        """Whether the pod is where it is to be, and nothing is done to it right now."""
        return self._stays and not self._kernel_lock.locked()

    @property
    def _stays(self) -> bool:
        return self.state is State.ENROLLED and self.facts.enrolled and not self._gone

    async def lend(self) -> bool:
        """Gives the pod's kernel objects to a look, if it is settled; `take_back` must follow then."""
        if not self.is_settled:
            return False
        await self._kernel_lock.acquire()
        if self._stays:
            return True
        # Somebody was in front, and took the pod out of the mesh: a look would put it back.
        self._kernel_lock.release()
        return False

    def take_back(self) -> None:
        self._kernel_lock.release()

    def look(self) -> Look | Exception:
        """Mends what is in the kernel, or says why it could not; to be called in one of `netns.threads()`."""
        try:
            return self.kernel.look(self.facts.addresses, self.facts.declared_ports)
        except _FAILURES as e:
            return e

    def judge(self, found: Look | Exception) -> None:
        """Has the worker do what follows from a look."""
        self.looked = time.monotonic()
        if self._gone:
            return
        if isinstance(found, Exception):
            self._fail(str(found))
            return
        present, mended = found
        self._warn_of(mended)
        stale = self.reason != self.facts.reason or self.kernel.delivery_ports != self._told_ports
        if mended or present != _WHOLE or stale:
            self._wake.set()

    def _warn_of(self, mended: list[str]) -> None:
        if mended:
            log.warning("pod %s/%s: mended %s", self.facts.namespace, self.facts.name, ", ".join(mended))

    # === enrol ===

    async def _enrol(self) -> None:
        facts, kernel = self.facts, self.kernel
        self._left = self._closed = False
        settled = self.state is State.ENROLLED
        try:
            present, mended = await self._in_thread(kernel.look, facts.addresses, facts.declared_ports)
        finally:
            self._take_news()
        if settled:
            self._warn_of(mended)
        told_ports = kernel.delivery_ports
        joining = not self._fresh and not present & EnrolmentFlags.OUTBOUND
        await self._link.add_pod(self._served(in_transition=joining))
        self._told_ports = told_ports
        if not self._link.has_certificate(facts.identity):
            error = self._certificate_error(facts.identity)
            raise _Waiting(f"no certificate for {facts.identity} yet" + (f": {error}" if error else ""))
        captured = bool(present & EnrolmentFlags.OUTBOUND)
        if not present & EnrolmentFlags.INBOUND or (self._fresh and not captured):
            await self._in_thread(kernel.capture, self._fresh)
        if not captured and not self._fresh:
            await self._publish(report_pb2.ACCEPTS_TUNNELS)
            if not self.facts.enrolled:
                return
            await self._link.add_pod(self._served())
            await self._in_thread(kernel.ensure_outbound, True)
        self.captured.set()
        self._publisher.set_state(facts.uid, report_pb2.SENDS_TUNNELS, "")
        if self.state is not State.ENROLLED:
            log.info("pod %s/%s is enrolled", facts.namespace, facts.name)
        self._set(State.ENROLLED, facts.reason)

    def _take_news(self) -> None:
        """From now on changes by others in the namespace wake the worker; what was missed since the look too."""
        news, self.kernel.news = self.kernel.news, None
        if news is not None:
            self._watch = NetlinkWatch(news, self.wake, self.kernel.own_ports)

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _served(self, *, in_transition: bool = False) -> ServedPod:
        """The pod for ztunnel. In transition peers may send plaintext that STRICT would forbid."""
        facts, kernel = self.facts, self.kernel
        slots = sorted(kernel.sockets)
        message = wire.PodAdd(
            uid=facts.uid,
            workload_uid=facts.workload_uid,
            name=facts.name,
            namespace=facts.namespace,
            service_account=facts.service_account,
            addresses=[address.packed for address in facts.addresses],
            netns_inode=kernel.record.netns_inode,
            listeners=[wire.Listener.ValueType(int(slot)) for slot in slots],
            delivery_ports=[wire.PortRange(low=low, high=high) for low, high in kernel.delivery_ports],
            in_transition=in_transition,
        )
        return ServedPod(message, kernel.netns_fd, tuple(kernel.sockets[slot].fileno() for slot in slots))

    # === un-enrol ===

    async def _unenrol(self) -> None:
        if self.state is not State.UNENROLLING:
            self._set(State.UNENROLLING, self.facts.reason)
        self._fresh = False
        present = await self._in_thread(lambda: self.kernel.present_flags)
        if present & EnrolmentFlags.OUTBOUND:
            await self._in_thread(self.kernel.ensure_outbound, False)
        if not self._left:
            # A ztunnel that is away learns it when it comes.
            with contextlib.suppress(ZtunnelAway):
                await self._link.add_pod(self._served(in_transition=True))
            await self._publish(report_pb2.PLAIN)
            self._left = True
            if self.facts.enrolled:
                return
        try:
            await self._link.drain_pod(self.facts.uid)
            self.stats = await self._stats.of(self.facts.uid)
        except ZtunnelAway as e:
            self._set(State.UNENROLLING, f"{e}; its connections cannot be counted")
            return
        if self.stats.inbound_tunnels and not self._is_overdue():
            self._set(State.UNENROLLING, f"{self.stats.inbound_tunnels} tunnels of peers are still in use")
            return
        if not self._closed:
            await self._in_thread(self.kernel.stop_inbound)
            self._closed = True
            # What the listeners took in until now is counted by the next step, when ztunnel has accepted it.
            self._set(State.UNENROLLING, "inbound steering has just ended")
            return
        open_connections = self.stats.captured_connections + self.stats.inbound_connections
        if open_connections and not self._is_overdue():
            self._set(State.UNENROLLING, f"{open_connections} connections in the mesh are still open")
            return
        if open_connections:
            log.warning(
                "pod %s/%s: %d connections in the mesh are reset: undermesh is being uninstalled, their time is over",
                self.facts.namespace,
                self.facts.name,
                open_connections,
            )
        await self._link.remove_pod(self.facts.uid)
        await self._remove(namespace_lives=True)
        log.info("pod %s/%s is un-enrolled", self.facts.namespace, self.facts.name)

    def _is_overdue(self) -> bool:
        return self.facts.cut_at is not None and time.time() >= self.facts.cut_at

    async def _remove(self, namespace_lives: bool) -> None:
        try:
            await self._link.remove_pod(self.facts.uid)
        except (ZtunnelAway, ZtunnelRefused) as e:
            log.info(
                "pod %s/%s: ztunnel learns later that it is gone: %s",
                self.facts.namespace,
                self.facts.name,
                e,
            )
        self._close_watch()
        await self._in_thread(self.kernel.remove, namespace_lives)
        self._publisher.set_state(self.facts.uid, report_pb2.PLAIN, "")
        self._gone = True
        self._set(State.PLAIN, self.facts.reason)
        self._on_gone(self)

    # === shared ===

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Works on the kernel beside the event loop, one piece of work of a pod at a time.

        Cancelling does not end a thread: it is waited for, or it would put back what the canceller takes out, and go
        on with a namespace whose FD number may be another one's by then.
        """
        async with self._kernel_lock:
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(netns.threads(), functools.partial(work, *args, **kwargs))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait((running,))
                if not running.cancelled() and (error := running.exception()) is not None:
                    log.info("pod %s/%s: the last work on it: %s", self.facts.namespace, self.facts.name, error)
                raise

    async def _publish(self, state: report_pb2.PodState.ValueType) -> None:
        sequence = self._publisher.set_state(self.facts.uid, state, "")
        started = time.monotonic()
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                await self._publisher.wait_published(sequence)
        except TimeoutError:
            waited = time.monotonic() - started
            name = report_pb2.PodState.Name(state)
            raise _Waiting(f"the control plane has not published {name} after {waited:.0f} s") from None

    def _fail(self, reason: str) -> None:
        if reason != self.reason:
            log.error("pod %s/%s: %s", self.facts.namespace, self.facts.name, reason)
        flags = report_pb2.PLAIN if self.state is not State.ENROLLED else report_pb2.SENDS_TUNNELS
        self._publisher.set_state(self.facts.uid, flags, reason)
        self._set(State.FAILED if self.state is not State.ENROLLED else State.ENROLLED, reason)

    def _set(self, state: State, reason: str) -> None:
        self.state = state
        self.reason = reason
