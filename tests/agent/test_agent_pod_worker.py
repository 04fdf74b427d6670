"""One pod on its way into the mesh and out again: each step waits for the one before."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import SimpleNamespace

import pytest
from agent_bench import LinkBench, Publisher, until
from capture.harness import Node, Pod
from capture.topology import V4, addresses_of

from undermesh.agent import inspection, pod_worker
from undermesh.agent.bpf import layout, libbpf
from undermesh.agent.bpf.layout import EnrolmentFlags, IPAddress
from undermesh.agent.pod_kernel import PodKernel
from undermesh.agent.pod_stats import PodStatsBook
from undermesh.agent.pod_worker import PodFacts, PodWorker, State
from undermesh.proto import node_pb2 as wire

pytestmark = pytest.mark.root

IDENTITY = "spiffe://cluster.local/ns/test/sa/cart"
IN, OUT = EnrolmentFlags.INBOUND, EnrolmentFlags.OUTBOUND
NOTHING = EnrolmentFlags(0)


class Bench:
    """A worker for one pod of a real node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.pod = node.pod()
        self.kernel = PodKernel(node.context, self.pod.kernel.record, os.dup(self.pod.netns.fd))
        self.publisher = Publisher()
        self.links = LinkBench()
        self.gone = asyncio.Event()
        self.worker: PodWorker | None = None

    def facts(self, enrolled: bool = True) -> PodFacts:
        record = self.kernel.record
        return PodFacts(
            uid=record.uid,
            namespace=record.namespace,
            name=record.name,
            service_account="cart",
            identity=IDENTITY,
            workload_uid=f"Kubernetes//Pod/test/{record.name}",
            addresses=tuple(addresses_of(self.pod.addresses)),
            declared_ports=frozenset({8080}),
            enrolled=enrolled,
            reason="label",
        )

    def start(self, enrolled: bool = True, *, fresh: bool = False) -> PodWorker:
        self.worker = PodWorker(
            self.facts(enrolled),
            self.kernel,
            self.links.link,
            PodStatsBook(self.links.link.dump),
            self.publisher,
            lambda identity: "the CA is away",
            lambda worker: self.gone.set(),
            fresh=fresh,
        )
        self.links.on_ready = self.worker.wake
        return self.worker

    async def enrolled(self) -> PodWorker:
        await self.links.connect()
        await self.links.certify(IDENTITY)
        worker = self.start()
        await until(lambda: worker.state is State.ENROLLED, "enrolled")
        return worker

    def unenrol(self) -> None:
        assert self.worker is not None
        self.worker.update(self.facts(enrolled=False))

    def count(self, **stats: int) -> None:
        """What ztunnel says of the pod's connections."""
        assert self.links.ztunnel is not None
        self.links.ztunnel.stats[self.kernel.record.uid] = wire.PodStats(uid=self.kernel.record.uid, **stats)

    @property
    def flags(self) -> EnrolmentFlags:
        return self.pod.kernel.present_flags

    @property
    def steered(self) -> bool:
        return (self.node.pins / "pods" / self.kernel.record.uid / "link").exists()

    async def close(self) -> None:
        if self.worker is not None:
            await self.worker.stop()
        await self.links.close()
        if not self.gone.is_set():
            self.kernel.remove(namespace_lives=False)
        self.pod.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def bench(node: Node) -> AsyncIterator[Bench]:
    made = Bench(node)
    yield made
    await made.close()


def rules(pod: Pod) -> str:
    return pod.netns.ip_of(V4, "rule")


def transitions(bench: Bench) -> list[bool]:
    """Whether plaintext that STRICT forbids passes, as ztunnel is told from time to time."""
    assert bench.links.ztunnel is not None
    return [frame.pod_add.in_transition for frame in bench.links.ztunnel.frames if frame.HasField("pod_add")]


async def test_nothing_is_steered_before_ztunnel_is_there(bench: Bench) -> None:
    worker = bench.start()
    await until(lambda: worker.reason == "ztunnel is not connected", "the reason")
    assert (worker.state, bench.flags, bench.steered) == (State.ENROLLING, NOTHING, False)
    await bench.links.connect()
    await until(lambda: "no certificate" in worker.reason, "the next reason")


