"""Everything that one enrolled pod has in the kernel. Each method is idempotent and checks the kernel itself.

All of it blocks (netlink, bpf(2), setns), so the event loop calls it in a thread.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from undermesh.agent import listeners, netlink_watch, netns, routing, sysctls
from undermesh.agent.attested_lane import AttestedLane, Member
from undermesh.agent.bpf import layout, pod_steering
from undermesh.agent.bpf.layout import EnrolmentFlags, IPAddress, ListenerSlot
from undermesh.agent.bpf.node_capture import Capture
from undermesh.agent.fd_store import FdStore
from undermesh.agent.pod_record import PodRecord, PodRecords
from undermesh.agent.routing import FamilyState, RoutingError, Steps
from undermesh.agent.rtnetlink import RouteSocket

log = logging.getLogger(__name__)

# Answers go the way of what they answer: those of sockets that the app accepts from a delivery, and those of no
# socket at all (a refused delivery would else be reset towards the client, and ztunnel never hear of it).
_SYSCTLS: Final = ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect")


_WHOLE: Final = EnrolmentFlags.INBOUND | EnrolmentFlags.OUTBOUND

# A pod's looks follow one another by far more than their news take.
_PORTS_REMEMBERED: Final = 4


@dataclass
class KernelContext:
    """What the pods of a node share."""

    objects: Path
    capture: Capture
    records: PodRecords
    store: FdStore
    lane: AttestedLane


@dataclass
class PodKernel:
    """One pod's namespace and what is ours in it. `netns_fd` belongs to this object."""

    context: KernelContext
    record: PodRecord
    netns_fd: int
    sockets: dict[ListenerSlot, socket.socket] = field(default_factory=dict)
    delivery_ports: list[listeners.PortRange] = field(default_factory=list)
    devices: frozenset[int] = frozenset()
    news: socket.socket | None = None  # of the namespace; from the first look on, until a NetlinkWatch takes it
    own_ports: deque[int] = field(default_factory=lambda: deque(maxlen=_PORTS_REMEMBERED))
    _published: frozenset[int] | None = None  # the devices that the kernel was told of; None: an earlier agent may have
    _steering: pod_steering.Steering | None = None
    _stored: tuple[int, ...] = ()  # cookies of what the FD store keeps
    _stored_name: str | None = None
    _cookie: int = 0
    _in_order: tuple[bytes, tuple[IPAddress, ...]] | None = None  # rules and routes that need no second reading
    _ipv6: bool = False
    _subscribed: bool = False
    _addresses: tuple[IPAddress, ...] = ()

    @property
    def cookie(self) -> int:
        if not self._cookie:
            self._cookie = netns.cookie(self.netns_fd)
        return self._cookie

    @property
    def pins(self) -> Path:
        return self.context.capture.pins / "pods" / self.record.uid

    # === present ===

    def look(self, addresses: Sequence[IPAddress], avoid: Iterable[int]) -> tuple[EnrolmentFlags, list[str]]:
        """Brings up, or back, what may be there before ztunnel serves the pod; with a pod that is steered already
        the steering too, which must never wait for others.

        Args:
            addresses: of the pod.
            avoid: ports that the pod's containers declare.

        Returns:
            What the kernel steered before, whoever set it, and what had to be made or mended.

        Raises:
            RoutingError: another owner's rule stands ahead of ours.
            OSError: a listener cannot be made.
        """
        present, mended = netns.run_in(self.netns_fd, lambda: self._look_inside(addresses, avoid))
        self._publish_devices()
        self._store_listeners()
        self._addresses = tuple(addresses)
        if present & EnrolmentFlags.INBOUND:
            mended += self.ensure_inbound()
        if present == _WHOLE:
            self._join_lane()
        return present, mended

    def _look_inside(self, addresses: Sequence[IPAddress], avoid: Iterable[int]) -> tuple[EnrolmentFlags, list[str]]:
        if not self._subscribed:
            self.news, self._subscribed = netlink_watch.subscribe(), True
        present = self.present_flags
        mended = self._routing(addresses)
        missing = [slot for slot in listeners.wanted_slots(self._ipv6) if slot not in self.sockets]
        if missing:
            self.sockets |= listeners.make(missing, avoid)
            mended.append("listeners")
        return present, mended

    def _routing(self, addresses: Sequence[IPAddress]) -> list[str]:
        found = {name: value for name in _SYSCTLS if (value := sysctls.read(name)) is not None}
        self.delivery_ports = listeners.delivery_ports(listeners.ephemeral_range())
        with RouteSocket() as netlink:
            snapshot = routing.read(netlink)
            as_found = (snapshot.digest(), tuple(addresses))
            if as_found == self._in_order:
                return self._set_sysctls(found)
            self._in_order = None
            self._ipv6 = snapshot.ipv6
            states = snapshot.states(self.record.tables)
            plans, obstacle = _plan(states, addresses)
            self._remember(found, {family: steps.table for family, steps in plans.items()})
            mended = self._set_sysctls(found)
            if any(plans.values()):
                self.own_ports.append(netlink.port)
            for family, steps in plans.items():
                if steps:
                    routing.apply(netlink, family, steps)
                    mended.append(f"{'IPv4' if family == socket.AF_INET else 'IPv6'} rules and routes")
        if obstacle is not None:
            raise obstacle
        self.devices = frozenset(
            route.ifindex for state in states.values() for route in routing.wanted_routes(state, addresses)
        )
        if not any(plans.values()):
            self._in_order = as_found
        return mended

    def _set_sysctls(self, found: Mapping[str, str]) -> list[str]:
        wrong = [name for name, value in found.items() if value != "1"]
        for name in wrong:
            sysctls.write(name, "1")
        return wrong

    def _remember(self, found: Mapping[str, str], tables: Mapping[int, int]) -> None:
        """Writes down what is about to be changed, so that a later agent can take it back."""
        record = self.record
        before = {name: value for name, value in found.items() if name not in record.sysctls}
        if before or tables.items() - record.tables.items():
            record.sysctls |= before
            record.tables |= tables
            self.context.records.save(record)

    def _publish_devices(self) -> None:
        pod_devices = self.context.capture.maps["pod_devices"]
        wanted = {self._device_key(index) for index in self.devices}
        if self._published is None:
            told = {key for key in pod_devices.entries() if layout.PodDevice.unpack(key).pod == self.record.pod_id}
        else:
            told = {self._device_key(index) for index in self._published}
        for key in told - wanted:
            pod_devices.delete(key)
        for key in wanted:
            pod_devices.update(key, layout.u32(1))
        self._published = self.devices

    def _device_key(self, index: int) -> bytes:
        return layout.PodDevice(self.record.pod_id, index).pack()

    def adopt_listeners(self, fds: Mapping[ListenerSlot, int]) -> None:
        """Takes over listeners that survived the agent; those of slots we have already are closed."""
        for slot, fd in fds.items():
            if slot in self.sockets:
                os.close(fd)
            else:
                self.sockets[slot] = socket.socket(fileno=fd)

    def replace_listeners(self, fds: Mapping[ListenerSlot, int]) -> None:
        """Takes over what ztunnel accepts on; listeners made meanwhile, which nobody accepts on, are closed."""
        for slot, fd in fds.items():
            sock = socket.socket(fileno=fd)
            present = self.sockets.get(slot)
            if present is not None and listeners.socket_cookie(present) == listeners.socket_cookie(sock):
                sock.close()
                continue
            self.sockets[slot] = sock
            if self._steering is not None:
                self._steering.set_listener(slot, sock.fileno())
            if present is not None:
                present.close()

    def _store_listeners(self) -> None:
        slots = sorted(self.sockets)
        held = tuple(listeners.socket_cookie(self.sockets[slot]) for slot in slots)
        if held == self._stored:
            return
        name = self._name_in_store()
        self.context.store.store(name, [self.sockets[slot].fileno() for slot in slots])
        if self._stored_name not in (None, name):
            self.context.store.drop(self._stored_name)
        self._stored, self._stored_name = held, name

    def _name_in_store(self) -> str:
        return f"pod/{self.record.uid}/{','.join(str(int(slot)) for slot in sorted(self.sockets))}"

    def ensure_inbound(self) -> list[str]:
        """Steering with every listener in its slot. To be called once ztunnel accepts on them."""
        mended = []
        if self._steering is None:
            self._steering = pod_steering.load(
                self.context.objects, self.pins, self.record.pod_id, self.context.capture.shared_maps
            )
        for slot, sock in self.sockets.items():
            if self._steering.listener_cookie(slot) != listeners.socket_cookie(sock):
                self._steering.set_listener(slot, sock.fileno())
                mended.append(f"listener slot {slot.name}")
        mended += self._ensure_entries(EnrolmentFlags.INBOUND)
        if self._steering.attach(self.netns_fd):
            mended.append("steering link")
        return mended

    def capture(self, outbound: bool) -> None:
        """The steps that a pod whose listeners ztunnel accepts on can take in one go.

        Args:
            outbound: capture new connections too, behind the steering of inbound ones.
        """
        self.ensure_inbound()
        if outbound:
            self.ensure_outbound(True)

    def ensure_outbound(self, on: bool) -> list[str]:
        """Capture of new connections on or off."""
        if not on:
            self.context.lane.withdraw_pod(self.record.pod_id)
        mended = self._ensure_entries(_WHOLE if on else EnrolmentFlags.INBOUND, exactly=True)
        if on:
            self._join_lane()
        return mended

    def _join_lane(self) -> None:
        """Not before it is steered: its own program says to callers that they have reached it."""
        self.context.lane.join(Member(self.record.pod_id, self.record.uid, self.netns_fd, self._addresses))

    def _ensure_entries(self, flags: EnrolmentFlags, exactly: bool = False) -> list[str]:
        maps = self.context.capture.maps
        pod = layout.Pod(self.record.uid, self.cookie, self.record.netns_inode).pack()
        mended = []
        key = layout.u32(self.record.pod_id)
        if maps["pods"].lookup(key) != pod:
            maps["pods"].update(key, pod)
            mended.append("pods entry")
        present = maps["enrolled"].lookup(layout.u64(self.cookie))
        if present is not None and not exactly:
            flags |= layout.Enrolment.unpack(present).flags
        wanted = layout.Enrolment(self.record.pod_id, flags).pack()
        if present != wanted:
            maps["enrolled"].update(layout.u64(self.cookie), wanted)
            mended.append("enrolled entry")
        return mended

    @property
    def present_flags(self) -> EnrolmentFlags:
        """What the kernel steers of this pod right now, whoever set it."""
        present = self.context.capture.maps["enrolled"].lookup(layout.u64(self.cookie))
        return EnrolmentFlags(0) if present is None else layout.Enrolment.unpack(present).flags

    # === absent ===

    def stop_inbound(self) -> None:
        """New connections go straight to the app; what ztunnel holds goes on."""
        self.context.lane.withdraw_pod(self.record.pod_id)
        pod_steering.detach(self.pins)

    def remove(self, namespace_lives: bool) -> None:
        """Takes everything out, in an order that leaves nothing half steered.

        Args:
            namespace_lives: also undo sysctl, rules and routes; in a dead namespace they died with it.
        """
        if namespace_lives:
            self.context.lane.withdraw_pod(self.record.pod_id)
        else:
            self.context.lane.end_pod(self.record.pod_id)
        self.context.capture.maps["enrolled"].delete(layout.u64(self.cookie))
        pod_steering.detach(self.pins)
        if self._steering is not None:
            self._steering.close()
            self._steering = None
        if namespace_lives:
            netns.run_in(self.netns_fd, self._unroute)
        self._clean()

    def forget(self) -> None:
        """Takes out what is left of a pod whose namespace is gone: pins, map entries, kept listeners."""
        self.context.lane.end_pod(self.record.pod_id)
        self._clean()

    def _clean(self) -> None:
        maps = self.context.capture.maps
        if self._cookie:
            maps["enrolled"].delete(layout.u64(self._cookie))
        else:
            for key, value in maps["enrolled"].entries().items():
                if layout.Enrolment.unpack(value).pod == self.record.pod_id:
                    maps["enrolled"].delete(key)
        pod_steering.remove(self.pins)
        self.devices = frozenset()
        self._publish_devices()
        maps["pods"].delete(layout.u32(self.record.pod_id))
        self.close()
        self.context.records.remove(self.record.uid)

    def _unroute(self) -> None:
        with RouteSocket() as netlink:
            for family, state in routing.read(netlink).states(self.record.tables).items():
                routing.apply(netlink, family, routing.plan_absent(state))
        for name, value in self.record.sysctls.items():
            sysctls.write(name, value)

    def close(self) -> None:
        """Gives up the namespace and the listeners; kept FDs would keep both alive."""
        if self.news is not None:
            self.news.close()
            self.news = None
        if self.sockets:
            self.context.store.drop(self._stored_name or self._name_in_store())
            self._stored, self._stored_name = (), None
        for sock in self.sockets.values():
            sock.close()
        self.sockets.clear()
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


def _plan(
    states: Mapping[int, FamilyState], addresses: Sequence[IPAddress]
) -> tuple[dict[int, Steps], RoutingError | None]:
    """What each family needs; one that somebody else is in the way of must not keep the other broken."""
    plans: dict[int, Steps] = {}
    obstacle: RoutingError | None = None
    for family, state in states.items():
        try:
            plans[family] = routing.plan_present(state, addresses)
        except RoutingError as e:
            obstacle = e
    return plans, obstacle


def parse_store_name(name: str) -> tuple[str, list[ListenerSlot]] | None:
    """The pod uid and slots of a name in the FD store, None if it is none of ours."""
    match name.split("/"):
        case ["pod", uid, slots]:
            return uid, [ListenerSlot(int(slot)) for slot in slots.split(",")]
    return None
