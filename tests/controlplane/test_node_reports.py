"""Reports: published before they are answered, only for the reporter's own pods, and they outlive restarts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from controlplane_harness import PODS, PodSpec, World, agent_pod, refusal, reported, reporting, states, until
from test_discovery import WEB, Agent, agent

from undermesh.agent.reports import PodReport
from undermesh.api.files import FileSource
from undermesh.controlplane.authorisation import REFUSAL
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.report_book import AWAY_SECONDS, ReportBook
from undermesh.proto import report_pb2, report_pb2_grpc, workload_pb2

WEB_UID = "uid-shop-web"
DB_UID = "uid-shop-db"
ACCEPTS = report_pb2.ACCEPTS_TUNNELS
SENDS = report_pb2.SENDS_TUNNELS


def protocol(node: Agent, name: str = WEB) -> int | None:
    """How the agent's ztunnel would reach the pod."""
    item = node.applied.get(("type.googleapis.com/istio.workload.Address", name))
    return workload_pb2.Address.FromString(item.value).workload.tunnel_protocol if item else None


async def test_a_report_is_published_when_every_agent_has_applied_it(world: World) -> None:
    async with (
        world.running(),
        agent(world, "node-a") as near,
        agent(world, "node-b") as far,
        reporting(world, "node-a") as reporter,
    ):
        await near.client.synced.wait()
        await far.client.synced.wait()
        assert protocol(far) == workload_pb2.NONE
        far.go.clear()
        number = reporter.update([PodReport(WEB_UID, ACCEPTS)])
        await until(lambda: protocol(near) == workload_pb2.HBONE)
        await asyncio.sleep(0.5)
        assert reporter.status().published < number, "the other agent has not applied it yet"
        far.go.set()
        async with asyncio.timeout(5):
            await reporter.wait_published(number)
        assert protocol(far) == workload_pb2.HBONE
        withdrawal = reporter.update([])
        async with asyncio.timeout(5):
            await reporter.wait_published(withdrawal)
        assert protocol(far) == protocol(near) == workload_pb2.NONE


async def test_an_agent_that_does_not_answer_is_given_up_after_the_time_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        world.running(answer_seconds=0.5) as server,
        agent(world, "node-b") as far,
        reporting(world, "node-a") as reporter,
    ):
        await far.client.synced.wait()
        far.go.clear()
        began = time.monotonic()
        async with asyncio.timeout(5):
            await reporter.wait_published(reporter.update([PodReport(WEB_UID, ACCEPTS)]))
        assert time.monotonic() - began >= 0.5
        assert "did not acknowledge it: node-b" in caplog.text
        assert server.metrics.registry.get_sample_value("undermesh_report_timeouts_total") == 1
        far.go.set()


async def test_an_agent_that_leaves_is_not_waited_for(world: World) -> None:
    async with world.running(), reporting(world, "node-a") as reporter:
        async with agent(world, "node-b") as far:
            await far.client.synced.wait()
            far.go.clear()
            number = reporter.update([PodReport(WEB_UID, ACCEPTS)])
            await asyncio.sleep(0.4)
            assert reporter.status().published < number
        async with asyncio.timeout(3):
            await reporter.wait_published(number)


async def test_a_burst_of_reports_is_answered_with_the_newest(world: World) -> None:
    async with world.running(), agent(world, "node-b") as far, reporting(world, "node-a") as reporter:
        await far.client.synced.wait()
        numbers = []
        for count in range(20):
            numbers.append(reporter.update([PodReport(WEB_UID, ACCEPTS if count % 2 else SENDS)]))
            await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            await asyncio.gather(*map(reporter.wait_published, numbers))
        assert numbers == list(range(1, 21))
        assert reporter.update([PodReport(WEB_UID, ACCEPTS)]) == 20, "an equal list needs no new report"


async def test_a_node_speaks_for_its_own_pods_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with world.running() as server, reporting(world, "node-a") as reporter:
        pods = [PodReport(WEB_UID, SENDS), PodReport(DB_UID, SENDS), PodReport("uid-shop-batch", SENDS)]
        async with asyncio.timeout(5):
            await reporter.wait_published(reporter.update(pods))
        assert reported(server) == {WEB_UID: SENDS}
        assert "do not run there, ignored: uid-shop-batch, uid-shop-db" in caplog.text


