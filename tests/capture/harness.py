"""A node under test: the product's own NodeKernel and PodKernel, with this process in ztunnel's place.

The node has a cgroup tree of its own, <cgroup2>/um-test-<hex>, with the programs attached to its root:
    agent/                                   this process, which is the agent and ztunnel
    system/                                  the kubelet's place: processes of the node
    kubepods.slice/kubepods-pod<uid>.slice/  processes of pods
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capture.packets import Watch
from capture.remote import RemoteProcess, RemoteSocket
from capture.topology import Family, Netns, Network, addresses_of, wait_until
from undermesh.agent import cgroups, netns
from undermesh.agent.attested_lane import AttestedLane
from undermesh.agent.bpf import node_capture
from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.agent.fd_store import NoStore
from undermesh.agent.node_kernel import NodeKernel, probe_ports
from undermesh.agent.pod_kernel import KernelContext, PodKernel
from undermesh.agent.pod_record import PodRecord, PodRecords
from undermesh.agent.pod_wiring import Wiring
from undermesh.gen import marks

BUILD: Final = Path(__file__).parents[2] / "build"
OBJECTS: Final = BUILD / "bpf"
BPFFS: Final = Path("/sys/fs/bpf")
HBONE_PORT: Final = 15008
# Long enough for a busy machine, and for an emulated one; nothing waits that long when all is well.
PATIENCE_S: Final = 10.0
# How long a thing that must not happen is given.
QUIET_S: Final = 0.4


@dataclass(frozen=True)
class Arrival:
    """A connection as ztunnel sees it."""

    slot: ListenerSlot
    socket: socket.socket
    destination: tuple[str, int]  # what the client dialled
    client: tuple[str, int]


class Node:
    """One node with its pods. `close` takes everything out again, whatever state it is in."""

    def __init__(self) -> None:
        self.name = f"um-test-{uuid.uuid4().hex[:8]}"
        self.mount = cgroups.find_mount()
        self.root = self.mount / self.name
        self.pins = BPFFS / self.name
        self.pods: list[Pod] = []
        self._workers: list[RemoteProcess] = []
        self._pod_ids = 100
        with ExitStack() as undo:
            self._make(undo)
            self._undo = undo.pop_all()

    def _make(self, undo: ExitStack) -> None:
        mount_bpffs()
        home = self.mount / cgroups.of_process("self").lstrip("/")
        undo.callback(remove_cgroups, self.root)
        for group in (self.root, self.root / "agent", self.root / "system", self.root / "kubepods.slice"):
            group.mkdir()
        undo.callback(join, home)
        join(self.root / "agent")
        run_dir = undo.enter_context(tempfile.TemporaryDirectory(prefix=self.name))
        self.network = Network()
        undo.callback(self.network.close)
        self.capture = node_capture.load(OBJECTS, self.pins, self.root)
        undo.callback(self.capture.remove)
        self.kernel = NodeKernel(self.capture, cgroups.open_tree(self.root))
        self.kernel._began -= 3600.0  # every ztunnel that is to come has come
        self.lane = AttestedLane(
            self.capture,
            lambda fd, addresses: netns.run_in(self.network.node.fd, lambda: Wiring().fault(fd, addresses)),
        )
        self.context = KernelContext(OBJECTS, self.capture, PodRecords(Path(run_dir)), NoStore(), self.lane)
        self.ensure()

    def ensure(self, *probed: tuple[Pod, int]) -> None:
        """What the agent does every few seconds for the node, in the node's own namespace."""
        wanted: dict[bytes, bytes] = {}
        for pod, port in probed:
            wanted |= probe_ports(pod.kernel.record.pod_id, tuple(addresses_of(pod.addresses)), frozenset({port}))
        netns.run_in(self.network.node.fd, lambda: self.kernel.ensure(wanted))

    def pod(self, bridged: bool = False, device: str = "eth0", ipv6: bool = True) -> Pod:
        """A pod that is not enrolled yet."""
        namespace, addresses = self.network.plug(bridged, device, ipv6)
        self._pod_ids += 1
        pod = Pod(self, namespace, addresses, self._pod_ids)
        self.pods.append(pod)
        return pod

    def enrolled_pod(self, bridged: bool = False, device: str = "eth0", ipv6: bool = True) -> Pod:
        pod = self.pod(bridged, device, ipv6)
        pod.enrol()
        return pod

    def worker(self, namespace: Netns, cgroup: Path | None = None) -> RemoteProcess:
        """A process in a namespace; without a cgroup of its own one of the node's system."""
        worker = RemoteProcess(namespace.path, cgroup or self.root / "system")
        self._workers.append(worker)
        return worker

    def watch_peer(self) -> Watch:
        """All that reaches the peer by wire."""
        return Watch(self.network.peer, "eth0")

    def close(self) -> None:
        with self._undo:
            for pod in self.pods:
                self._undo.callback(pod.close)
            for worker in self._workers:
                self._undo.callback(worker.end)


