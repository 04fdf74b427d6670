"""Lane attested, the agent's half: which pods of this node may talk kernel to kernel, written into the BPF maps.

ztunnel decides, with the one evaluator of policy; what it says of a pair stands in map `verdicts` for as long as it
says so. Nothing here grants anything by itself: without ztunnel, while it takes in a change of policy, and for pods
that are not known here, no verdict holds, and connections take the tunnel.

Taking a verdict back comes before looking for the connections that it let through: the BPF program notes a connection
before it asks for the verdict a second time, so one of both always sees the other.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from undermesh.agent import netns, sock_diag
from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import Attestation, Flow, IPAddress, PairCounts, Verdict, VerdictKey
from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.bpf.node_capture import Capture
from undermesh.agent.netns import NetnsError
from undermesh.agent.pod_wiring import Wiring

log = logging.getLogger(__name__)

_HBONE_PORT: Final = 15008
_ONE: Final = layout.u32(0)  # the key of a map with one entry


@dataclass(frozen=True)
class Pair:
    """Who calls whom, by pod uid, from which address to which; what a verdict is about."""

    caller: str
    pod: str
    source: IPAddress
    destination: IPAddress
    port: int


@dataclass(frozen=True)
class Member:
    """An enrolled pod whose steering and capture are in place. The FD is the owner's."""

    pod_id: int
    uid: str
    netns_fd: int
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True)
class OpenConnection:
    """One that was attested and has not ended."""

    flow: Flow
    attestation: Attestation


