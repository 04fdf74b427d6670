"""`python -m undermesh.controlplane --source kubernetes` as its pod runs it: with the rights it needs and no others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster_harness import AGENT, SYSTEM, Cluster, running
from cryptography import x509
from google.protobuf import struct_pb2
from source_harness import until

from undermesh.agent import leaf
from undermesh.agent.control import ControlPlane, ControlPlaneSettings
from undermesh.controlplane.kubernetes.root_bundle import ENTRY, NAME
from undermesh.lab.apiserver.faults import Fault
from undermesh.proto import ca_pb2, ca_pb2_grpc

ACCOUNT = "undermesh"
API_AUDIENCE = "https://kubernetes.default.svc.cluster.local"
READ = ["list", "watch"]

# What the control plane needs. The chart's ClusterRole and Role hold the same.
CLUSTER_RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["namespaces", "nodes", "pods", "serviceaccounts", "services"], "verbs": READ},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": READ},
    {"apiGroups": ["security.istio.io"], "resources": ["authorizationpolicies", "peerauthentications"], "verbs": READ},
    {"apiGroups": ["networking.istio.io"], "resources": ["serviceentries", "workloadentries"], "verbs": READ},
    {
        "apiGroups": ["security.istio.io"],
        "resources": ["authorizationpolicies/status", "peerauthentications/status"],
        "verbs": ["patch"],
    },
    {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
    # Kubernetes would let the name in our field selector count as the name; the lab's server does not know of it.
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", *READ]},
    {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NAME], "verbs": ["patch"]},
]
SECRETS = ["undermesh-ca", "cacerts", "undermesh-ca-roots"]
ROLE_RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
    {"apiGroups": [""], "resources": ["secrets"], "resourceNames": SECRETS, "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["undermesh-ca"], "verbs": ["patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["undermesh-controlplane"],
        "verbs": ["get", "update"],
    },
    # What the nodes reported, and the replicas that live: a name for each node and replica.
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "update", "delete", *READ]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create", "patch", "delete", *READ]},
]
RBAC = "/apis/rbac.authorization.k8s.io/v1"


async def grant(cluster: Cluster) -> None:
    subjects = [{"kind": "ServiceAccount", "namespace": SYSTEM, "name": ACCOUNT}]
    group = "rbac.authorization.k8s.io"
    meta = {"metadata": {"name": ACCOUNT}}
    await cluster.create(f"{RBAC}/clusterroles", {**meta, "rules": CLUSTER_RULES})
    await cluster.create(f"{RBAC}/namespaces/{SYSTEM}/roles", {**meta, "rules": ROLE_RULES})
    for path, kind in (
        (f"{RBAC}/clusterrolebindings", "ClusterRole"),
        (f"{RBAC}/namespaces/{SYSTEM}/rolebindings", "Role"),
    ):
        reference = {"apiGroup": group, "kind": kind, "name": ACCOUNT}
        await cluster.create(path, {**meta, "roleRef": reference, "subjects": subjects})


class World:
    """The cluster and the replicas that run in it."""

    def __init__(self, cluster: Cluster, kubeconfig: Path) -> None:
        self.cluster = cluster
        self.kubeconfig = kubeconfig
        self.logs: list[Path] = []

    @contextlib.asynccontextmanager
    async def replica(self) -> AsyncIterator[int]:
        """One replica as a process; its port."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        number = len(self.logs)
        log = self.cluster.directory / f"replica-{number}.log"
        self.logs.append(log)
        command = [sys.executable, "-m", "undermesh.controlplane", "--source", f"kubernetes:{self.kubeconfig}"]
        command += ["--token-review"]
        command += ["--listen", f"127.0.0.1:{port}"]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*command, stderr=output)
            try:
                yield port
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(10):
                    assert await process.wait() == 0, log.read_text()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    def root(self, namespace: str) -> bytes:
        """What the pods of a namespace find in the ConfigMap."""
        for stored in self.cluster.server.store.items("configmaps", namespace):
            if stored.obj["metadata"]["name"] == NAME:
                return str(stored.obj["data"][ENTRY]).encode()
        return b""

    async def certificate(self, port: int, token: str, identity: str) -> x509.Certificate:
        """Asks a replica as an agent does, trusting what the ConfigMap says."""
        directory = self.cluster.directory
        await until(lambda: self.root(SYSTEM), seconds=40)
        (directory / "root.pem").write_bytes(self.root(SYSTEM))
        (directory / "token").write_text(token)
        control = ControlPlane(ControlPlaneSettings(f"127.0.0.1:{port}", directory / "root.pem", directory / "token"))
        metadata = struct_pb2.Struct(fields={"ImpersonatedIdentity": struct_pb2.Value(string_value=identity)})
        request = ca_pb2.IstioCertificateRequest(csr=leaf.request(identity)[1].decode(), metadata=metadata)
        async with control.channel() as channel:
            async with asyncio.timeout(30):
                await channel.channel_ready()
            stub = ca_pb2_grpc.IstioCertificateServiceStub(channel)
            response = await stub.CreateCertificate(request, metadata=control.metadata(), timeout=5)
        await control.close()
        return x509.load_pem_x509_certificate(response.cert_chain[0].encode())


