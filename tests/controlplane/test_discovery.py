"""Delta xDS over real TLS: server and the agent's client together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from controlplane_harness import PODS, PodSpec, World, reported, reporting, sign, until

from undermesh.agent.control import ControlPlane
from undermesh.agent.reports import PodReport
from undermesh.agent.xds import Refused, XdsClient, XdsSettings
from undermesh.agent.xds_state import ADDRESS, AUTHORIZATION, Batch, Resource
from undermesh.api.core import Pod, PodIP, PodStatus
from undermesh.api.meta import Metadata
from undermesh.api.objects import Objects
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.translate import Resource as Published
from undermesh.controlplane.translate import ResourceKey, Update
from undermesh.controlplane.translate import Settings as MeshSettings
from undermesh.proto import authorization_pb2, discovery_pb2, discovery_pb2_grpc, report_pb2, workload_pb2

WEB = "Kubernetes//Pod/shop/web"
FAST = XdsSettings(backoff_first=0.01, backoff_limit=0.2)


class Agent:
    """An xDS client that applies into a dictionary; `hold` makes it slow, `refuse` makes it refuse."""

    def __init__(self, control: ControlPlane, node: str, state: Path | None = None) -> None:
        self.batches: list[Batch] = []
        self.applied: dict[tuple[str, str], Resource] = {}
        self.go = asyncio.Event()
        self.go.set()
        self.failures: list[Exception] = []
        self.client = XdsClient(control, node=node, apply=self.apply, state=state, settings=FAST)

    async def apply(self, batch: Batch) -> None:
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.batches.append(batch)
        self.applied.update({(item.type_url, item.name): item for item in batch.upserts})
        for key in batch.removals:
            del self.applied[key]

    def version(self, name: str) -> str | None:
        item = self.applied.get((ADDRESS, name))
        return item.version if item else None


@contextlib.asynccontextmanager
async def agent(world: World, node: str, state: Path | None = None) -> AsyncIterator[Agent]:
    async with world.control(node) as control:
        running = Agent(control, node, state)
        task = asyncio.create_task(running.client.run())
        try:
            yield running
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def workload(uid: str, **fields: Any) -> Published:
    message = workload_pb2.Address(workload=workload_pb2.Workload(uid=uid, **fields))
    body = message.SerializeToString()
    return Published(str(hash(body)), body)


def policy(name: str) -> Published:
    body = authorization_pb2.Authorization(name=name).SerializeToString()
    return Published(str(hash(body)), body)


class Table:
    """A translation that publishes what a test puts here."""

    def __init__(self) -> None:
        self.resources: dict[ResourceKey, Published] = {}

    def take(self, objects: Objects) -> None:
        return None

    def reported(self, uids: Iterable[str]) -> None:
        return None

    def derive(self, state_of: Callable[[Pod], int]) -> Update:
        if ResourceKey(ADDRESS, "poison") in self.resources:
            raise ValueError("poison")
        return Update(dict(self.resources), complete=True)

    def put(self, world: World, *, address: dict[str, Published | None], **policies: Published) -> None:
        for name, item in address.items():
            key = ResourceKey(ADDRESS, name)
            if item is None:
                self.resources.pop(key, None)
            else:
                self.resources[key] = item
        for name, item in policies.items():
            self.resources[ResourceKey(AUTHORIZATION, name)] = item
        assert world.server is not None
        world.server.publisher.poke()


async def test_an_agent_gets_the_pods_of_the_whole_mesh_and_each_change_once(world: World) -> None:
    async with world.running(), agent(world, "node-a") as node:
        await node.client.synced.wait()
        assert len(node.batches) == 1, "the first state comes as one batch"
        message = workload_pb2.Address.FromString(node.applied[ADDRESS, WEB].value).workload
        assert (message.service_account, message.node) == ("web", "node-a")
        assert (ADDRESS, "Kubernetes//Pod/shop/db") in node.applied
        world.write_pods([*PODS, PodSpec("shop", "new", "node-b", "web", ip="10.9.1.9")])
        await until(lambda: (ADDRESS, "Kubernetes//Pod/shop/new") in node.applied)
        assert [item.name for item in node.batches[-1].upserts] == ["Kubernetes//Pod/shop/new"]
        world.write_pods(PODS)
        await until(lambda: (ADDRESS, "Kubernetes//Pod/shop/new") not in node.applied)
        assert node.batches[-1] == Batch((), ((ADDRESS, "Kubernetes//Pod/shop/new"),))
        status = node.client.status()
        assert status.connected and status.error is None and status.resources == len(node.applied)


async def test_a_restart_of_the_control_plane_sends_nothing_that_is_held(world: World) -> None:
    async with agent(world, "node-a") as node:
        async with world.running():
            await node.client.synced.wait()
        await until(lambda: not node.client.status().connected)
        before = dict(node.applied)
        assert node.client.resources() and "control plane" in (node.client.status().error or "")
        pods = [pod for pod in PODS if pod.name != "db"]
        world.write_pods([*pods, PodSpec("shop", "late", "node-b", "web", ip="10.9.1.7")])
        node.batches.clear()
        connected: list[float] = []
        node.client.on_connected.append(lambda: connected.append(time.monotonic()))
        async with world.running() as server:
            await until(lambda: node.batches, seconds=10)
            [batch] = node.batches
            assert [item.name for item in batch.upserts] == ["Kubernetes//Pod/shop/late"]
            assert batch.removals == ((ADDRESS, "Kubernetes//Pod/shop/db"),)
            assert node.applied[ADDRESS, WEB] == before[ADDRESS, WEB]
            assert len(connected) == 1
            assert len(server.hub.status()) == 1


async def test_a_restarted_agent_starts_from_its_state_file(world: World, tmp_path: Path) -> None:
    state = tmp_path / "run" / "xds.bin"
    async with world.running():
        async with agent(world, "node-a", state) as node:
            await until(lambda: state.exists())
            held = node.client.resources()
        assert state.stat().st_mode & 0o777 == 0o600
    async with agent(world, "node-a", state) as node:
        assert node.client.synced.is_set(), "usable before the control plane is reached"
        assert set(node.client.resources()) == set(held)
        async with world.running():
            await until(lambda: node.client.status().connected, seconds=10)
            await asyncio.sleep(0.3)
            assert node.batches == [], "the same state is not applied again"


async def test_a_resource_that_cannot_be_decoded_is_refused_alone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    table = Table()
    async with world.running(translate=table) as server, agent(world, "node-a") as node:
        table.put(world, address={"a": workload("a"), "b": workload("b")})
        await until(lambda: node.version("a") and node.version("b"))
        good = node.applied[ADDRESS, "a"]
        broken = Published("broken", b"\xff\xff")
        table.put(world, address={"a": broken, "c": workload("c")})
        await until(lambda: node.version("c"))
        assert node.applied[ADDRESS, "a"] == good, "the last good version stands"
        await until(lambda: server.hub.status()[0].last_refusal)
        refusal = server.hub.status()[0].last_refusal
        assert refusal is not None and refusal.message.startswith("a: it cannot be decoded")
        nacks = server.metrics.registry.get_sample_value("undermesh_xds_nacks_total", {"type": ADDRESS})
        assert nacks == 1
        assert "node node-a refused" in caplog.text
        table.put(world, address={"a": workload("a", name="mended")})
        await until(lambda: (item := node.applied[ADDRESS, "a"]) and b"mended" in item.value)


async def test_a_batch_that_ztunnel_refuses_is_refused_towards_the_control_plane(world: World) -> None:
    table = Table()
    async with world.running(translate=table) as server, agent(world, "node-a") as node:
        await node.client.synced.wait()
        node.failures.append(Refused("ztunnel: no such namespace"))
        table.put(world, address={"a": workload("a")})
        await until(lambda: server.hub.status()[0].last_refusal)
        refusal = server.hub.status()[0].last_refusal
        assert refusal is not None and refusal.message == "ztunnel: no such namespace"


async def test_what_could_not_be_applied_is_applied_after_the_reconnect(world: World) -> None:
    table = Table()
    async with world.running(translate=table), agent(world, "node-a") as node:
        await node.client.synced.wait()
        node.failures.append(RuntimeError("ztunnel's socket broke"))
        table.put(world, address={"a": workload("a")})
        await until(lambda: node.version("a"))


async def test_an_acknowledgement_waits_for_the_application(world: World) -> None:
    table = Table()
    async with world.running(translate=table) as server, agent(world, "node-a") as node:
        await until(lambda: server.hub.status() and server.hub.status()[0].seen == server.board.generation)
        node.go.clear()
        table.put(world, address={"a": workload("a")})
        await until(lambda: server.board.get(ADDRESS, "a"))
        await asyncio.sleep(0.4)
        assert server.hub.status()[0].seen < server.board.generation
        node.go.set()
        await until(lambda: server.hub.status()[0].seen == server.board.generation)


async def test_policies_reach_ztunnel_with_or_before_the_workloads_that_name_them(world: World) -> None:
    table = Table()
    table.resources = {
        ResourceKey(ADDRESS, "w"): workload("w", authorization_policies=["p"]),
        ResourceKey(AUTHORIZATION, "p"): policy("p"),
    }
    async with world.running(translate=table), agent(world, "node-a") as node:
        await node.client.synced.wait()
        [batch] = node.batches
        assert [item.type_url for item in batch.upserts] == [AUTHORIZATION, ADDRESS]
        table.put(world, address={"v": workload("v", authorization_policies=["q"])}, q=policy("q"))
        await until(lambda: node.version("v"))
        names = [item.name for batch in node.batches[1:] for item in batch.upserts]
        assert names == ["q", "v"]


async def raw_stream(control: ControlPlane, stack: contextlib.AsyncExitStack) -> grpc.aio.StreamStreamCall:
    """A client that subscribes, and then neither reads nor answers unless the test does."""
    channel = await stack.enter_async_context(control.channel())
    stub = discovery_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
    call = stub.DeltaAggregatedResources(metadata=control.metadata())
    stack.callback(call.cancel)
    await call.write(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS, resource_names_subscribe=["*"]))
    return call


async def test_a_client_that_does_not_read_blocks_nobody(world: World) -> None:
    table = Table()
    body = "x" * 60_000
    big = {f"big-{number}": workload(f"big-{number}", hostname=body) for number in range(400)}
    async with world.running(translate=table) as server, contextlib.AsyncExitStack() as stack:
        table.put(world, address=dict(big))
        stuck_control = await stack.enter_async_context(world.control("node-b"))
        await raw_stream(stuck_control, stack)
        await until(lambda: server.hub.status())
        node = await stack.enter_async_context(agent(world, "node-a"))
        await until(lambda: len(node.applied) == len(big), seconds=20)
        for round_number in range(5):
            began = time.monotonic()
            table.put(world, address={"a": workload("a", name=str(round_number))})
            expected = table.resources[ResourceKey(ADDRESS, "a")].version
            await until(lambda expected=expected: node.version("a") == expected)
            assert time.monotonic() - began < 1.0
        [stuck] = [status for status in server.hub.status() if status.node == "node-b"]
        assert stuck.seen == 0


async def test_many_changes_arrive_in_few_messages_and_soon(world: World) -> None:
    table = Table()
    async with world.running(translate=table), agent(world, "node-a") as node:
        await node.client.synced.wait()
        node.batches.clear()
        for number in range(100):
            table.put(world, address={"a": workload("a", name=str(number))})
            await asyncio.sleep(0.005)
        changed = time.monotonic()
        expected = table.resources[ResourceKey(ADDRESS, "a")].version
        await until(lambda: node.version("a") == expected)
        assert time.monotonic() - changed < 0.6  # 0.2 s promised, and a busy machine
        assert len(node.batches) <= 12


async def test_a_source_that_is_broken_at_the_start_takes_nothing_away_from_anybody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    policies = world.source / "policies.yaml"
    metadata = {"namespace": "shop", "name": "deny-all"}
    manifest = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata}
    good = yaml.safe_dump({**manifest, "spec": {}})
    policies.write_text(good)
    async with agent(world, "node-a") as node, reporting(world, "node-a") as reporter:
        async with world.running():
            await node.client.synced.wait()
        assert (AUTHORIZATION, "shop/deny-all") in node.applied
        node.batches.clear()
        policies.write_text(good + "---\n{")
        async with world.running(held_back_seconds=0.05) as server, world.control("node-a") as control:
            await until(lambda: server.hub.status(), seconds=10)
            number = reporter.update([PodReport("uid-shop-web", report_pb2.SENDS_TUNNELS)])
            await asyncio.sleep(0.5)
            assert node.batches == [] and reporter.status().published < number
            assert "nothing is published until this is mended: policies.yaml" in caplog.text
            assert await sign(control, "spiffe://cluster.local/ns/shop/sa/web"), "the CA works on"
            policies.write_text(good)
            async with asyncio.timeout(5):
                await reporter.wait_published(number)
            assert [item.name for batch in node.batches for item in batch.upserts] == [WEB]
            assert (AUTHORIZATION, "shop/deny-all") in node.applied


async def test_an_agent_whose_pod_is_gone_hears_and_says_nothing_more(world: World) -> None:
    async with world.running() as server, agent(world, "node-a") as node, reporting(world, "node-a") as reporter:
        await node.client.synced.wait()
        async with asyncio.timeout(5):
            await reporter.wait_published(reporter.update([PodReport("uid-shop-web", report_pb2.SENDS_TUNNELS)]))
        node.batches.clear()
        world.write_pods([pod for pod in PODS if pod.name != "agent-node-a" and pod.name != "db"])
        await until(lambda: "refused this node" in (node.client.status().error or ""))
        assert node.batches == []
        reporter.update([])
        await until(lambda: "refused this node" in (reporter.status().error or ""))
        assert reported(server) == {"uid-shop-web": report_pb2.SENDS_TUNNELS}


async def test_a_source_that_cannot_be_translated_leaves_what_is_published(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    table = Table()
    async with world.running(translate=table), agent(world, "node-a") as node:
        table.put(world, address={"a": workload("a")})
        await until(lambda: node.version("a"))
        table.put(world, address={"poison": workload("poison"), "b": workload("b")})
        await until(lambda: "cannot be translated" in caplog.text)
        assert node.version("a") and not node.version("b")
        table.put(world, address={"poison": None})
        await until(lambda: node.version("b"))


def test_a_translation_that_fails_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    web = Pod(Metadata("web", "shop", "u"), status=PodStatus(pod_ips=(PodIP("10.9.0.1"),)))
    translator = Translator(MeshSettings())
    translator.take(Objects.of([web]))
    assert set(translator.derive(lambda _: 0).resources) == {ResourceKey(ADDRESS, WEB)}
    with monkeypatch.context() as broken:
        broken.setattr("undermesh.controlplane.translate.index.Update", lambda *_: 1 / 0)
        translator.reported(["u"])
        with pytest.raises(ZeroDivisionError):
            translator.derive(lambda _: 0)
    with monkeypatch.context() as broken:
        translator.derive(lambda _: 0)
        broken.setattr("undermesh.controlplane.translate.index.changes", lambda *_: 1 / 0)
        translator.take(Objects())
        assert "everything is translated anew" in caplog.text
    translator.take(Objects.of([web]))
    update = translator.derive(lambda _: 0)
    assert update.complete and set(update.resources) == {ResourceKey(ADDRESS, WEB)}


async def test_a_wrong_token_is_told_in_the_agents_status(world: World) -> None:
    async with world.running(), agent(world, "node-a") as node:
        await node.client.synced.wait()
    async with world.running(), world.control("node-a", "not.a.token") as control:
        client = Agent(control, "node-a").client
        task = asyncio.create_task(client.run())
        await until(lambda: "refused this node" in (client.status().error or ""))
        task.cancel()


async def test_a_new_token_is_used_from_the_next_connection_on(world: World) -> None:
    async with agent(world, "node-a") as node:
        token = node.client._control.settings.token
        good = token.read_text()
        token.write_text("stale.token.x")
        async with world.running():
            await until(lambda: "refused this node" in (node.client.status().error or ""), seconds=10)
            token.write_text(good)
            await until(lambda: node.client.status().connected)


def _item(name: str, version: str = "1") -> Resource:
    return Resource(ADDRESS, name, version, b"")


BATCHES: dict[str, tuple[Batch, Batch, Batch]] = {
    "apart": (Batch((_item("a"),)), Batch((_item("b"),)), Batch((_item("a"), _item("b")))),
    "newer version": (Batch((_item("a"),)), Batch((_item("a", "2"),)), Batch((_item("a", "2"),))),
    "removed after": (Batch((_item("a"),)), Batch((), ((ADDRESS, "a"),)), Batch((), ((ADDRESS, "a"),))),
    "back again": (Batch((), ((ADDRESS, "a"),)), Batch((_item("a"),)), Batch((_item("a"),))),
}


@pytest.mark.parametrize("name", BATCHES)
def test_two_batches_become_one_with_the_same_effect(name: str) -> None:
    first, second, both = BATCHES[name]
    assert first.then(second) == both
