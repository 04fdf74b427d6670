"""A real control plane over TLS on loopback, its source a directory of YAML, its tokens signed here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import jwt
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import struct_pb2

from undermesh.agent import leaf
from undermesh.agent.control import ControlPlane as Control
from undermesh.agent.control import ControlPlaneSettings
from undermesh.agent.reports import Reporter, ReportSettings
from undermesh.api.files import FileSource
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.report_book import ReportBook
from undermesh.controlplane.server import ControlPlane, Settings, Translate
from undermesh.controlplane.translate import Settings as MeshSettings
from undermesh.proto import ca_pb2, ca_pb2_grpc

ISSUER = "https://cp-test.example"
SYSTEM = "undermesh-system"
AGENT = "undermesh-agent"


@dataclasses.dataclass(frozen=True)
class PodSpec:
    """A pod of the source."""

    namespace: str
    name: str
    node: str
    account: str = "default"
    uid: str = ""
    ip: str = ""
    phase: str = "Running"

    @property
    def pod_uid(self) -> str:
        return self.uid or f"uid-{self.namespace}-{self.name}"

    def manifest(self) -> dict[str, Any]:
        status: dict[str, Any] = {"phase": self.phase}
        if self.ip:
            status["podIPs"] = [{"ip": self.ip}]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": self.namespace, "name": self.name, "uid": self.pod_uid},
            "spec": {"nodeName": self.node, "serviceAccountName": self.account},
            "status": status,
        }


def agent_pod(node: str) -> PodSpec:
    return PodSpec(SYSTEM, f"agent-{node}", node, AGENT)


PODS = (
    agent_pod("node-a"),
    agent_pod("node-b"),
    PodSpec("shop", "web", "node-a", "web", ip="10.9.0.1"),
    PodSpec("shop", "db", "node-b", "db", ip="10.9.1.1"),
    PodSpec("shop", "batch", "node-a", "batch", phase="Succeeded"),
)


class Keys:
    """The API server's token keys: signs tokens, writes the JWKS."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.kid = "cp-test-key"

    def write_jwks(self, path: Path) -> None:
        entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        staging = path.with_suffix(".new")
        staging.write_text(json.dumps({"keys": [{**entry, "kid": self.kid, "use": "sig", "alg": "ES256"}]}))
        staging.replace(path)

    def claims(self, node: str, **changes: Any) -> dict[str, Any]:
        pod = agent_pod(node)
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": ["undermesh-ca"],
            "sub": f"system:serviceaccount:{SYSTEM}:{AGENT}",
            "iat": now,
            "nbf": now,
            "exp": now + 600,
            "kubernetes.io": {
                "namespace": SYSTEM,
                "node": {"name": node, "uid": f"uid-{node}"},
                "pod": {"name": pod.name, "uid": pod.pod_uid},
                "serviceaccount": {"name": AGENT, "uid": "uid-agent"},
            },
        }
        merged = {**claims, **changes}
        return {name: value for name, value in merged.items() if value is not None}

    def sign(self, claims: Mapping[str, Any], *, algorithm: str = "ES256", key: Any = None) -> str:
        return jwt.encode(
            dict(claims), self.key if key is None else key, algorithm=algorithm, headers={"kid": self.kid}
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class World:
    """Directories of one test and the control plane that runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        self.state = root / "state"
        self.jwks = root / "jwks.json"
        self.bundle = root / "root-bundle.pem"
        self.keys = Keys()
        self.port = _free_port()
        self.server: ControlPlane | None = None
        self.source.mkdir()
        self.keys.write_jwks(self.jwks)
        self.write_pods(PODS)

    def write_pods(self, pods: Iterable[PodSpec]) -> None:
        content = yaml.safe_dump_all([pod.manifest() for pod in pods])
        staging = self.source / ".pods"
        staging.write_text(content)
        staging.replace(self.source / "pods.yaml")

    def token_file(self, node: str, token: str | None = None) -> Path:
        path = self.root / f"token-{node}"
        path.write_text(token or self.keys.sign(self.keys.claims(node)))
        return path

    @contextlib.asynccontextmanager
    async def running(self, translate: Translate | None = None, **changes: Any) -> AsyncIterator[ControlPlane]:
        """The control plane; a second call on the same world is its restart on the same port."""
        settings = Settings(
            state=self.state,
            listen=f"127.0.0.1:{self.port}",
            token_jwks=self.jwks,
            token_issuer=ISSUER,
            root_bundle_out=self.bundle,
            reload_seconds=0.05,
            stop_seconds=0.1,
        )
        server = await ControlPlane.open(
            dataclasses.replace(settings, **changes),
            FileSource(self.source, poll_seconds=0.02),
            translate or Translator(MeshSettings()),
        )
        await server.start()
        self.server = server
        running = asyncio.create_task(server.run())
        try:
            yield server
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.stop()

    @contextlib.asynccontextmanager
    async def control(self, node: str, token: str | None = None) -> AsyncIterator[Control]:
        """A client of the control plane with the token of a node's agent."""
        control = Control(
            ControlPlaneSettings(f"127.0.0.1:{self.port}", ca_root=self.bundle, token=self.token_file(node, token))
        )
        try:
            yield control
        finally:
            await control.close()


def reported(server: ControlPlane) -> dict[str, int]:
    """What the control plane believes of the pods that it knows, but for plain ones."""
    return states(server.book, server.cluster)


def states(book: ReportBook, cluster: Cluster) -> dict[str, int]:
    return {uid: state for uid, pod in cluster.by_uid.items() if (state := book.state(pod))}


@contextlib.asynccontextmanager
async def reporting(world: World, node: str) -> AsyncIterator[Reporter]:
    async with world.control(node) as control:
        reporter = Reporter(control, node=node, settings=ReportSettings(0.02, 0.2))
        task = asyncio.create_task(reporter.run())
        try:
            yield reporter
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def sign(control: Control, identity: str, *, csr: str | None = None, seconds: int = 3600) -> list[str]:
    """One raw call to the CA; returns the chain."""
    if csr is None:
        csr = leaf.request(identity)[1].decode()
    metadata = struct_pb2.Struct(fields={"ImpersonatedIdentity": struct_pb2.Value(string_value=identity)})
    async with control.channel() as channel:
        response = await ca_pb2_grpc.IstioCertificateServiceStub(channel).CreateCertificate(
            ca_pb2.IstioCertificateRequest(csr=csr, validity_duration=seconds, metadata=metadata),
            metadata=control.metadata(),
            timeout=5,
        )
    return list(response.cert_chain)


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call was not refused")


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def load(pem: str | bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)


def key_pem(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