async def test_nothing_is_steered_before_there_is_a_certificate(bench: Bench) -> None:
    ztunnel = await bench.links.connect()
    worker = bench.start()
    await until(lambda: "no certificate" in worker.reason, "the reason")
    assert worker.reason == f"no certificate for {IDENTITY} yet: the CA is away"
    assert (worker.state, bench.flags, bench.steered) == (State.ENROLLING, NOTHING, False)
    (added,) = [frame.pod_add for frame in ztunnel.frames if frame.HasField("pod_add")]
    assert len(added.listeners) == 6
    assert added.netns_inode == bench.pod.netns.inode
    assert [(r.low, r.high) for r in added.delivery_ports] == bench.kernel.delivery_ports
    await bench.links.certify(IDENTITY)
    worker.wake()
    await until(lambda: worker.state is State.ENROLLED, "enrolled")


async def test_outbound_capture_waits_until_everyone_knows_that_the_pod_accepts_tunnels(bench: Bench) -> None:
    bench.publisher.published.clear()
    await bench.links.connect()
    await bench.links.certify(IDENTITY)
    worker = bench.start()
    await until(lambda: bench.steered, "steered")
    await until(lambda: bench.publisher.names == ["ACCEPTS_TUNNELS"], "published")
    await asyncio.sleep(0.1)
    assert bench.flags == IN
    assert worker.state is State.ENROLLING
    assert transitions(bench) == [True]
    bench.publisher.published.set()
    await until(lambda: worker.state is State.ENROLLED, "enrolled")
    assert transitions(bench) == [True, False]
    assert bench.flags == IN | OUT
    assert bench.publisher.names == ["ACCEPTS_TUNNELS", "SENDS_TUNNELS"]


async def test_a_pod_that_has_just_begun_is_never_in_transition(bench: Bench) -> None:
    await bench.links.connect()
    await bench.links.certify(IDENTITY)
    worker = bench.start(fresh=True)
    await until(lambda: worker.state is State.ENROLLED, "enrolled")
    assert transitions(bench) == [False]
    assert bench.publisher.names == ["SENDS_TUNNELS"]


async def test_a_control_plane_that_does_not_publish_is_named_and_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_worker, "_PUBLISH_TIMEOUT_S", 0.05)
    bench.publisher.published.clear()
    await bench.links.connect()
    await bench.links.certify(IDENTITY)
    worker = bench.start()
    await until(lambda: "has not published ACCEPTS_TUNNELS" in worker.reason, "the reason")
    assert (worker.state, bench.flags) == (State.ENROLLING, IN)
    bench.publisher.published.set()
    worker.wake()
    await until(lambda: worker.state is State.ENROLLED, "enrolled")