# reports of one stream -> the reason in the log
STREAMS: dict[str, tuple[list[report_pb2.NodeReport], str]] = {
    "about another node": ([report_pb2.NodeReport(node="node-b", sequence=1)], "is about node 'node-b'"),
    "sequence zero": ([report_pb2.NodeReport(node="node-a", sequence=0)], "has to grow"),
    "a sequence twice": (
        [report_pb2.NodeReport(node="node-a", sequence=2), report_pb2.NodeReport(node="node-a", sequence=2)],
        "has to grow",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_that_lies_or_stumbles_is_ended(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    reports, reason = STREAMS[name]
    async with world.running(), world.control("node-a") as control, control.channel() as channel:
        call = report_pb2_grpc.ReportsStub(channel).Report(iter(reports), metadata=control.metadata())

        async def drain() -> None:
            async for _ in call:
                pass

        assert await refusal(drain()) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
    assert reason in caplog.text


async def test_an_agents_restart_and_the_control_planes_turn_no_pod_plain(world: World) -> None:
    async with agent(world, "node-b") as far:
        async with world.running() as server:
            async with reporting(world, "node-a") as reporter:
                async with asyncio.timeout(5):
                    await reporter.wait_published(reporter.update([PodReport(WEB_UID, SENDS)]))
            await until(lambda: protocol(far) == workload_pb2.HBONE)
            await until(lambda: server.book.open_nodes() == 0)
            async with reporting(world, "node-a"):
                await asyncio.sleep(0.3)  # the new agent has not looked at its pods yet
            assert protocol(far) == workload_pb2.HBONE
        far.batches.clear()
        async with world.running() as server:
            await until(lambda: far.client.status().connected, seconds=10)
            await asyncio.sleep(0.3)
            assert reported(server) == {WEB_UID: SENDS}
            assert far.batches == [] and protocol(far) == workload_pb2.HBONE
            async with reporting(world, "node-a") as reporter:
                async with asyncio.timeout(5):
                    await reporter.wait_published(reporter.update([]))
            assert protocol(far) == workload_pb2.NONE, "what the node says anew counts at once"


async def test_a_reconnect_reports_again_by_itself(world: World) -> None:
    async with reporting(world, "node-a") as reporter:
        async with world.running():
            number = reporter.update([PodReport(WEB_UID, SENDS)])
            async with asyncio.timeout(5):
                await reporter.wait_published(number)
        await until(lambda: not reporter.status().connected)
        assert "control plane" in (reporter.status().error or "")
        newer = reporter.update([PodReport(WEB_UID, ACCEPTS)])
        (world.state / "reports.json").unlink()
        async with world.running() as server:
            async with asyncio.timeout(10):
                await reporter.wait_published(newer)
            assert reported(server) == {WEB_UID: ACCEPTS}


def cluster(tmp_path: Path, pods: list[PodSpec]) -> Cluster:
    world = World(tmp_path)
    world.write_pods(pods)
    return Cluster.of(FileSource(world.source).load())


def _report(*uids: str) -> report_pb2.NodeReport:
    pods = [report_pb2.PodReport(uid=uid, state=SENDS) for uid in uids]
    return report_pb2.NodeReport(node="node-a", sequence=1, pods=pods)


# agent pods in the source, seconds away -> does the report still stand?
AWAY = {
    "just gone": ([agent_pod("node-a")], 1, True),
    "a long crash loop": ([agent_pod("node-a")], AWAY_SECONDS * 10, True),
    "no agent, for a while": ([], AWAY_SECONDS - 1, True),
    "no agent, for good": ([], AWAY_SECONDS, False),
    "only another node's agent": ([agent_pod("node-b")], AWAY_SECONDS, False),
}


@pytest.mark.parametrize("name", AWAY)
def test_a_report_stands_while_an_agent_may_come_back(tmp_path: Path, name: str) -> None:
    agents, seconds, stands = AWAY[name]
    state = cluster(tmp_path, [*agents, *(pod for pod in PODS if pod.namespace == "shop")])
    now = [1000.0]
    book = ReportBook(None, lambda: now[0])
    book.opened("node-a")
    book.record("node-a", _report(WEB_UID))
    now[0] += 10_000
    assert book.expired(state) == [], "an open stream never expires"
    book.closed("node-a")
    now[0] += seconds
    gone = book.expired(state)
    assert gone == ([] if stands else ["node-a"])
    for node in gone:
        book.forget(node)
    assert states(book, state) == ({WEB_UID: SENDS} if stands else {})


def test_two_streams_of_one_node_count_as_one_presence(tmp_path: Path) -> None:
    """A rolling update of the agent: the new stream opens before the old one ends."""
    state = cluster(tmp_path, [])
    now = [0.0]
    book = ReportBook(None, lambda: now[0])
    book.opened("node-a")
    book.opened("node-a")
    book.record("node-a", _report(WEB_UID))
    book.closed("node-a")
    now[0] += AWAY_SECONDS * 2
    assert book.expired(state) == [] and book.open_nodes() == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"node-a": {"x": "UNKNOWN_STATE"}}', '{"node-a": 3}'])
def test_a_damaged_reports_file_is_no_reason_not_to_start(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "reports.json"
    file.write_text(content)
    book = ReportBook(file, time.monotonic)
    assert "is damaged" in caplog.text
    assert book.record("node-a", _report(WEB_UID))
    assert ReportBook(file, time.monotonic)._nodes["node-a"].states == {WEB_UID: SENDS}


def test_a_state_of_a_later_version_counts_as_plain(tmp_path: Path) -> None:
    book = ReportBook(None, time.monotonic)
    report = report_pb2.NodeReport.FromString(
        report_pb2.NodeReport(node="node-a").SerializeToString()
        + b"\x1a\x10\x0a\x0cuid-shop-web\x10\x63"  # pods {uid, state 99}
    )
    assert report.pods[0].uid == WEB_UID and report.pods[0].state == 99
    book.record("node-a", report)
    assert states(book, cluster(tmp_path, list(PODS))) == {}
