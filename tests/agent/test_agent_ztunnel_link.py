"""What ztunnel is told, in which order, and what happens when it refuses, goes away or comes back."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_ztunnel import Ztunnel

from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.agent.ztunnel_link import HeldPod, ServedPod, ZtunnelAway, ZtunnelLink, ZtunnelRefused
from undermesh.proto import node_pb2 as wire


class Bench:
    """A link, and what it called back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pids: list[int] = []
        self.held: list[HeldPod] = []
        self.ready = asyncio.Event()
        hello = wire.AgentHello(version=1, node="node-1", trust_domain="cluster.local")
        self.link = ZtunnelLink(path, hello, self.pids.append, self._on_held, self.ready.set)
        self._ztunnels: list[Ztunnel] = []

    async def _on_held(self, held: HeldPod) -> None:
        self.held.append(held)

    async def ztunnel(self, **arguments: object) -> Ztunnel:
        made = await Ztunnel.connect(self.path, **arguments)  # type: ignore[arg-type]
        self._ztunnels.append(made)
        return made

    async def connected(self, **arguments: object) -> Ztunnel:
        """A ztunnel that has its snapshot."""
        self.link.allow_snapshot()
        self.ready.clear()
        made = await self.ztunnel(**arguments)
        await asyncio.wait_for(self.ready.wait(), 5)
        return made

    async def close(self) -> None:
        for ztunnel in self._ztunnels:
            await ztunnel.close()
        await self.link.stop()
        for held in self.held:
            for fd in (held.netns_fd, *held.listeners.values()):
                os.close(fd)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "ztunnel.sock")
    made.link.start()
    yield made
    await made.close()


def served(uid: str = "uid-1", netns: int = 0, listeners: tuple[int, ...] = (0, 0)) -> ServedPod:
    slots = [wire.Listener.ValueType(n) for n in range(len(listeners))]
    return ServedPod(wire.PodAdd(uid=uid, name="cart", listeners=slots), netns, listeners)


def resource(name: str, version: str = "1") -> wire.Resource:
    return wire.Resource(type_url="type", name=name, version=version, value=b"value")


def version_of(name: str, version: str = "1") -> wire.ResourceVersion:
    return wire.ResourceVersion(type_url="type", name=name, version=version)


def test_nobody_else_may_connect_to_the_socket(bench: Bench) -> None:
    assert bench.path.stat().st_mode & 0o777 == 0o600


async def test_the_snapshot_has_its_order_and_waits_for_the_control_planes_state(bench: Bench) -> None:
    for change in (
        bench.link.set_trust_bundle(b"roots"),
        bench.link.set_certificate(wire.Certificate(identity="spiffe://a")),
        bench.link.add_pod(served()),
    ):
        with pytest.raises(ZtunnelAway):
            await change
    bench.link.seed_resources([resource("a")])
    ztunnel = await bench.ztunnel()
    await ztunnel.wait_for("hello")
    await asyncio.sleep(0.05)
    assert ztunnel.kinds == ["hello"]
    assert not bench.link.connected
    bench.link.allow_snapshot()
    await asyncio.wait_for(bench.ready.wait(), 5)
    assert ztunnel.kinds == ["hello", "trust_bundle", "certificate", "resources", "pod_add", "snapshot_end"]
    assert ztunnel.frames[0].hello.node == "node-1"
    assert [frame.seq for frame in ztunnel.frames] == [1, 2, 3, 4, 5, 6]
    assert bench.pids == [os.getpid()]
    assert bench.link.peer == ("one", "test", os.getpid())


async def test_a_pod_goes_out_with_its_netns_and_listeners(bench: Bench) -> None:
    ztunnel = await bench.connected()
    files = [socket.socket() for _ in range(3)]
    netns, *listeners = [sock.fileno() for sock in files]
    await bench.link.add_pod(served(netns=netns, listeners=tuple(listeners)))
    frame = ztunnel.frames[-1]
    assert frame.pod_add.uid == "uid-1"
    received = [os.fstat(fd).st_ino for fd in ztunnel.fds[frame.seq]]
    assert received == [os.fstat(sock.fileno()).st_ino for sock in files]
    for sock in files:
        sock.close()


