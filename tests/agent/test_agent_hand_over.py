"""Two ztunnels on one link: which of them accepts, what the one that drains is still told, and who is asked back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from test_agent_ztunnel_link import Bench, resource, served

from undermesh.agent import ztunnel_link
from undermesh.agent.ztunnel_link import ZtunnelAway, ZtunnelRefused
from undermesh.proto import node_pb2 as wire


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(ztunnel_link, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(ztunnel_link, "_RESTART_WAIT_S", 0.1)
    made = Bench(tmp_path / "ztunnel.sock")
    made.link.start()
    yield made
    await made.close()


async def test_the_older_one_drains_once_the_newer_one_has_everything(bench: Bench) -> None:
    old = await bench.connected(started_ms=1)
    await bench.link.add_pod(served())
    new = await bench.ztunnel(instance="two", started_ms=2)
    new.silent = True
    await new.wait_for("hello")
    assert "drain" not in old.kinds
    bench.ready.clear()
    new.silent = False
    await new.say(wire.ZtunnelFrame(ack=wire.Ack(seq=1)))
    await asyncio.wait_for(bench.ready.wait(), 5)
    await old.wait_for("drain")
    assert new.kinds[-2:] == ["pod_add", "snapshot_end"]
    assert bench.link.peer is not None and bench.link.peer[0] == "two"


async def test_the_one_that_drains_is_told_all_but_new_pods(bench: Bench) -> None:
    old = await bench.connected(started_ms=1)
    new = await bench.connected(instance="two", started_ms=2)
    await old.wait_for("drain")
    link, before = bench.link, len(old.frames)
    await link.add_pod(served())
    await link.set_certificate(wire.Certificate(identity="spiffe://a"))
    await link.set_trust_bundle(b"roots")
    await link.apply_resources([resource("a")], [])
    await link.drain_pod("uid-1")
    await link.remove_pod("uid-1")
    everything = ["pod_add", "certificate", "trust_bundle", "resources", "pod_drain", "pod_remove"]
    assert new.kinds[-6:] == everything
    assert old.kinds[before:] == everything[1:]


async def test_counts_are_those_of_both_and_what_drains_is_listed(bench: Bench) -> None:
    old = await bench.connected(started_ms=1)
    new = await bench.connected(instance="two", started_ms=2)
    old.stats["a"] = wire.PodStats(uid="a", captured_connections=2, inbound_tunnels=1)
    old.stats["b"] = wire.PodStats(uid="b", inbound_connections=4)
    new.stats["a"] = wire.PodStats(uid="a", captured_connections=1)
    pods = (await bench.link.dump(wire.DumpKind.PODS)).pods.pods
    assert {p.uid: (p.captured_connections, p.inbound_connections, p.inbound_tunnels) for p in pods} == {
        "a": (3, 0, 1),
        "b": (0, 4, 0),
    }
    assert [draining.connections for draining in await bench.link.draining()] == [6]


async def test_of_two_that_come_back_to_a_new_agent_the_newer_one_stays(bench: Bench) -> None:
    new = await bench.connected(instance="two", started_ms=2)
    old = await bench.connected(started_ms=1)
    await old.wait_for("drain")
    assert "drain" not in new.kinds


async def test_one_that_drains_and_comes_back_gets_no_pods_and_is_not_the_one_that_accepts(bench: Bench) -> None:
    with pytest.raises(ZtunnelAway):
        await bench.link.add_pod(served())
    bench.link.allow_snapshot()
    old = await bench.ztunnel(draining=True, held=[(wire.HeldPod(uid="gone", netns_inode=1), [0])])
    await old.wait_for("trust_bundle")
    assert not bench.link.connected
    await bench.connected(instance="two", started_ms=2)
    await old.wait_for("drain")
    assert "pod_add" not in old.kinds and "snapshot_end" not in old.kinds
    assert bench.held == []
    assert bench.link.orphans == {"gone"}


async def test_one_that_does_not_answer_is_given_up_and_holds_nobody_up(bench: Bench) -> None:
    old = await bench.connected(started_ms=1)
    await bench.connected(instance="two", started_ms=2)
    await old.wait_for("drain")
    old.silent = True
    await asyncio.wait_for(bench.link.set_trust_bundle(b"roots"), 5)
    await asyncio.wait_for(old.ended.wait(), 5)
    assert bench.link.connected


@pytest.mark.parametrize("end", ["killed", "told to end"])
async def test_one_that_drains_is_asked_back_when_the_other_one_is_lost(bench: Bench, end: str) -> None:
    old = await bench.connected(started_ms=1)
    new = await bench.connected(instance="two", started_ms=2)
    await old.wait_for("drain")
    bench.ready.clear()
    with pytest.raises(ZtunnelRefused):
        new.refuse = lambda frame: "only for the pods of the old one"
        await bench.link.add_pod(served())
    new.refuse = lambda frame: ""
    if end == "killed":
        await new.close()
    else:
        await new.say(wire.ZtunnelFrame(stopping=wire.Stopping()))
    await asyncio.wait_for(bench.ready.wait(), 5)
    assert old.kinds[-6:] == ["drain", "resume", "hello", "trust_bundle", "pod_add", "snapshot_end"]
    assert bench.link.peer is not None and bench.link.peer[0] == "one"
    if end == "told to end":
        await new.wait_for("drain")


async def test_nobody_is_asked_back_when_the_supervisor_is_quicker(bench: Bench) -> None:
    old = await bench.connected(started_ms=1)
    new = await bench.connected(instance="two", started_ms=2)
    await old.wait_for("drain")
    await new.close()
    await bench.connected(instance="three", started_ms=3)
    await asyncio.sleep(0.3)
    assert "resume" not in old.kinds
    await old.wait_for("drain", 2)


async def test_a_hand_over_waits_for_the_successor_and_says_why_there_is_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZtunnelAway, match="not connected"):
        await bench.link.hand_over()
    old = await bench.connected(started_ms=1)
    asked = asyncio.create_task(bench.link.hand_over())
    await old.wait_for("hand_over")
    await bench.connected(instance="two", started_ms=2)
    pids = await asyncio.wait_for(asked, 5)
    assert len(pids) == 2
    monkeypatch.setattr(ztunnel_link, "_HAND_OVER_S", 0.1)
    with pytest.raises(ZtunnelAway, match="no successor"):
        await bench.link.hand_over()


async def test_one_of_an_older_supervisor_is_no_rival_however_new_it_is(bench: Bench) -> None:
    old = await bench.connected(started_ms=10, born_ms=1)
    new = await bench.connected(instance="two", started_ms=20, born_ms=2)
    await old.wait_for("drain")
    # Its supervisor would start another one if it ended by itself.
    assert old.frames[-1].drain.stay
    await old.close()
    again = await bench.connected(instance="three", started_ms=30, born_ms=1)
    await again.wait_for("drain")
    assert "drain" not in new.kinds
    sibling = await bench.connected(instance="four", started_ms=40, born_ms=2)
    await new.wait_for("drain")
    assert not new.frames[-1].drain.stay
    assert "drain" not in sibling.kinds
