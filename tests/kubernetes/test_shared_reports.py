"""Two replicas of the control plane and the agents of two nodes: reports are everybody's, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_harness import SYSTEM, Cluster, running
from source_harness import until
from test_cluster_controlplane import installed

from undermesh.agent.control import ControlPlane as Control
from undermesh.agent.control import ControlPlaneSettings
from undermesh.agent.reports import PodReport, Reporter, ReportSettings
from undermesh.agent.xds import XdsClient, XdsSettings
from undermesh.agent.xds_state import Batch, Resource
from undermesh.controlplane.kubernetes import replicas
from undermesh.controlplane.kubernetes.backend import KubernetesBackend
from undermesh.controlplane.kubernetes.shared_reports import PREFIX
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.server import ControlPlane, Settings
from undermesh.controlplane.translate import Settings as MeshSettings
from undermesh.lab.apiserver.faults import Fault
from undermesh.proto import report_pb2, workload_pb2

ADDRESS = "type.googleapis.com/istio.workload.Address"
WEB = "Kubernetes//Pod/shop/web"
SENDS = report_pb2.SENDS_TUNNELS
HBONE, NONE = workload_pb2.HBONE, workload_pb2.NONE


class Replica:
    """One control plane in this process, as its pod runs it."""

    def __init__(self, server: ControlPlane, backend: KubernetesBackend, job: asyncio.Task[None]) -> None:
        self.server = server
        self._backend = backend
        self._job = job

    async def die(self) -> None:
        """As by SIGKILL: nobody is told."""
        self._job.cancel()
        await asyncio.gather(self._job, return_exceptions=True)
        await self.server._server.stop(None)
        await self._backend.close()


class World:
    def __init__(self, cluster: Cluster, kubeconfig: Path, tokens: dict[str, Path]) -> None:
        self.cluster = cluster
        self.kubeconfig = kubeconfig
        self.tokens = tokens
        self.web_uid = ""
        self.bundle = cluster.directory / "bundle.pem"
        self._names = iter("abcdefgh")

    @contextlib.asynccontextmanager
    async def replica(self, **changes: Any) -> AsyncIterator[Replica]:
        backend = KubernetesBackend(self.kubeconfig, namespace=SYSTEM, mesh=MeshSettings(), review_tokens=True)
        name = next(self._names)
        backend._replica = f"replica-{name}"
        settings = Settings(state=None, listen="127.0.0.1:0", stop_seconds=0.1, **changes)
        server = await ControlPlane.open(
            settings,
            backend.source,
            Translator(MeshSettings()),
            secrets=backend.secrets,
            verifier=backend.verifier,
            share=backend.share,
        )
        self.bundle.write_bytes(server.authority.bundle_pem)
        await server.start()
        job = asyncio.create_task(server.run())
        try:
            yield Replica(server, backend, job)
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            await server.stop()
            await backend.close()

    @contextlib.asynccontextmanager
    async def control(self, replica: Replica, node: str) -> AsyncIterator[Control]:
        address = f"127.0.0.1:{replica.server.port}"
        control = Control(ControlPlaneSettings(address, ca_root=self.bundle, token=self.tokens[node]))
        try:
            yield control
        finally:
            await control.close()

    def stored(self) -> dict[str, dict[str, str]]:
        """Node -> data of its stored report."""
        items = self.cluster.server.store.items("configmaps", SYSTEM)
        maps = [stored.obj for stored in items if stored.obj["metadata"]["name"].startswith(PREFIX)]
        return {obj["data"]["node"]: obj["data"] for obj in maps}


class Way:
    """A TCP way to the API server that can be cut: what is under way stands still, nothing new is answered."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.open = asyncio.Event()
        self.open.set()

    @contextlib.asynccontextmanager
    async def kubeconfig(self) -> AsyncIterator[Path]:
        """Credentials for the server at the other end of the way."""
        config = yaml.safe_load(self._world.kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        address, _, port = cluster["server"].rpartition(":")
        server = await asyncio.start_server(lambda r, w: self._serve(r, w, int(port)), "127.0.0.1", 0)
        cluster["server"] = f"{address}:{server.sockets[0].getsockname()[1]}"
        path = self._world.kubeconfig.with_name("way.kubeconfig")
        path.write_text(yaml.safe_dump(config))
        try:
            yield path
        finally:
            self.open.set()
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        await self.open.wait()
        answers, requests = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(self._pump(reader, requests), self._pump(answers, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self.open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


class Agent:
    """The xDS client of a node; `go` holds its acknowledgements back."""

    def __init__(self, control: Control, node: str) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.applied: dict[tuple[str, str], Resource] = {}
        self.protocols: list[int | None] = []
        """How this node has reached pod web, after each batch."""
        self.client = XdsClient(control, node=node, apply=self._apply, settings=XdsSettings(0.01, 0.1))

    async def _apply(self, batch: Batch) -> None:
        await self.go.wait()
        self.applied.update({(item.type_url, item.name): item for item in batch.upserts})
        for key in batch.removals:
            self.applied.pop(key, None)
        self.protocols.append(self.protocol())

    def protocol(self) -> int | None:
        """How this node reaches pod web."""
        item = self.applied.get((ADDRESS, WEB))
        return workload_pb2.Address.FromString(item.value).workload.tunnel_protocol if item else None


@contextlib.asynccontextmanager
async def agent(world: World, replica: Replica, node: str) -> AsyncIterator[Agent]:
    async with world.control(replica, node) as control:
        made = Agent(control, node)
        job = asyncio.create_task(made.client.run())
        try:
            await asyncio.wait_for(made.client.synced.wait(), 5)
            yield made
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)


@contextlib.asynccontextmanager
async def reporting(world: World, replica: Replica, node: str) -> AsyncIterator[Reporter]:
    async with world.control(replica, node) as control:
        reporter = Reporter(control, node=node, settings=ReportSettings(0.02, 0.2))
        job = asyncio.create_task(reporter.run())
        try:
            yield reporter
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)


async def published(reporter: Reporter, pods: list[PodReport], seconds: float = 5.0) -> float:
    """Report, and wait for the answer; the seconds that it took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        await reporter.wait_published(reporter.update(pods))
    return time.monotonic() - began


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path, rbac=True) as cluster:
        kubeconfig = await installed(cluster)
        tokens = {}
        for node in ("node-a", "node-b"):
            token = await cluster.token(SYSTEM, "undermesh-agent", pod=await cluster.agent_pod(node))
            tokens[node] = tmp_path / f"token-{node}"
            tokens[node].write_text(token)
        made = World(cluster, kubeconfig, tokens)
        pod = await cluster.pod("shop", "web", "10.9.0.1", node="node-a")
        made.web_uid = pod["metadata"]["uid"]
        yield made


async def test_what_one_replica_is_told_all_publish_before_the_answer(world: World) -> None:
    async with (
        world.replica() as one,
        world.replica() as two,
        agent(world, two, "node-b") as far,
        reporting(world, one, "node-a") as reporter,
    ):
        assert far.protocol() == NONE
        took = await published(reporter, [PodReport(world.web_uid, SENDS)])
        assert far.protocol() == HBONE
        await published(reporter, [])
        assert far.protocol() == NONE
        assert took < 2, "an answer takes well under a second on an idle machine"


async def test_a_withdrawal_waits_for_the_agents_of_the_other_replica(world: World) -> None:
    async with (
        world.replica() as one,
        world.replica() as two,
        agent(world, two, "node-b") as far,
        reporting(world, one, "node-a") as reporter,
    ):
        await published(reporter, [PodReport(world.web_uid, SENDS)])
        far.go.clear()
        number = reporter.update([])
        await until(lambda: world.stored()["node-a"]["pods"] == "{}")
        await asyncio.sleep(1)
        assert reporter.status().published < number, "an agent of the other replica still tunnels to the pod"
        far.go.set()
        async with asyncio.timeout(5):
            await reporter.wait_published(number)
        assert far.protocol() == NONE


async def test_a_replica_that_comes_later_publishes_what_was_reported_before(world: World) -> None:
    async with world.replica() as one, reporting(world, one, "node-a") as reporter:
        await published(reporter, [PodReport(world.web_uid, SENDS)])
    async with world.replica() as other, agent(world, other, "node-b") as far:
        assert far.protocol() == HBONE


async def test_a_dead_replica_is_waited_for_only_until_its_lease_is_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "LIVE_SECONDS", 2.0)
    async with world.replica() as one, reporting(world, one, "node-a") as reporter, world.replica() as two:
        await published(reporter, [PodReport(world.web_uid, SENDS)])
        await two.die()
        assert await published(reporter, [], seconds=6) > 0.5, "for all that the other one knows it may live"
        assert await published(reporter, [PodReport(world.web_uid, SENDS)]) < 1


async def test_a_replica_that_does_not_see_the_api_server_takes_nobody_for_dead(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "LIVE_SECONDS", 1.0)
    monkeypatch.setattr(replicas, "RENEW_SECONDS", 0.3)
    way = Way(world)
    async with (
        world.replica() as two,
        agent(world, two, "node-b") as far,
        way.kubeconfig() as kubeconfig,
    ):
        world.kubeconfig = kubeconfig
        async with world.replica(answer_seconds=1.0) as one, reporting(world, one, "node-a") as reporter:
            await published(reporter, [PodReport(world.web_uid, SENDS)])
            far.go.clear()
            number = reporter.update([])
            await until(lambda: world.stored()["node-a"]["pods"] == "{}")
            # So that it is the others that are waited for.
            await until(lambda: not any(map(one.server.book.state, one.server.cluster.by_uid.values())))
            await asyncio.sleep(0.5)
            way.open.clear()
            await asyncio.sleep(4)
            assert reporter.status().published < number, "the other replica's agent still tunnels to the pod"
            way.open.set()
            far.go.set()
            async with asyncio.timeout(10):
                await reporter.wait_published(number)
            assert far.protocol() == NONE


async def test_a_replica_that_stops_is_not_waited_for(world: World) -> None:
    async with world.replica() as one, reporting(world, one, "node-a") as reporter:
        async with world.replica():
            await published(reporter, [PodReport(world.web_uid, SENDS)])
        assert await published(reporter, []) < 2


async def test_an_agent_that_moves_to_another_replica_is_heard_there_and_no_longer_here(world: World) -> None:
    async with world.replica() as one, world.replica() as two, agent(world, one, "node-b") as far:
        async with reporting(world, one, "node-a") as old:
            await published(old, [PodReport(world.web_uid, SENDS)])
            far.protocols.clear()
            async with reporting(world, two, "node-a") as new:
                await published(new, [])
                # The old stream is told to report anew, and may have done so by now; it is the newest then.
                assert NONE in far.protocols
                await until(lambda: world.stored()["node-a"]["pods"] != "{}")
                await until(lambda: far.protocol() == HBONE)


async def test_nothing_is_answered_that_could_not_be_stored(world: World) -> None:
    async with (
        world.replica() as one,
        agent(world, one, "node-b") as far,
        reporting(world, one, "node-a") as reporter,
    ):
        await published(reporter, [PodReport(world.web_uid, SENDS)])
        for verb in ("update", "create"):
            world.cluster.server.faults.add(Fault(verb=verb, resource="configmaps", code=503, count=None))
        number = reporter.update([])
        await asyncio.sleep(1)
        assert reporter.status().published < number
        assert far.protocol() == HBONE, "the last state stands"
        world.cluster.server.faults.clear()
        async with asyncio.timeout(10):
            await reporter.wait_published(number)
        assert far.protocol() == NONE


async def test_the_report_of_a_node_that_has_gone_is_deleted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undermesh.controlplane.report_book.AWAY_SECONDS", 0.5)
    async with world.replica() as one, agent(world, one, "node-b") as far:
        async with reporting(world, one, "node-a") as reporter:
            await published(reporter, [PodReport(world.web_uid, SENDS)])
        await asyncio.sleep(2)
        assert world.stored(), "its agent may come back"
        await world.cluster.delete(f"/api/v1/namespaces/{SYSTEM}/pods/agent-node-a")
        await until(lambda: not world.stored(), seconds=10)
        await until(lambda: far.protocol() == NONE)
