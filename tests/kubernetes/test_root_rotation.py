"""One root after the other: two nodes talk all the while, with certificates of the old root and of the new one."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from ca_files import cacerts
from click.testing import CliRunner
from cluster_harness import AGENT, SYSTEM, Cluster, running
from cryptography import x509
from source_harness import until
from test_cluster_controlplane import installed

from undermesh.agent.certificates import CertificateManager, CertificateSettings
from undermesh.agent.control import ControlPlane as Control
from undermesh.agent.control import ControlPlaneSettings
from undermesh.agent.reports import Reporter, ReportSettings
from undermesh.agent.roots import fingerprints
from undermesh.cli.roots import roots
from undermesh.controlplane.kubernetes.backend import KubernetesBackend
from undermesh.controlplane.kubernetes.leader import LeaseTiming
from undermesh.controlplane.kubernetes.root_bundle import ENTRY, NAME
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.rotation import REQUEST, RETIRED_AFTER, STANDING
from undermesh.controlplane.server import ControlPlane, Settings
from undermesh.controlplane.translate import Settings as MeshSettings

SECRET = f"/api/v1/namespaces/{SYSTEM}/secrets/undermesh-ca"
PATIENCE = 90.0


class Node:
    """An agent that is given the bundle as a kubelet gives it, and the identity of one pod."""

    def __init__(self, name: str, directory: Path, identity: str) -> None:
        self.name = name
        self.identity = identity
        self.directory = directory
        self.bundle = directory / "root.pem"
        self.token = directory / "token"
        self.follows = True
        self.manager: CertificateManager

    @property
    def issuer(self) -> str:
        """Who signed the certificate that is in force."""
        held = self.manager.get(self.identity)
        return x509.load_pem_x509_certificate(held.chain_pem).issuer.rfc4514_string() if held else ""

    @contextlib.asynccontextmanager
    async def running(self, port: int) -> AsyncIterator[None]:
        """Connected to a replica."""
        control = Control(ControlPlaneSettings(f"127.0.0.1:{port}", ca_root=self.bundle, token=self.token))
        self.manager = CertificateManager(
            control, state=self.directory / "kept", settings=CertificateSettings(backoff_first=0.1, roots_poll=0.05)
        )
        self.manager.set_wanted([self.identity])
        reporter = Reporter(control, node=self.name, settings=ReportSettings(0.02, 0.2))
        reporter.update([])
        jobs = [asyncio.create_task(job) for job in (self.manager.run(), reporter.run(), self._tell(reporter))]
        try:
            async with asyncio.timeout(PATIENCE):
                await self.manager.wait_for(self.identity)
            yield
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await control.close()

    async def _tell(self, reporter: Reporter) -> None:
        """In the place of the agent's main part, for a ztunnel that takes everything at once."""
        while True:
            if self.manager.roots_pem:
                reporter.trusts(fingerprints(self.manager.roots_pem))
            await asyncio.sleep(0.05)

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        held = self.manager.get(self.identity)
        assert held is not None
        context = ssl.create_default_context(purpose, cadata=self.manager.roots_pem.decode())
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        (self.directory / "pair.pem").write_bytes(held.key_pem + held.chain_pem)
        context.load_cert_chain(self.directory / "pair.pem")
        return context