class Pod:
    """A pod of a Node: its namespace, its processes, and what the agent keeps for it."""

    def __init__(self, node: Node, namespace: Netns, addresses: dict[int, str], pod_id: int) -> None:
        self.node = node
        self.netns = namespace
        self.addresses = addresses
        self.uid = str(uuid.uuid4())
        self.cgroup = node.root / "kubepods.slice" / f"kubepods-pod{self.uid.replace('-', '_')}.slice"
        self.cgroup.mkdir()
        record = PodRecord(self.uid, "test", f"pod-{pod_id}", pod_id, namespace.inode)
        self.kernel = PodKernel(node.context, record, os.dup(namespace.fd))
        self._app: RemoteProcess | None = None
        self._closed = False

    @property
    def app(self) -> RemoteProcess:
        """A process of the pod."""
        if self._app is None:
            self._app = self.node.worker(self.netns, self.cgroup)
        return self._app

    def address(self, family: Family) -> str:
        return self.addresses[family.version]

    # === what the agent does ===

    def enrol(self, outbound: bool = True) -> None:
        """In the order of the product: inbound first, outbound last."""
        self.prepare()
        self.kernel.ensure_inbound()
        if outbound:
            self.kernel.ensure_outbound(True)

    def prepare(self) -> None:
        """Routing and listeners, which steer nothing yet."""
        self.kernel.look(addresses_of(self.addresses), ())

    def mend(self) -> list[str]:
        """One iteration of the agent over an enrolled pod; what it had to mend."""
        _, mended = self.kernel.look(addresses_of(self.addresses), ())
        mended += self.kernel.ensure_inbound()
        return mended + self.kernel.ensure_outbound(True)

    def unenrol(self) -> None:
        self.kernel.ensure_outbound(False)
        self.kernel.stop_inbound()
        self.kernel.remove(namespace_lives=True)

    # === what ztunnel does ===

    def accept(self, slot: ListenerSlot, seconds: float = PATIENCE_S) -> Arrival:
        """The next connection on one listener."""
        arrival = self._next([slot], seconds)
        assert arrival is not None, f"nothing arrived at {slot.name} within {seconds} s"
        return arrival

    def arrivals(self, seconds: float = QUIET_S) -> list[Arrival]:
        """Whatever arrives at any listener in this time, for tests in which nothing should."""
        found, deadline = [], time.monotonic() + seconds
        while (arrival := self._next(list(self.kernel.sockets), max(0.0, deadline - time.monotonic()))) is not None:
            found.append(arrival)
            arrival.socket.close()
        return found

    def _next(self, slots: Sequence[ListenerSlot], seconds: float) -> Arrival | None:
        ready, _, _ = select.select([self.kernel.sockets[slot] for slot in slots], [], [], seconds)
        if not ready:
            return None
        slot = next(slot for slot in slots if self.kernel.sockets[slot] in ready)
        accepted, client = self.kernel.sockets[slot].accept()
        accepted.settimeout(PATIENCE_S)
        if slot in (ListenerSlot.OUTBOUND_V4, ListenerSlot.OUTBOUND_V6):
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, marks.ANSWER)
        return Arrival(slot, accepted, accepted.getsockname()[:2], client[:2])

    def deliver(
        self, family: Family, client: str, port: int, source_port: int = 0, patience: float = PATIENCE_S
    ) -> socket.socket:
        """ztunnel's leg to the app: from the client's own address, by way of lo.

        Raises:
            OSError: the app does not listen, or does not answer.
        """
        leg = self.netns.socket(family)
        leg.settimeout(patience)
        leg.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, marks.DELIVERY)
        leg.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        leg.setsockopt(family.level, family.transparent, 1)
        try:
            if source_port:
                leg.bind((client, source_port))
            else:
                self._bind_in_range(leg, client)
            leg.connect((self.address(family), port))
        except OSError:
            leg.close()
            raise
        return leg

    def _bind_in_range(self, leg: socket.socket, client: str) -> None:
        low, high = self.kernel.delivery_ports[0]
        start = low + int.from_bytes(os.urandom(2), "big") % (high - low)
        for port in [*range(start, high + 1), *range(low, start)]:
            try:
                leg.bind((client, port))
            except OSError:
                continue
            return
        raise AssertionError("no delivery port is free")

    def dial(self, family: Family, address: str, port: int) -> socket.socket:
        """ztunnel's leg to the outside, with the mark that is never captured."""
        leg = self.netns.socket(family)
        leg.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, marks.BYPASS)
        leg.connect((address, port))
        return leg

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.kernel.remove(namespace_lives=False)
        self.netns.close()