async def test_damage_is_mended_while_enrolled(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    worker = await bench.enrolled()
    whole = rules(bench.pod)
    bench.pod.netns.ip_of(V4, "rule del pref 1")
    worker.wake()
    await until(lambda: rules(bench.pod) == whole, "mended")
    await until(lambda: "mended IPv4 rules and routes" in caplog.text, "said so")


async def test_damage_is_mended_while_ztunnel_is_away(bench: Bench) -> None:
    worker = await bench.enrolled()
    assert bench.links.ztunnel is not None
    await bench.links.ztunnel.close()
    await until(lambda: not bench.links.link.connected, "away")
    whole = rules(bench.pod)
    bench.pod.netns.ip_of(V4, "rule del pref 1")
    worker.wake()
    await until(lambda: rules(bench.pod) == whole, "mended")
    assert bench.flags == IN | OUT


async def test_a_rule_of_others_in_front_is_a_failure_with_its_reason_until_it_is_moved(bench: Bench) -> None:
    bench.pod.netns.ip_of(V4, "rule add pref 5 fwmark 0x1 lookup 77")
    await bench.links.connect()
    await bench.links.certify(IDENTITY)
    worker = bench.start()
    await until(lambda: worker.state is State.FAILED, "failed")
    assert "preference 5, ahead of 8" in worker.reason
    assert bench.publisher.states[-1] == (bench.kernel.record.uid, "PLAIN", worker.reason)
    bench.pod.netns.ip_of(V4, "rule del pref 5 fwmark 0x1")
    worker.wake()
    await until(lambda: worker.state is State.ENROLLED, "enrolled")


async def test_leaving_waits_for_tunnels_and_then_for_connections(bench: Bench) -> None:
    before = rules(bench.pod)
    worker = await bench.enrolled()
    bench.count(inbound_tunnels=2, captured_connections=1)
    bench.unenrol()
    await until(lambda: "2 tunnels of peers are still in use" in worker.reason, "tunnels")
    assert (bench.flags, bench.steered) == (IN, True)
    assert bench.links.ztunnel is not None
    assert "pod_drain" in bench.links.ztunnel.kinds
    assert bench.publisher.names[-1] == "PLAIN"
    assert transitions(bench) == [True, False, True]
    assert bench.links.ztunnel.kinds.index("pod_drain") > max(
        place for place, kind in enumerate(bench.links.ztunnel.kinds) if kind == "pod_add"
    )
    bench.count(captured_connections=1)
    await until(lambda: "1 connections in the mesh are still open" in worker.reason, "connections")
    assert not bench.steered
    assert rules(bench.pod) != before
    assert not bench.gone.is_set()
    bench.count()
    await asyncio.wait_for(bench.gone.wait(), 10)
    assert rules(bench.pod) == before
    assert "pod_remove" in bench.links.ztunnel.kinds
    assert (worker.state, bench.flags) == (State.PLAIN, NOTHING)


async def test_leaving_waits_until_everyone_knows_however_long_the_control_plane_is_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers that do not know would tunnel to a pod whose steering is off."""
    monkeypatch.setattr(pod_worker, "_PUBLISH_TIMEOUT_S", 0.05)
    worker = await bench.enrolled()
    bench.publisher.published.clear()
    bench.unenrol()
    await until(lambda: "has not published PLAIN" in worker.reason, "the reason")
    await asyncio.sleep(0.5)
    assert (worker.state, bench.flags, bench.steered) == (State.UNENROLLING, IN, True)
    bench.publisher.published.set()
    await asyncio.wait_for(bench.gone.wait(), 10)


async def test_leaving_while_ztunnel_is_away_waits_for_it(bench: Bench) -> None:
    worker = await bench.enrolled()
    assert bench.links.ztunnel is not None
    await bench.links.ztunnel.close()
    await until(lambda: not bench.links.link.connected, "away")
    bench.unenrol()
    await until(lambda: "its connections cannot be counted" in worker.reason, "the reason")
    assert (bench.flags, bench.steered) == (IN, True)
    await bench.links.connect()
    await asyncio.wait_for(bench.gone.wait(), 10)


async def test_who_changes_his_mind_on_the_way_out_is_enrolled_again(bench: Bench) -> None:
    worker = await bench.enrolled()
    bench.count(inbound_tunnels=1)
    bench.unenrol()
    await until(lambda: bench.flags == IN, "outbound capture is off")
    worker.update(bench.facts(enrolled=True))
    await until(lambda: worker.state is State.ENROLLED and bench.flags == IN | OUT, "enrolled again")
    assert bench.publisher.names[-2:] == ["ACCEPTS_TUNNELS", "SENDS_TUNNELS"]
    assert not bench.gone.is_set()


async def test_a_pod_that_is_gone_leaves_nothing(bench: Bench) -> None:
    worker = await bench.enrolled()
    bench.pod.netns.close()
    await worker.abandon()
    assert bench.gone.is_set()
    assert not (bench.node.pins / "pods" / bench.kernel.record.uid).exists()
    assert bench.kernel.record.uid not in bench.node.context.records.load()
    assert bench.kernel.netns_fd == -1


async def test_an_agent_that_ends_leaves_the_kernel_as_it_is(bench: Bench) -> None:
    worker = await bench.enrolled()
    whole = rules(bench.pod)
    await worker.stop()
    assert (bench.flags, bench.steered, rules(bench.pod)) == (IN | OUT, True, whole)


async def test_a_pod_that_goes_while_a_thread_works_on_it_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling ends no thread: one that routed on after the pod was let go of left its devices in a map."""
    working, go_on = threading.Event(), threading.Event()
    routing = bench.kernel._routing

    def slow(addresses: Sequence[IPAddress]) -> list[str]:
        working.set()
        go_on.wait(5)
        return routing(addresses)

    monkeypatch.setattr(bench.kernel, "_routing", slow)
    worker = bench.start()
    await until(working.is_set, "at work")
    going = asyncio.create_task(worker.abandon())
    await asyncio.sleep(0.2)
    go_on.set()
    await going
    await asyncio.sleep(0.2)
    devices = bench.node.capture.maps["pod_devices"]
    assert not [key for key in devices if layout.PodDevice.unpack(key).pod == bench.kernel.record.pod_id]


# === what wakes a worker ===


async def test_changes_by_others_wake_the_worker_and_its_own_do_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = bench.kernel.look

    def counted(addresses: Sequence[IPAddress], avoid: Iterable[int]) -> pod_worker.Look:
        looks.append(look(addresses, avoid))
        return looks[-1]

    monkeypatch.setattr(bench.kernel, "look", counted)
    await bench.enrolled()
    await asyncio.sleep(0.3)
    assert len(looks) == 1, "its own rules and routes are no news"
    whole = rules(bench.pod)
    bench.pod.netns.ip_of(V4, "rule del pref 1")
    await until(lambda: rules(bench.pod) == whole, "mended")
    await asyncio.sleep(0.3)
    assert [mended for _, mended in looks[1:]] == [["IPv4 rules and routes"]], "one look, which mended"


# === looks between the steps ===


@pytest.mark.parametrize("damage", ["sysctl", "slot", "capture"])
async def test_a_look_mends_what_tells_of_itself_to_nobody(
    bench: Bench, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    worker = await bench.enrolled()
    await until(lambda: worker.is_settled, "settled")
    if damage == "sysctl":
        bench.pod.netns.sysctl("ipv4/tcp_fwmark_accept", "0")
    elif damage == "slot":
        held = libbpf.Map.pinned(bench.kernel.pins / "listeners")
        assert held.delete(layout.u32(layout.ListenerSlot.OUTBOUND_V4))
        held.close()
    else:
        bench.node.capture.maps["enrolled"].update(
            layout.u64(bench.kernel.cookie), layout.Enrolment(bench.kernel.record.pod_id, IN).pack()
        )
    await inspection.look_at([worker])
    if damage == "capture":  # the worker's own to mend, in its order
        await until(lambda: bench.flags == IN | OUT, "captured")
    else:
        what = {"sysctl": "ipv4/tcp_fwmark_accept", "slot": "listener slot OUTBOUND_V4"}[damage]
        assert f"mended {what}" in caplog.text
        assert bench.kernel.look(worker.facts.addresses, ())[1] == []


async def test_ztunnel_is_told_when_the_pod_draws_its_ports_from_another_range(bench: Bench) -> None:
    worker = await bench.enrolled()
    await until(lambda: worker.is_settled, "settled")
    bench.pod.netns.sysctl("ipv4/ip_local_port_range", "20000 20100")
    await inspection.look_at([worker])
    ztunnel = bench.links.ztunnel
    assert ztunnel is not None

    def told() -> list[tuple[int, int]]:
        added = [frame.pod_add for frame in ztunnel.frames if frame.HasField("pod_add")]
        return [(ports.low, ports.high) for ports in added[-1].delivery_ports]

    await until(lambda: told() == [(20101, 65535), (1024, 19999)], "told")


async def test_a_pod_on_its_way_in_or_out_is_not_looked_at(bench: Bench) -> None:
    """A look puts steering back, which the way out has just taken off."""
    worker = await bench.enrolled()
    await until(lambda: worker.is_settled, "settled")
    bench.count(captured_connections=1)
    bench.unenrol()
    await inspection.look_at([worker])
    await until(lambda: not bench.steered, "not steered")
    await inspection.look_at([worker])
    assert not bench.steered


async def test_a_pod_that_left_while_a_look_was_in_the_queue_is_not_looked_at(bench: Bench) -> None:
    worker = await bench.enrolled()
    await until(lambda: worker.is_settled, "settled")
    lock = worker._kernel_lock

    async def leave() -> None:
        async with lock:
            worker.state = State.UNENROLLING

    await lock.acquire()
    leaving = asyncio.create_task(leave())
    await asyncio.sleep(0)
    lock.release()  # free, and promised to who waits
    assert worker.is_settled and not await worker.lend()
    await leaving
    worker.state = State.ENROLLED
    assert await worker.lend()
    worker.take_back()


async def test_a_pod_that_cannot_be_looked_at_says_why_and_hinders_no_other(node: Node, bench: Bench) -> None:
    other = Bench(node)
    workers = [await bench.enrolled(), await other.enrolled()]
    await until(lambda: all(worker.is_settled for worker in workers), "settled")
    bench.pod.netns.ip_of(V4, "rule add pref 5 fwmark 0x1 lookup 77")
    other.pod.netns.sysctl("ipv4/tcp_fwmark_accept", "0")
    await inspection.look_at(workers)
    assert "preference 5, ahead of 8" in workers[0].reason
    assert other.pod.netns.sysctl("ipv4/tcp_fwmark_accept") == "1"
    bench.pod.netns.ip_of(V4, "rule del pref 5 fwmark 0x1")
    await inspection.look_at(workers)
    await until(lambda: workers[0].reason == "label", "the reason is gone")
    await other.close()


def test_each_tick_looks_at_its_share_and_the_oldest_first() -> None:
    now = 100.0
    pods = [SimpleNamespace(is_settled=True, looked=now - 6 - i / 100, name=i) for i in range(40)]
    pods += [SimpleNamespace(is_settled=True, looked=now - 1, name=-1), SimpleNamespace(is_settled=False, looked=0.0)]
    assert [pod.name for pod in inspection.due(pods, now)] == [39, 38, 37, 36, 35]  # type: ignore[arg-type]