def connect(client: Node, server: Node) -> None:
    """A handshake in which each proves itself to the other, and a byte each way. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.context(ssl.Purpose.SERVER_AUTH).wrap_bio(down, up, server_side=False)
    two = server.context(ssl.Purpose.CLIENT_AUTH).wrap_bio(up, down, server_side=True)
    open_sides: list[Callable[[], None]] = [one.do_handshake, two.do_handshake]
    while open_sides:
        for side in list(open_sides):
            with contextlib.suppress(ssl.SSLWantReadError):
                side()
                open_sides.remove(side)
    one.write(b"x")
    assert two.read(1) == b"x"
    two.write(b"y")
    assert one.read(1) == b"y"


class World:
    """A cluster with two nodes; `replica` is its control plane."""

    def __init__(self, cluster: Cluster, kubeconfig: Path) -> None:
        self.cluster = cluster
        self.kubeconfig = kubeconfig
        self.ahead = dt.timedelta(0)
        """How far the control plane's clock has come beyond ours, as to when roots are retired."""
        self.nodes: list[Node] = []
        self.failures: list[str] = []
        self.connected = 0
        self.mixed: set[tuple[str, str]] = set()

    async def add_node(self, name: str) -> None:
        directory = self.cluster.directory / name
        directory.mkdir()
        number = len(self.nodes) + 1
        await self.cluster.account("shop", name)
        await self.cluster.pod("shop", name, f"10.0.0.{number}", node=name, account=name)
        node = Node(name, directory, f"spiffe://cluster.local/ns/shop/sa/{name}")
        node.token.write_text(await self.cluster.token(SYSTEM, AGENT, pod=await self.cluster.agent_pod(name)))
        self.nodes.append(node)

    @contextlib.asynccontextmanager
    async def replica(self) -> AsyncIterator[int]:
        """Its port."""
        lease = LeaseTiming(duration=20, deadline=15.0, retry=0.3)
        mesh = MeshSettings()
        backend = KubernetesBackend(
            self.kubeconfig,
            namespace=SYSTEM,
            mesh=mesh,
            review_tokens=True,
            lease=lease,
            clock=lambda: dt.datetime.now(dt.UTC) + self.ahead,
        )
        backend.rotation_seconds = 0.1
        settings = Settings(state=None, listen="127.0.0.1:0", stop_seconds=0.1, reload_seconds=0.1)
        server = await ControlPlane.open(
            settings,
            backend.source,
            Translator(mesh),
            secrets=backend.secrets,
            verifier=backend.verifier,
            share=backend.share,
        )
        await server.start()
        job = asyncio.create_task(server.run(backend.writers(server)))
        try:
            yield server.port
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            await server.stop()
            await backend.close()

    def bundle(self) -> str:
        items = self.cluster.server.store.items("configmaps", SYSTEM)
        return next((str(i.obj["data"].get(ENTRY)) for i in items if i.obj["metadata"]["name"] == NAME), "")

    def roots(self) -> list[str]:
        found = x509.load_pem_x509_certificates(self.bundle().encode()) if self.bundle() else []
        return [root.subject.rfc4514_string() for root in found]

    def secret(self) -> dict[str, Any]:
        items = self.cluster.server.store.items("secrets", SYSTEM)
        return next((i.obj for i in items if i.obj["metadata"]["name"] == "undermesh-ca"), {"metadata": {}})

    def standing(self) -> str:
        return str((self.secret()["metadata"].get("annotations") or {}).get(STANDING, ""))

    async def ask_for_a_new_root(self, value: str) -> None:
        await self.cluster.patch(SECRET, {"metadata": {"annotations": {REQUEST: value}}})

    @contextlib.asynccontextmanager
    async def background(self, *, connect: bool = True) -> AsyncIterator[None]:
        """The kubelets bring the bundle, and every node connects to every node, over and over."""
        jobs = [asyncio.create_task(job) for job in (self._kubelets(), *([self._connect()] if connect else []))]
        try:
            yield
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _kubelets(self) -> None:
        while True:
            for node in self.nodes:
                if node.follows and (pem := self.bundle()):
                    staging = node.bundle.with_suffix(".new")
                    staging.write_text(pem)
                    staging.replace(node.bundle)
            await asyncio.sleep(0.05)

    async def _connect(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if not all(hasattr(node, "manager") and node.issuer for node in self.nodes):
                continue
            for one, two in itertools.permutations(self.nodes, 2):
                pair = (one.issuer, two.issuer)
                try:
                    connect(one, two)
                except (ssl.SSLError, AssertionError) as error:
                    self.failures.append(f"{one.name} to {two.name}, signed by {pair}: {error}")
                self.connected += 1
                self.mixed.add(pair)

    async def some_connections(self) -> None:
        before = self.connected
        await until(lambda: self.connected >= before + 4, PATIENCE)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path, rbac=True) as cluster:
        world = World(cluster, await installed(cluster))
        for name in ("node-a", "node-b"):
            await world.add_node(name)
        yield world