def slot_of(name: str, family: Family) -> ListenerSlot:
    """OUTBOUND, PLAINTEXT or HBONE of a family."""
    return ListenerSlot[f"{name}_V{family.version}"]


def listen(
    where: RemoteProcess, family: Family, port: int, address: str | None = None, protocol: int = 0
) -> RemoteSocket:
    """A server of a worker, with SO_REUSEADDR as nearly all have it."""
    server = where.socket(family.number, socket.SOCK_STREAM, protocol)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address or family.any, port))
    server.listen(128)
    server.settimeout(PATIENCE_S)
    return server


def connect(
    where: RemoteProcess, family: Family, address: str, port: int, options: Sequence[tuple[int, int, Any]] = ()
) -> RemoteSocket:
    """A client of a worker; options are set first."""
    client = where.socket(family.number)
    client.settimeout(PATIENCE_S)
    for option in options:
        client.setsockopt(*option)
    client.connect((address, port))
    return client


def assert_talks(one: Any, other: Any, words: bytes = b"to and fro") -> None:
    """Both directions of a connection work; each side a socket of a worker or of this process."""
    one.sendall(words)
    assert receive(other, len(words)) == words
    other.sendall(words[::-1])
    assert receive(one, len(words)) == words[::-1]


def receive(sock: Any, size: int) -> bytes:
    """Exactly so many bytes, fewer at the end of the stream."""
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def join(cgroup: Path) -> None:
    """Moves this process."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def remove_cgroups(root: Path) -> None:
    for group in sorted(root.rglob("*/"), key=lambda path: -len(path.parts)):
        if group.is_dir():
            _remove_cgroup(group)
    _remove_cgroup(root)


def _remove_cgroup(group: Path) -> None:
    """A killed process leaves its cgroup a moment after it was reaped."""

    def gone() -> bool:
        try:
            group.rmdir()
        except OSError:
            return False
        return True

    assert wait_until(gone), f"{group} still holds {(group / 'cgroup.procs').read_text().split()}"


def mount_bpffs() -> None:
    if not any(line.split()[1:3] == [str(BPFFS), "bpf"] for line in Path("/proc/mounts").read_text().splitlines()):
        subprocess.run(["mount", "-t", "bpf", "bpf", str(BPFFS)], check=True)