async def installed(cluster: Cluster) -> Path:
    """Make what the control plane needs; its kubeconfig."""
    await cluster.namespace(SYSTEM)
    await cluster.namespace("shop")
    await cluster.define_kinds()
    await cluster.account(SYSTEM, ACCOUNT)
    await grant(cluster)
    token = await cluster.token(SYSTEM, ACCOUNT, audience=API_AUDIENCE)
    return cluster.kubeconfig_with("controlplane", token)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path, rbac=True) as cluster:
        yield World(cluster, await installed(cluster))


async def test_two_replicas_share_one_root_and_sign_for_the_agents_of_the_cluster(world: World) -> None:
    cluster = world.cluster
    await cluster.account("shop", "web")
    await cluster.pod("shop", "web", "10.0.0.1", account="web")
    token = await cluster.token(SYSTEM, AGENT, pod=await cluster.agent_pod())
    web = "spiffe://cluster.local/ns/shop/sa/web"
    async with world.replica() as one, world.replica() as two:
        issued = [await world.certificate(port, token, web) for port in (one, two)]
        assert issued[0].issuer == issued[1].issuer
        assert world.root("shop") == world.root(SYSTEM)
        await cluster.account("shop", "db")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await world.certificate(one, token, "spiffe://cluster.local/ns/shop/sa/db")
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await cluster.pod("shop", "db", "10.0.0.2", account="db")
        await asyncio.sleep(1)
        assert await world.certificate(two, token, "spiffe://cluster.local/ns/shop/sa/db")
        await cluster.namespace("later")
        await until(lambda: world.root("later") == world.root(SYSTEM))
        logs = [log.read_text() for log in world.logs]
    assert sum("leading as" in log for log in logs) == 1
    assert not any(word in log for log in logs for word in ("Forbidden", "Traceback", "ERROR")), logs


async def test_a_replica_that_starts_before_the_api_server_answers_waits_for_it(world: World) -> None:
    world.cluster.server.faults.add(Fault(code=503, retry_after=1))
    async with world.replica():
        await asyncio.sleep(3)
        world.cluster.server.faults.clear()
        await until(lambda: world.root("shop"), seconds=40)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--source", "kubernetes:/nonexistent", "--token-review"], 78, "correct the kubeconfig"),
        (["--source", "kubernetes:", "--token-review"], 64, "a kubeconfig is missing"),
        (["--source", "files:/tmp", "--token-review"], 64, "--token-review needs --source kubernetes"),
        (["--source", "files:/tmp", "--token-jwks", "x", "--token-issuer", "x"], 64, "--state is required"),
        (["--source", "kubernetes", "--token-review", "--state", "/tmp"], 64, "the API server keeps everything"),
        (["--source", "kubernetes"], 64, "--token-jwks and --token-issuer are required, or --token-review"),
        (["--source", "kubernetes", "--token-review", "--token-issuer", "x"], 64, "exclude each other"),
    ],
)
def test_a_wrong_choice_of_source_ends_it_with_one_line(arguments: list[str], code: int, text: str) -> None:
    command = [sys.executable, "-m", "undermesh.controlplane", "--listen", "127.0.0.1:0"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