async def test_a_new_root_takes_over_and_no_connection_fails(world: World) -> None:
    a, b = world.nodes
    async with world.background():
        async with world.replica() as port, a.running(port), b.running(port):
            await until(lambda: "signs with" in world.standing(), PATIENCE)
            (old,) = world.roots()
            await world.some_connections()
            b.follows = False
            await world.ask_for_a_new_root("1")
            await until(lambda: len(world.roots()) == 2 and "is trusted by node node-b" in world.standing(), PATIENCE)
            (new,) = set(world.roots()) - {old}
            a.manager.renew()
            await world.some_connections()
            assert a.issuer == old, "signed with a root that a node does not know"
        # Another replica goes on from there.
        async with world.replica() as port, a.running(port), b.running(port):
            await world.some_connections()
            await asyncio.sleep(0.5)
            assert set(world.roots()) == {old, new} and "node node-b" in world.standing()
            b.follows = True
            await until(lambda: "the old root" in world.standing(), PATIENCE)
            assert set(world.roots()) == {old, new}
            await until(lambda: (a.manager.renew(), a.issuer == new)[1], PATIENCE)
            assert b.issuer == old
            await world.some_connections()
            world.ahead = RETIRED_AFTER - dt.timedelta(minutes=5)
            await asyncio.sleep(0.5)
            assert set(world.roots()) == {old, new}, "retired while leaves of it are valid"
            # By now it has renewed, at half of its life.
            await until(lambda: (b.manager.renew(), b.issuer == new)[1], PATIENCE)
            b.follows = False
            world.ahead = RETIRED_AFTER + dt.timedelta(minutes=5)
            await until(lambda: world.roots() == [new], PATIENCE)
            await world.some_connections()
            b.follows = True
            await until(lambda: b.manager.roots_pem == a.manager.roots_pem == world.bundle().encode(), PATIENCE)
            await world.some_connections()
    assert not world.failures, world.failures[:5]
    assert {(old, old), (new, old), (old, new), (new, new)} <= world.mixed


async def test_the_users_own_issuer_takes_over_the_same_way_and_its_successor_too(world: World) -> None:
    a, b = world.nodes
    first, second = cacerts("first"), cacerts("second")
    path = f"/api/v1/namespaces/{SYSTEM}/secrets"
    async with world.background(), world.replica() as port, a.running(port), b.running(port):
        await until(lambda: "signs with" in world.standing(), PATIENCE)
        await world.cluster.create(path, {"metadata": {"name": "cacerts"}, "data": first})
        await until(lambda: (a.manager.renew(), a.issuer == "CN=first intermediate")[1], PATIENCE)
        await world.some_connections()
        # Under the same root at once, whatever the nodes say.
        b.follows = False
        await world.cluster.patch(f"{path}/cacerts", {"data": cacerts("first", intermediate="renewed")})
        await until(lambda: (a.manager.renew(), a.issuer == "CN=renewed")[1], PATIENCE)
        await until(lambda: "signs with CN=renewed" in world.standing(), PATIENCE)
        # What cannot be used is refused, and said.
        await world.cluster.patch(f"{path}/cacerts", {"data": {"ca-key.pem": second["ca-key.pem"]}})
        await until(lambda: "refused: the CA's private key does not belong" in world.standing(), PATIENCE)
        await world.cluster.patch(f"{path}/cacerts", {"data": second})
        await until(lambda: "CN=second root" in world.roots() and "by node node-b" in world.standing(), PATIENCE)
        a.manager.renew()
        await world.some_connections()
        assert a.issuer == "CN=renewed"
        b.follows = True
        await until(lambda: (b.manager.renew(), b.issuer == "CN=second intermediate")[1], PATIENCE)
        await world.some_connections()
        # Without it the root that undermesh made is wanted again.
        await world.cluster.delete(f"{path}/cacerts")
        await until(lambda: "under the root CN=undermesh root" in world.standing(), PATIENCE)
        await world.some_connections()
    assert not world.failures, world.failures[:5]


async def test_an_operator_asks_and_sees_by_the_command_line(world: World) -> None:
    a, b = world.nodes
    config = ["--kubeconfig", str(world.cluster.kubeconfig)]

    async def undermesh(verb: str) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, roots, [verb, *config])
        assert done.exit_code == 0, done.output
        return done.output

    async with world.background(connect=False), world.replica() as port, a.running(port), b.running(port):
        await until(lambda: "signs with" in world.standing() and world.roots(), PATIENCE)
        before = await undermesh("show")
        assert before.startswith("signs with ") and before.count("\ntrusted: ") == 1
        assert "undermesh roots show" in await undermesh("rotate")
        await until(lambda: "the old root" in world.standing(), PATIENCE)
        after = await undermesh("show")
    assert after.count("\ntrusted: ") == 2 and "is trusted until" in after
