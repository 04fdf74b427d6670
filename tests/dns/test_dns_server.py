"""The server's process on real sockets, with objects from a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import dns.asyncquery
import dns.message
import dns.rcode
import dns.rdatatype
import dns.reversename
import pytest
import pytest_asyncio
from dns_objects import HTTP, endpoint, endpoint_slice, service

from undermesh.lab.client import ENDPOINT_SLICES, NAMESPACES, SERVICES, Client

HOST = "127.0.0.1"
WEB = "web.shop.svc.cluster.local."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Resolver:
    """A running server."""

    process: asyncio.subprocess.Process
    port: int
    health: int
    ready: int

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        query = dns.message.make_query(name, kind)
        if tcp:
            return await dns.asyncquery.tcp(query, HOST, port=self.port, timeout=5)
        return await dns.asyncquery.udp(query, HOST, port=self.port, timeout=5)

    async def values(self, name: str, kind: str = "A") -> list[str]:
        return sorted(rdata.to_text() for rrset in (await self.ask(name, kind)).answer for rdata in rrset)

    async def becomes(self, expected: list[str], name: str, kind: str = "A") -> None:
        """Wait until the server has seen a change."""
        async with asyncio.timeout(5):
            while True:
                if await self.values(name, kind) == expected:
                    return
                await asyncio.sleep(0.02)


async def status(port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


@contextlib.asynccontextmanager
async def started(kubeconfig: Path, wait: bool = True) -> AsyncIterator[Resolver]:
    ports = [free_port() for _ in range(3)]
    options = [f"--{name}={HOST}:{port}" for name, port in zip(("listen", "health", "ready"), ports, strict=True)]
    argv = [sys.executable, "-m", "undermesh.lab.dns", f"--kubeconfig={kubeconfig}", *options]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        if wait:
            assert await asyncio.wait_for(process.stdout.readline(), 15) == b"ready\n"
        yield Resolver(process, *ports)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0


@pytest_asyncio.fixture
async def resolver(kubeconfig: Path, client: Client) -> AsyncIterator[Resolver]:
    await client.create(NAMESPACES, {"metadata": {"name": "shop"}})
    async with started(kubeconfig) as running:
        yield running


async def test_a_service_is_found_by_udp_and_tcp_as_long_as_it_is_there(client: Client, resolver: Resolver) -> None:
    made = await client.create(SERVICES, service("web", ipFamilyPolicy="RequireDualStack"))
    first, second = made["spec"]["clusterIPs"]
    await resolver.becomes([first], WEB)
    assert await resolver.values(WEB, "AAAA") == [second]
    assert (await resolver.ask(WEB, tcp=True)).answer[0][0].to_text() == first
    for address in (first, second):
        assert await resolver.values(str(dns.reversename.from_address(address)), "PTR") == [WEB]
    await client.delete(SERVICES, "web", "shop")
    await resolver.becomes([], WEB)
    assert (await resolver.ask(WEB)).rcode() == dns.rcode.NXDOMAIN


async def test_a_headless_service_follows_its_endpoints(client: Client, resolver: Resolver) -> None:
    await client.create(SERVICES, service("db", clusterIP="None"))
    piece = endpoint_slice("db", endpoint("10.244.1.2", "db-0"), ports=[HTTP])
    made = await client.create(ENDPOINT_SLICES, piece)
    await resolver.becomes(["10.244.1.2"], "db-0.db.shop.svc.cluster.local.")
    made["endpoints"] = [endpoint("10.244.1.3", "db-1"), endpoint("10.244.1.4", "db-2", ready=False)]
    await client.update(ENDPOINT_SLICES, made)
    await resolver.becomes(["10.244.1.3"], "db.shop.svc.cluster.local.")
    assert (await resolver.ask("db-0.db.shop.svc.cluster.local.")).rcode() == dns.rcode.NXDOMAIN


async def test_the_api_server_itself_has_a_name(resolver: Resolver) -> None:
    assert await resolver.values("kubernetes.default.svc.cluster.local.") == ["10.96.0.1"]


async def test_probes_say_that_it_lives_and_answers(resolver: Resolver) -> None:
    assert await status(resolver.health, "/health") == 200
    assert await status(resolver.ready, "/ready") == 200
    assert await status(resolver.ready, "/other") == 404


async def test_garbage_and_a_slow_client_keep_nobody_waiting(resolver: Resolver) -> None:
    garbage = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    _, slow = await asyncio.open_connection(HOST, resolver.port)
    slow.write(b"\x01")
    for packet in (b"", b"x", bytes(12), b"\xff" * 600):
        garbage.sendto(packet, (HOST, resolver.port))
    assert await resolver.values("kubernetes.default.svc.cluster.local.") == ["10.96.0.1"]
    garbage.close()
    slow.close()


async def test_without_an_api_server_it_lives_is_not_ready_and_asks_for_patience(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.write_text(
        f"""
current-context: x
contexts: [{{name: x, context: {{cluster: x, user: x}}}}]
clusters: [{{name: x, cluster: {{server: "https://{HOST}:{free_port()}", insecure-skip-tls-verify: true}}}}]
users: [{{name: x, user: {{token: x}}}}]
"""
    )
    async with started(nowhere, wait=False) as resolver:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    if await status(resolver.ready, "/ready") == 503:
                        break
                await asyncio.sleep(0.05)
        assert await status(resolver.health, "/health") == 200
        assert (await resolver.ask(WEB)).rcode() == dns.rcode.SERVFAIL


def test_outside_of_a_pod_it_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from undermesh.lab.dns.__main__ import main

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    ports = [f"--{name}={HOST}:0" for name in ("listen", "health", "ready")]
    assert main(ports) == 78
    assert "--kubeconfig" in capsys.readouterr().err