async def test_a_pod_that_ztunnel_has_already_is_not_sent_again(bench: Bench) -> None:
    ztunnel = await bench.connected()
    await bench.link.add_pod(served())
    await bench.link.add_pod(served())
    assert ztunnel.kinds.count("pod_add") == 1
    await bench.link.add_pod(served(listeners=(0, 0, 0)))
    assert ztunnel.kinds.count("pod_add") == 2


async def test_only_the_difference_of_resources_is_sent_to_one_that_knows_some(bench: Bench) -> None:
    bench.link.seed_resources([resource("same"), resource("newer", "2"), resource("missing")])
    ztunnel = await bench.connected(
        resources=[version_of("same"), version_of("newer"), version_of("gone")],
    )
    sent = [frame.resources for frame in ztunnel.frames if frame.HasField("resources")]
    assert sorted(r.name for part in sent for r in part.upserts) == ["missing", "newer"]
    assert [r.name for part in sent for r in part.removals] == ["gone"]


async def test_a_large_state_goes_out_in_parts(bench: Bench) -> None:
    bench.link.seed_resources([resource(f"r{n}") for n in range(2500)])
    ztunnel = await bench.connected()
    assert [len(frame.resources.upserts) for frame in ztunnel.frames if frame.HasField("resources")] == [
        1000,
        1000,
        500,
    ]


async def test_a_refusal_comes_back_with_ztunnels_words(bench: Bench) -> None:
    ztunnel = await bench.connected()
    ztunnel.refuse = lambda frame: "no such netns" if frame.HasField("pod_add") else ""
    with pytest.raises(ZtunnelRefused, match="no such netns"):
        await bench.link.add_pod(served())
    ztunnel.refuse = lambda frame: ""
    await bench.link.add_pod(served())
    assert bench.link.connected


async def test_a_refused_pod_does_not_hold_up_the_snapshot(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZtunnelAway):
        await bench.link.add_pod(served("bad"))
    ztunnel = await bench.ztunnel()
    ztunnel.refuse = lambda frame: "no such netns" if frame.HasField("pod_add") else ""
    bench.link.allow_snapshot()
    await asyncio.wait_for(bench.ready.wait(), 5)
    assert ztunnel.kinds[-1] == "snapshot_end"
    assert "refused a part of the snapshot" in caplog.text


async def test_who_waits_for_an_answer_learns_that_ztunnel_went_away(bench: Bench) -> None:
    ztunnel = await bench.connected()
    ztunnel.silent = True
    waiting = [
        asyncio.create_task(bench.link.add_pod(served())),
        asyncio.create_task(bench.link.drain_pod("uid-1")),
        asyncio.create_task(bench.link.dump(wire.DumpKind.PODS)),
    ]
    await ztunnel.wait_for("dump")
    await ztunnel.close()
    for task in waiting:
        with pytest.raises(ZtunnelAway, match="went away"):
            await asyncio.wait_for(task, 5)
    assert not bench.link.connected
    assert bench.link.peer is None


async def test_resources_wait_for_a_ztunnel_however_long_and_come_with_its_snapshot(bench: Bench) -> None:
    applying = asyncio.create_task(bench.link.apply_resources([resource("a")], []))
    await asyncio.sleep(0.05)
    assert not applying.done()
    ztunnel = await bench.connected()
    await asyncio.wait_for(applying, 5)
    assert [r.name for frame in ztunnel.frames for r in frame.resources.upserts] == ["a"]
    await bench.link.apply_resources([], [wire.ResourceName(type_url="type", name="a")])
    assert [r.name for r in ztunnel.frames[-1].resources.removals] == ["a"]


