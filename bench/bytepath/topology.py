"""What the benchmark runs on: two nodes with their pods, undermesh and the Envoys, and load in the pods."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bytepath import load, variants
from bytepath.accounts import Cpu, Memory, cpu, memory
from bytepath.load import LoadClient
from bytepath.sidecars import sidecars
from bytepath.variants import Variant
from undermesh.lab import netns
from undermesh.lab.build import Build
from undermesh.lab.cluster import Cluster
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.mesh import wait_for

CLUSTER = Path(__file__).parent / "cluster"
# Thousands of short connections from one address to another: what they leave behind shall not be what is measured.
_SYSCTLS = {"net/ipv4/tcp_tw_reuse": "1", "net/ipv4/tcp_max_tw_buckets": "2000"}
# Allocators and proxies give memory back by timers.
_SETTLING = 3.0


@dataclass(frozen=True)
class ReleaseBuild(Build):
    """ztunnel as it ships."""

    @property
    def ztunnel(self) -> Path:
        return self.root / "rust/release/ztunnel"


class Topology:
    """All of it, running."""

    def __init__(self, cluster: Cluster, clients: Mapping[str, LoadClient]) -> None:
        self._cluster = cluster
        self._clients = clients
        self.variants = variants.all_of(cluster)

    def order(self, variant: Variant, verb: str, *words: object) -> dict[str, object]:
        """Have the variant's client carry out an order towards its server; `words` follow the address."""
        return self._clients[variant.client].order(verb, variant.address, *words)

    def client(self, variant: Variant) -> LoadClient:
        """For orders without an address."""
        return self._clients[variant.client]

    def cpu(self, variant: Variant) -> Cpu:
        """Used so far."""
        return cpu(variant.proxies, self._cluster.cgroup)

    def settled_memory(self, variant: Variant) -> Memory:
        """Of the variant's proxies, once they have had time to give back what they can."""
        time.sleep(_SETTLING)
        return memory(variant.proxies)

    def lane(self, variant: Variant) -> str | None:
        """The lane that a connection takes, as ztunnel logs it; None: no ztunnel is on the way.

        Raises:
            LabError: no line of it comes.
        """
        if variant.log_node is None:
            return None
        log = AccessLog(self._cluster.mesh.access_log(variant.log_node))
        log.mark()
        self.order(variant, "conns", 1, 1)

        def logged() -> str | None:
            lanes = [entry.get("lane") for entry in log.entries() if entry.get("src.workload") == variant.client]
            return str(lanes[0]) if lanes else None

        return wait_for(f"line of {variant.name} in the access log", 10, logged)


@contextlib.contextmanager
def running(build: Build) -> Iterator[Topology]:
    """It runs inside of the block."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(Cluster(CLUSTER, build=build))
        cluster.start_mesh()
        cluster.wait_enrolled("meshed", 30)
        for pod in cluster.manifest.pods:
            netns.set_sysctls(cluster.netns(pod.name), _SYSCTLS)
        stack.enter_context(sidecars(cluster, directory, "sidecar-client", "sidecar-far", load.PORT))
        all_ = variants.all_of(cluster)
        for server in sorted({variant.server for variant in all_}):
            cluster.spawn(server, load.argv(build, "serve", f"0.0.0.0:{load.PORT}"), container=load.CONTAINER)
            cluster.wait_listening(server, load.PORT)
        clients = {variant.client for variant in all_}
        yield Topology(cluster, {pod: stack.enter_context(LoadClient(cluster, build, pod)) for pod in clients})
