"""Two nodes with pods and a client outside, as network namespaces on a bridge.

Sockets are made in the namespaces and served by the test's own event loop, so no process has to be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab import netns
from undermesh.lab.commands import ip_batch, run
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout

SECONDS = 5.0
"""For an answer, if it is to come."""
SOON = 0.6
"""For an answer that may not come."""
PODS = {"a1": (1, 2), "b1": (1, 3), "a2": (2, 2)}
"""Name -> number of its node, number of the pod."""


def node_address(node: int, family: int = 4) -> str:
    return f"172.30.0.{10 + node}" if family == 4 else f"fd00:30::{10 + node}"


def pod_address(name: str, family: int = 4) -> str:
    node, number = PODS[name]
    return f"10.244.{node}.{number}" if family == 4 else f"fd00:10:244:{node}::{number}"


@dataclass(frozen=True)
class Heard:
    """What a server said about a connection: its own name and who it saw."""

    server: str
    peer: str


class World:
    """Make it with `world`."""

    def __init__(self) -> None:
        self.prefix = f"um-kp{os.urandom(2).hex()}"

    def name(self, part: str) -> str:
        return f"{self.prefix}-{part}"

    def build(self) -> None:
        for part in ("net", "out"):
            netns.create(self.name(part))
        ip_batch(self.name("net"), ["link set lo up", "link add br0 type bridge", "link set br0 up"])
        ip_batch(self.name("net"), ["addr add 172.30.0.1/24 dev br0", "addr add fd00:30::1/64 dev br0 nodad"])
        self._attach("out", 99)
        services = [f"route add {range_} via {node_address(1)}" for range_ in ("10.96.0.0/16", "192.0.2.0/24")]
        ip_batch(self.name("out"), services)
        for node in (1, 2):
            self.build_node(node)

    def build_node(self, node: int) -> None:
        part, other = f"node{node}", 3 - node
        netns.create(self.name(part))
        netns.set_sysctls(self.name(part), {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
        self._attach(part, 10 + node)
        routes = [f"route add 10.244.{other}.0/24 via {node_address(other)}"]
        routes.append(f"route add fd00:10:244:{other}::/64 via {node_address(other, 6)}")
        routes += ["route add default via 172.30.0.1", "route add default via fd00:30::1"]
        ip_batch(self.name(part), routes)
        for name, (where, _) in PODS.items():
            if where == node:
                self._build_pod(name, node)

    def remove_node(self, node: int) -> None:
        ip_batch(self.name("net"), [f"link delete node{node}"])  # first: the kernel deletes it with the netns
        for name, (where, _) in PODS.items():
            if where == node:
                netns.delete(self.name(name))
        netns.delete(self.name(f"node{node}"))

    def _attach(self, part: str, number: int) -> None:
        own = self.name(part)
        ip_batch(own, [f"link add eth0 type veth peer name {part} netns {self.name('net')}"])
        ip_batch(self.name("net"), [f"link set {part} master br0 up"])
        addresses = [f"addr add 172.30.0.{number}/24 dev eth0", f"addr add fd00:30::{number}/64 dev eth0 nodad"]
        ip_batch(own, ["link set lo up", *addresses, "link set eth0 up"])

    def _build_pod(self, name: str, node: int) -> None:
        netns.create(self.name(name))
        host, own = self.name(f"node{node}"), self.name(name)
        gateways = (f"10.244.{node}.1", f"fd00:10:244:{node}::1")
        ip_batch(host, [f"link add {name} type veth peer name eth0 netns {own}"])
        ip_batch(
            host,
            [
                *(f"addr add {gateway} dev {name}{' nodad' if ':' in gateway else ''}" for gateway in gateways),
                f"link set {name} up",
                *(f"route add {pod_address(name, family)} dev {name}" for family in (4, 6)),
            ],
        )
        ip_batch(
            own,
            [
                "link set lo up",
                f"addr add {pod_address(name)}/32 dev eth0",
                f"addr add {pod_address(name, 6)}/128 dev eth0 nodad",
                "link set eth0 up",
                *(f"route add {gateway} dev eth0" for gateway in gateways),
                *(f"route add default via {gateway}" for gateway in gateways),
            ],
        )

    def destroy(self) -> None:
        for part in (*PODS, "node1", "node2", "out", "net"):
            netns.delete(self.name(part))

    def layout(self, directory: Path, kubeconfig: Path) -> ClusterLayout:
        nodes = tuple(
            NodeLayout(
                name=f"node{node}",
                netns=self.name(f"node{node}"),
                cgroup=directory,
                directory=directory,
                addresses=(node_address(node), node_address(node, 6)),
                pod_cidrs=(f"10.244.{node}.0/24", f"fd00:10:244:{node}::/64"),
            )
            for node in (1, 2)
        )
        return ClusterLayout(
            name="test",
            prefix=self.prefix,
            directory=directory,
            build=directory,
            kubeconfig=kubeconfig,
            api_addresses=(),
            api_port=6443,
            service_cidrs=("10.96.0.0/16", "fd00:96::/112"),
            dns_address="10.96.0.10",
            domain="cluster.local",
            nodes=nodes,
        )

    @contextlib.asynccontextmanager
    async def serving(self, *pods: str, port: int = 8080) -> AsyncIterator[None]:
        """Answer in those pods, on TCP and UDP of both families, with the pod's name and the peer's address."""
        async with contextlib.AsyncExitStack() as stack:
            for pod in pods:
                for family in (socket.AF_INET, socket.AF_INET6):
                    stream, datagram = netns.call(self.name(pod), lambda f=family: _bound(f, port))  # type: ignore[misc]
                    server = await asyncio.start_server(_answer(pod), sock=stream)
                    stack.callback(server.close)
                    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                        lambda p=pod: _Echo(p),  # type: ignore[misc]
                        sock=datagram,
                    )
                    stack.callback(transport.close)
            yield

    async def ask(self, client: str, address: str, port: int, *, udp: bool = False) -> Heard:
        """Connect from a namespace. Raises OSError or TimeoutError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        made = netns.call(self.name(client), lambda: socket.socket(family, kind))
        loop = asyncio.get_running_loop()
        with made:
            made.setblocking(False)
            async with asyncio.timeout(SECONDS):
                await loop.sock_connect(made, (address, port))
                if udp:
                    await loop.sock_sendall(made, b"x")
                server, peer = (await loop.sock_recv(made, 200)).decode().split()
        return Heard(server, peer)

    def table(self, node: int) -> str:
        return run(netns.enter(self.name(f"node{node}"), ["nft", "list", "ruleset"]))


def _bound(family: int, port: int) -> tuple[socket.socket, socket.socket]:
    bound = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        made = socket.socket(family, kind)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("", port))
        made.setblocking(False)
        bound.append(made)
    return bound[0], bound[1]


def _answer(pod: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{pod} {writer.get_extra_info('peername')[0]}".encode())
        writer.close()

    return serve


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, pod: str) -> None:
        self._pod = pod

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(f"{self._pod} {addr[0]}".encode(), addr)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Everything in it is gone at the end, whatever happens."""
    made_directory = netns.prepare_directory()
    made = World()
    try:
        made.build()
        yield made
    finally:
        made.destroy()
        if made_directory:
            netns.restore_directory()
