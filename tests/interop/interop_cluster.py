"""Two nodes with undermesh, and a third one on which Envoy speaks HBONE in its place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from undermesh.lab.cluster import Cluster
from undermesh.lab.mesh import wait_for

HERE = Path(__file__).parent
_ENROLLED = ("client", "far", "flap")


@contextlib.contextmanager
def interop_cluster(logs: Path | None = None) -> Iterator[Cluster]:
    """The cluster of cluster/*.yaml; `peer` on node3 is published as a pod that accepts tunnels."""
    with Cluster(HERE / "cluster", logs=logs) as cluster:
        for node in ("node1", "node2"):
            cluster.start_mesh(node)
        peer = cluster.manifest.pod("peer")
        argv = [sys.executable, str(HERE / "foreign_agent.py"), "node3", cluster.mesh.control_plane]
        argv += [str(cluster.mesh.root_bundle), str(cluster.mesh.agent_token("node3")), peer.uid]
        with (cluster.logs / "foreign-agent.log").open("ab") as log:
            agent = cluster.nodes["node3"].system("agent").start(argv, log=log)
        try:
            enrolled = {cluster.manifest.pod(name).uid: name for name in _ENROLLED}
            cluster.agents.wait_pods(enrolled, "enrolled", 30)
            wait_for("tunnel protocol of pod peer", 10, lambda: _protocol(cluster, peer.name) == "HBONE")
            yield cluster
        finally:
            agent.kill()
            agent.wait()


def _protocol(cluster: Cluster, pod: str) -> str:
    workloads = cluster.agent_api("node1", "/v1/workloads")["workloads"]
    return next((str(workload["protocol"]) for workload in workloads if workload["name"] == pod), "unknown")
