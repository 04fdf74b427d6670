"""Enrols and un-enrols one pod: make before break, each step acknowledged before the next.

Enrol: routing and listeners; ztunnel accepts on them and has the pod's certificate; inbound steering; publish
"accepts tunnels"; outbound capture; publish "sends tunnels".
Un-enrol: outbound capture off; publish "plain"; peers' tunnels drained; inbound steering off when no peer
tunnels to it any more; the rest when the last captured connection has ended.

`step` is one iteration, made to be repeated: it looks at the kernel, mends, and goes one way as far as it can.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from undermesh.agent.bpf.layout import EnrolmentFlags, IPAddress, ListenerSlot
from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.netns import NetnsError
from undermesh.agent.pod_kernel import PodKernel
from undermesh.agent.routing import RoutingError
from undermesh.agent.ztunnel_link import ServedPod, ZtunnelAway, ZtunnelLink, ZtunnelRefused
from undermesh.proto import node_pb2 as wire
from undermesh.proto import report_pb2

log = logging.getLogger(__name__)

# Rules and routes wake the worker by themselves (NetlinkWatch); sysctl and BPF objects are looked at this often.
STEP_INTERVAL_S: Final = 5.0
_PUBLISH_TIMEOUT_S: Final = 15.0
_UNENROL_POLL_S: Final = 0.3


class State(StrEnum):
    """Where a pod stands, as `undermesh status` shows it."""

    PLAIN = "plain"
    ENROLLING = "enrolling"
    ENROLLED = "enrolled"
    UNENROLLING = "unenrolling"
    FAILED = "failed"


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
        self._fresh = fresh
        self._link = link
        self._publisher = publisher
        self._certificate_error = certificate_error
        self._on_gone = on_gone
        self._wake = asyncio.Event()
        self._gone = False
        self._left = False  # everyone knows that the pod is plain
        self._closed = False  # inbound steering has been off for one step
        self._task = asyncio.create_task(self._run(), name=f"pod {facts.namespace}/{facts.name}")

    def update(self, facts: PodFacts) -> None:
        if facts != self.facts:
            self.facts = facts
            self._wake.set()

    def wake(self) -> None:
        """Have the pod looked at now: something in its namespace changed."""
        self._wake.set()

    async def adopt(self, held: Mapping[ListenerSlot, int]) -> None:
        """ztunnel holds listeners of this pod from before: they become the pod's, in place of any made since."""
        await asyncio.to_thread(self.kernel.replace_listeners, held)
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

    async def _run(self) -> None:
        while not self._gone:
            self._wake.clear()
            try:
                await self.step()
            except (BpfError, NetnsError, RoutingError, ZtunnelRefused, OSError) as e:
                self._fail(str(e))
            if self._gone:
                return
            interval = _UNENROL_POLL_S if self.state is State.UNENROLLING else STEP_INTERVAL_S
            try:
                await asyncio.wait_for(self._wake.wait(), interval)
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

    # === enrol ===

    async def _enrol(self) -> None:
        facts, kernel = self.facts, self.kernel
        self._left = self._closed = False
        present = await asyncio.to_thread(lambda: kernel.present_flags)
        settled = self.state is State.ENROLLED
        mended = await asyncio.to_thread(kernel.ensure_routing, facts.addresses)
        mended += await asyncio.to_thread(kernel.ensure_listeners, facts.declared_ports)
        if present & EnrolmentFlags.INBOUND:
            # It is steered already (repair, or after a restart of the agent): never wait for others with that.
            mended += await asyncio.to_thread(kernel.ensure_inbound)
        if settled and mended:
            log.warning("pod %s/%s: mended %s", facts.namespace, facts.name, ", ".join(mended))
        await self._link.add_pod(self._served())
        if not self._link.has_certificate(facts.identity):
            error = self._certificate_error(facts.identity)
            raise _Waiting(f"no certificate for {facts.identity} yet" + (f": {error}" if error else ""))
        await asyncio.to_thread(kernel.ensure_inbound)
        if not present & EnrolmentFlags.OUTBOUND:
            if not self._fresh:
                await self._publish(report_pb2.ACCEPTS_TUNNELS)
            if not self.facts.enrolled:
                return
            await asyncio.to_thread(kernel.ensure_outbound, True)
        self.captured.set()
        self._publisher.set_state(facts.uid, report_pb2.SENDS_TUNNELS, "")
        if self.state is not State.ENROLLED:
            log.info("pod %s/%s is enrolled", facts.namespace, facts.name)
        self._set(State.ENROLLED, facts.reason)

    def _served(self) -> ServedPod:
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
        )
        return ServedPod(message, kernel.netns_fd, tuple(kernel.sockets[slot].fileno() for slot in slots))

    # === un-enrol ===

    async def _unenrol(self) -> None:
        if self.state is not State.UNENROLLING:
            self._set(State.UNENROLLING, self.facts.reason)
        present = await asyncio.to_thread(lambda: self.kernel.present_flags)
        if present & EnrolmentFlags.OUTBOUND:
            await asyncio.to_thread(self.kernel.ensure_outbound, False)
        if not self._left:
            await self._publish(report_pb2.PLAIN)
            self._left = True
            if self.facts.enrolled:
                return
        try:
            await self._link.drain_pod(self.facts.uid)
            self.stats = await self._fetch_stats()
        except ZtunnelAway as e:
            self._set(State.UNENROLLING, f"{e}; its connections cannot be counted")
            return
        if self.stats.inbound_tunnels:
            self._set(State.UNENROLLING, f"{self.stats.inbound_tunnels} tunnels of peers are still in use")
            return
        if not self._closed:
            await asyncio.to_thread(self.kernel.stop_inbound)
            self._closed = True
            # What the listeners took in until now is counted by the next step, when ztunnel has accepted it.
            self._set(State.UNENROLLING, "inbound steering has just ended")
            return
        open_connections = self.stats.captured_connections + self.stats.inbound_connections
        if open_connections:
            self._set(State.UNENROLLING, f"{open_connections} connections in the mesh are still open")
            return
        await self._link.remove_pod(self.facts.uid)
        await self._remove(namespace_lives=True)
        log.info("pod %s/%s is un-enrolled", self.facts.namespace, self.facts.name)

    async def _fetch_stats(self) -> wire.PodStats:
        reply = await self._link.dump(wire.DumpKind.PODS)
        for stats in reply.pods.pods:
            if stats.uid == self.facts.uid:
                return stats
        return wire.PodStats(uid=self.facts.uid)

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
        await asyncio.to_thread(self.kernel.remove, namespace_lives)
        self._publisher.set_state(self.facts.uid, report_pb2.PLAIN, "")
        self._gone = True
        self._set(State.PLAIN, self.facts.reason)
        self._on_gone(self)

    # === shared ===

    async def _publish(self, state: report_pb2.PodState.ValueType) -> None:
        sequence = self._publisher.set_state(self.facts.uid, state, "")
        started = time.monotonic()
        try:
            await asyncio.wait_for(self._publisher.wait_published(sequence), _PUBLISH_TIMEOUT_S)
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