class AttestedLane:
    """The maps of the lane. Every method may be called from any thread, and blocks for a few system calls.

    Args:
        capture: holds the maps.
        wiring: why a pod cannot take part, by its namespace and addresses; empty: it can.
    """

    def __init__(self, capture: Capture, wiring: Callable[[int, Iterable[IPAddress]], str] | None = None) -> None:
        maps = capture.maps
        self._verdicts, self._lane = maps["verdicts"], maps["lane"]
        self._attested, self._counts = maps["attested"], maps["attested_pairs"]
        self._wiring = wiring or Wiring().fault
        self._lock = threading.RLock()
        self._members: dict[int, Member] = {}
        self._pairs: dict[VerdictKey, Pair] = {}
        self._generation = 0
        self._suspended = 0
        self._idle: dict[bytes, bytes] = {}
        self._created: set[Pair] = set()  # in this generation: nothing was counted of them before
        self._joined = 0
        self._gone: set[int] = set()  # pods whose callers may not all have joined when they went

    # === whether any verdict holds ===

    def open(self) -> None:
        """Begins a new generation, in which no verdict has been given yet."""
        with self._lock:
            # The time since boot, so that a later agent's generations are later ones.
            self._generation = max(self._generation + 1, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            self._suspended = 0
            self._created.clear()
            self._publish()
            self._clear()

    def close(self) -> None:
        """No verdict holds any more; connections that are open go on."""
        with self._lock:
            self._generation, self._suspended = 0, 0
            self._publish()
            self._clear()

    @property
    def is_open(self) -> bool:
        return self._generation != 0

    def suspend(self) -> None:
        """No verdict holds until `resume`: policy changes, and what was decided before may be wrong."""
        with self._lock:
            self._suspended += 1
            self._publish()

    def resume(self) -> None:
        """What ztunnel has not taken back holds again."""
        with self._lock:
            self._suspended = max(0, self._suspended - 1)
            self._publish()

    def _publish(self) -> None:
        self._lane.update(_ONE, layout.Lane(0 if self._suspended else self._generation).pack())

    def _clear(self) -> None:
        for key in self._verdicts.entries():
            self._verdicts.delete(key)

    # === pods ===

    def join(self, member: Member) -> None:
        """The pod is steered and captured now."""
        with self._lock:
            self._joined += member.pod_id not in self._members
            self._members[member.pod_id] = member
            for connection in self.connections() if self._gone else ():
                if connection.attestation.pod == member.pod_id and connection.flow.pod in self._gone:
                    self._end(connection)

    def withdraw_pod(self, pod_id: int) -> None:
        """The pod leaves the mesh, or is about to: no new connection of it or to it is attested. Open ones go on."""
        with self._lock:
            self._members.pop(pod_id, None)
            self._drop_verdicts(lambda key, verdict: pod_id in (key.pod, verdict.pod))

    def end_pod(self, pod_id: int) -> None:
        """The pod is gone, and its addresses may soon be another one's: connections to it are ended too."""
        with self._lock:
            self.withdraw_pod(pod_id)
            for connection in self.connections():
                if pod_id == connection.flow.pod:
                    self._gone.add(pod_id)
                    self._end(connection)
                elif pod_id == connection.attestation.pod:
                    self._attested.delete(connection.flow.pack())  # its socket died with its namespace

    # === what ztunnel says ===

    def allow(self, pair: Pair) -> str:
        """Lets the pair's new connections go without a proxy; returns why they cannot, empty: they do."""
        with self._lock:
            if not self.is_open:
                return "the lane is off"
            caller, pod = self._member(pair.caller), self._member(pair.pod)
            if caller is None or pod is None or caller is pod:
                return f"pod {pair.caller if caller is None else pair.pod} is not steered on this node"
            if pair.source not in caller.addresses or pair.destination not in pod.addresses:
                return f"{pair.source} or {pair.destination} is no address of these pods"
            if not 0 < pair.port < 65536 or pair.port == _HBONE_PORT:
                return f"port {pair.port} is no app's"
            if fault := self._fault(caller) or self._fault(pod):
                return fault
            key = VerdictKey(pair.destination, caller.pod_id, pair.port)
            try:
                if self._counts.lookup(key.pack()) is None:
                    self._counts.update(key.pack(), PairCounts().pack())
                    self._created.add(pair)
                self._verdicts.update(key.pack(), Verdict(pair.source, self._generation, pod.pod_id).pack())
            except BpfError as e:
                return f"no room for the verdict: {e}"
            self._pairs[key] = pair
            return ""

    def _fault(self, member: Member) -> str:
        try:
            return self._wiring(member.netns_fd, member.addresses)
        except (OSError, NetnsError) as e:
            return f"its wiring cannot be read: {e}"

    def recheck(self) -> None:
        """Withdraws the verdicts of pods that are wired otherwise by now."""
        with self._lock:
            verdicts = [(VerdictKey.unpack(k), Verdict.unpack(v)) for k, v in self._verdicts.entries().items()]
            concerned = {key.pod for key, _ in verdicts} | {verdict.pod for _, verdict in verdicts}
            wrong = {
                pod_id for pod_id in concerned if (member := self._members.get(pod_id)) is None or self._fault(member)
            }
            if wrong:
                self._drop_verdicts(lambda key, verdict: key.pod in wrong or verdict.pod in wrong)

    def withdraw(self, pair: Pair) -> None:
        """The pair's new connections take the tunnel again; open ones go on."""
        with self._lock:
            caller = self._member(pair.caller)
            if caller is not None:
                self._verdicts.delete(VerdictKey(pair.destination, caller.pod_id, pair.port).pack())

    def forbid(self, pair: Pair) -> int:
        """Policy forbids the pair: its open connections are ended too; returns how many."""
        with self._lock:
            self.withdraw(pair)
            caller = self._member(pair.caller)
            if caller is None:
                return 0
            ended = 0
            for connection in self.connections():
                flow = connection.flow
                if (flow.destination, flow.destination_port, connection.attestation.pod) == (
                    pair.destination,
                    pair.port,
                    caller.pod_id,
                ):
                    ended += self._end(connection)
            return ended

    # === what there is ===

    @property
    def joined(self) -> int:
        """How many pods have joined so far: `pairs` may have more to say after another one."""
        return self._joined

    def is_created(self, pair: Pair) -> bool:
        """Whether nothing was counted of the pair before this generation."""
        return pair in self._created

    def connections(self) -> list[OpenConnection]:
        return [
            OpenConnection(Flow.unpack(key), Attestation.unpack(value))
            for key, value in self._attested.entries().items()
        ]

    def pairs(self) -> list[Pair]:
        """Those that have open connections: a ztunnel that is new has to judge them."""
        with self._lock:
            found: dict[Pair, None] = {}
            for connection in self.connections():
                flow = connection.flow
                caller, pod = self._members.get(connection.attestation.pod), self._members.get(flow.pod)
                if caller is not None and pod is not None:
                    pair = Pair(caller.uid, pod.uid, flow.source, flow.destination, flow.destination_port)
                    found[pair] = None
            return list(found)

    def counts(self) -> list[tuple[Pair, PairCounts]]:
        """What the pairs have counted so far. Those that nothing can count for any more are let go of afterwards."""
        with self._lock:
            entries, verdicts = self._counts.entries(), self._verdicts.entries()
            found = []
            idle = {}
            for key, value in entries.items():
                counts = PairCounts.unpack(value)
                pair = self._pair_of(VerdictKey.unpack(key))
                if pair is not None:
                    found.append((pair, counts))
                if key not in verdicts and counts.opened == counts.closed:
                    if self._idle.get(key) == value:
                        self._counts.delete(key)
                        if (gone := self._pairs.pop(VerdictKey.unpack(key), None)) is not None:
                            self._created.discard(gone)
                    else:
                        idle[key] = value
            self._idle = idle
            return found

    def _pair_of(self, key: VerdictKey) -> Pair | None:
        if (known := self._pairs.get(key)) is not None:
            return known
        caller = self._members.get(key.pod)
        pod = next((m for m in self._members.values() if key.destination in m.addresses), None)
        if caller is None or pod is None:
            return None
        source = next((a for a in caller.addresses if a.version == key.destination.version), None)
        return None if source is None else Pair(caller.uid, pod.uid, source, key.destination, key.port)

    def _member(self, uid: str) -> Member | None:
        return next((member for member in self._members.values() if member.uid == uid), None)

    def _drop_verdicts(self, concerns: Callable[[VerdictKey, Verdict], bool]) -> None:
        for key, value in self._verdicts.entries().items():
            if concerns(VerdictKey.unpack(key), Verdict.unpack(value)):
                self._verdicts.delete(key)

    def _end(self, connection: OpenConnection) -> bool:
        """Resets both sides: at the caller's socket, or, if its pod is not ours any more, at the destination's."""
        flow = connection.flow
        caller, pod = self._members.get(connection.attestation.pod), self._members.get(flow.pod)
        if caller is None and pod is None:
            return False
        try:
            if caller is not None and _destroy(caller.netns_fd, flow, connection.attestation.cookie):
                return True
            if pod is not None and _destroy(pod.netns_fd, _reversed(flow), None):
                return True
        except (OSError, NetnsError) as e:
            log.error(
                "the attested connection %s:%d to %s:%d, which is forbidden now, cannot be ended: %s",
                flow.source,
                flow.source_port,
                flow.destination,
                flow.destination_port,
                e,
            )
            return False
        # No socket: what was noted is of no use.
        with contextlib.suppress(BpfError):
            if self._attested.lookup(flow.pack()) == connection.attestation.pack():
                self._attested.delete(flow.pack())
        return False


def _destroy(netns_fd: int, flow: Flow, cookie: int | None) -> bool:
    def work() -> bool:
        if sock_diag.destroy(flow, cookie):
            return True
        # A socket of AF_INET6 may speak IPv4.
        return flow.source.version == 4 and sock_diag.destroy(flow, cookie, socket.AF_INET6)

    return netns.run_in(netns_fd, work)


def _reversed(flow: Flow) -> Flow:
    return Flow(flow.destination, flow.source, flow.pod, flow.destination_port, flow.source_port)
