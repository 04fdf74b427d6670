"""What every scene of the demo needs: the cluster and its apps, the capture, the logs, the report."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from undermesh.lab.build import Build
from undermesh.lab.capture import Capture
from undermesh.lab.cluster import Cluster
from undermesh.lab.demo.report import Report
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.demo.traffic import SERVERS, ClientPod, Outcome, targets
from undermesh.lab.snapshot import Snapshot, bpf_left_over, bpf_objects, differences, take_host, take_netns

HERE = Path(__file__).parent
APPS = HERE.parent / "apps"
NAMESPACE = "shop"
CLIENTS = ("web", "batch")

T = TypeVar("T")


class Stage:
    """The demo's cluster with its apps.

    Whatever blocks goes through `call`, one after the other in one thread; so `leave` finds nothing under way.
    """

    def __init__(self, build: Build, report: Report, logs: Path) -> None:
        self.report = report
        self.token = f"undermesh-demo-{secrets.token_hex(12)}"
        self.cluster = Cluster(HERE, build=build, logs=logs)
        self.targets = targets(self.cluster.manifest)
        self.web, self.batch = (ClientPod(name, self.targets) for name in CLIENTS)
        self.host_before: Snapshot | None = None
        self.pods_before: dict[str, Snapshot] = {}
        self.bpf_known: dict[tuple[str, int], str] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="demo")
        self._capture: Capture | None = None

    @property
    def capture(self) -> Capture:
        """The capture on the wire between the nodes."""
        assert self._capture is not None, "enter() comes first"
        return self._capture

    @property
    def clients(self) -> tuple[ClientPod, ClientPod]:
        """Both client pods."""
        return self.web, self.batch

    @property
    def client_node(self) -> str:
        """The node of the clients."""
        return self.cluster.manifest.pod("web").node

    @property
    def server_node(self) -> str:
        """The node of the servers."""
        return self.cluster.manifest.pod("orders").node

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something that blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def enter(self) -> None:
        """Look at the machine, build the cluster, start capture and apps."""
        self.host_before = await self.call(take_host, self.cluster.prefix)
        await self.call(self.cluster.start)
        await self.call(self.cluster.check_machine)
        node = self.cluster.nodes[self.client_node]
        self._capture = await self.call(Capture, node.netns, "u0", self.token.encode())
        for server, kind in SERVERS.items():
            port = str(next(iter(self.cluster.manifest.pod(server).ports.values())))
            self._app(server, "server.py", kind, port)
        for client in self.clients:
            socket = self.cluster.run_dir / f"{client.name}.sock"
            self._app(client.name, "client.py", str(socket))
            await client.connect(socket)
        await self.call(self._wait_for_servers)
        for pod in self.cluster.manifest.pods:
            self.pods_before[pod.name] = await self.call(take_netns, self.cluster.netns(pod.name))

    async def leave(self) -> None:
        """Stop everything and remove every trace."""
        for client in self.clients:
            await client.close()
        await self.call(self._leave)

    def access_log(self, node: str) -> AccessLog:
        """A reader for the access log of a node's ztunnel, from its start."""
        return AccessLog(self.cluster.mesh.access_log(node))

    def address_of(self, outcome: Outcome) -> str:
        """The address that the server should have seen in `outcome`."""
        return self.address(outcome.client, outcome.target.family)

    def address(self, pod: str, family: int) -> str:
        """A pod's address of one family, 4 or 6."""
        addresses = self.cluster.manifest.pod(pod).addresses
        return next(address for address in addresses if (":" in address) == (family == 6))

    def host_differences(self) -> list[str]:
        """How the machine differs from what it was before `enter`."""
        assert self.host_before is not None, "enter() comes first"
        return differences(self.host_before, take_host(self.cluster.prefix))

    def pod_differences(self) -> list[str]:
        """How the pods' network namespaces differ from what they were before the mesh came."""
        return [
            f"{pod}: {line}"
            for pod, before in self.pods_before.items()
            for line in differences(before, take_netns(self.cluster.netns(pod)))
        ]

    def mesh_left_over(self) -> list[str]:
        """What is left of the mesh in the kernel: pins, and BPF objects that remember_bpf saw."""
        pins = [f"left over: pin: {place.pin_dir}" for place in self.cluster.nodes.values() if place.pin_dir.exists()]
        return [*pins, *bpf_left_over(self.bpf_known)]

    def remember_bpf(self) -> None:
        """Note which BPF objects are the mesh's, so that mesh_left_over can look for them."""
        self.bpf_known = bpf_objects(self.cluster.prefix)

    def is_pod(self, address: str) -> bool:
        """Whether an address belongs to a pod of the demo."""
        return any(address in pod.addresses for pod in self.cluster.manifest.pods)

    def _app(self, pod: str, script: str, *arguments: str) -> None:
        self.cluster.spawn(pod, [sys.executable, "-I", "-S", str(APPS / script), *arguments, self.token])

    def _wait_for_servers(self) -> None:
        for server in SERVERS:
            port = next(iter(self.cluster.manifest.pod(server).ports.values()))
            self.cluster.wait_listening(server, port)

    def _leave(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        self.cluster.stop()