async def test_a_ztunnel_that_connects_anew_takes_its_own_place_and_gets_everything(bench: Bench) -> None:
    old = await bench.connected()
    await bench.link.add_pod(served())
    await bench.link.set_certificate(wire.Certificate(identity="spiffe://a"))
    new = await bench.connected()
    await asyncio.wait_for(old.ended.wait(), 5)
    assert "pod_add" in new.kinds and "certificate" in new.kinds
    await bench.link.drain_pod("uid-1")
    assert new.kinds[-1] == "pod_drain"


async def test_what_a_ztunnel_holds_is_handed_back_before_it_gets_anything(bench: Bench) -> None:
    files = [socket.socket() for _ in range(3)]
    slots = [wire.Listener.OUTBOUND_V4, wire.Listener.HBONE_V6]
    held = wire.HeldPod(uid="uid-1", netns_inode=77, listeners=slots)
    await bench.connected(held=[(held, [sock.fileno() for sock in files])])
    (given,) = bench.held
    assert (given.uid, given.netns_inode) == ("uid-1", 77)
    assert list(given.listeners) == [ListenerSlot.OUTBOUND_V4, ListenerSlot.HBONE_V6]
    inodes = [os.fstat(fd).st_ino for fd in (given.netns_fd, *given.listeners.values())]
    assert inodes == [os.fstat(sock.fileno()).st_ino for sock in files]
    assert bench.link.orphans == {"uid-1"}
    for sock in files:
        sock.close()
    await bench.link.remove_pod("uid-1")
    assert bench.link.orphans == set()


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (wire.ZtunnelFrame(hello=wire.ZtunnelHello(version=2)), "install agent and ztunnel of one release"),
        (wire.ZtunnelFrame(ack=wire.Ack(seq=1)), "sent ack before its hello ended"),
        (wire.ZtunnelFrame(held_pod=wire.HeldPod(uid="x", listeners=[0])), "pod x: 0 FDs for 1 listeners and a netns"),
    ],
)
async def test_one_that_breaks_the_protocol_is_turned_away_with_the_reason(
    bench: Bench, caplog: pytest.LogCaptureFixture, first: wire.ZtunnelFrame, message: str
) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, str(bench.path))
    data = first.SerializeToString()
    await loop.sock_sendall(sock, len(data).to_bytes(4, "big") + data)
    assert await asyncio.wait_for(loop.sock_recv(sock, 1), 5) == b""
    assert message in caplog.text
    sock.close()
    await bench.connected()


async def test_a_dump_brings_ztunnels_answer(bench: Bench) -> None:
    with pytest.raises(ZtunnelAway, match="see the log of its container"):
        await bench.link.dump(wire.DumpKind.PODS)
    ztunnel = await bench.connected()
    ztunnel.stats["uid-1"] = wire.PodStats(uid="uid-1", inbound_tunnels=3)
    reply = await bench.link.dump(wire.DumpKind.PODS)
    assert [pod.inbound_tunnels for pod in reply.pods.pods] == [3]


async def test_changes_during_the_snapshot_are_not_lost_and_nothing_old_follows(bench: Bench) -> None:
    for uid in ("a", "b", "c"):
        with pytest.raises(ZtunnelAway):
            await bench.link.add_pod(served(uid))
    ztunnel = await bench.ztunnel()
    ztunnel.silent = True
    bench.link.allow_snapshot()
    await ztunnel.wait_for("hello")
    await ztunnel.say(wire.ZtunnelFrame(ack=wire.Ack(seq=1)))
    await ztunnel.wait_for("trust_bundle")
    removal = asyncio.create_task(bench.link.remove_pod("c"))
    await ztunnel.wait_for("pod_remove")
    ztunnel.silent = False
    for frame in list(ztunnel.frames[1:]):
        await ztunnel.say(wire.ZtunnelFrame(ack=wire.Ack(seq=frame.seq)))
    await asyncio.wait_for(bench.ready.wait(), 5)
    await removal
    assert [frame.pod_add.uid for frame in ztunnel.frames if frame.HasField("pod_add")] == ["a", "b"]


async def test_a_second_start_replaces_a_socket_that_was_left_behind(bench: Bench, tmp_path: Path) -> None:
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    other = Bench(left)
    other.link.start()
    await other.connected()
    await other.close()
