"""One cluster with undermesh for all end-to-end tests: real pods, real traffic, the mesh as it ships.

Environment:
    UNDERMESH_E2E_MESH=0    without the mesh: the tests of plain behaviour must pass all the same, the others
                            are skipped. It validates the tests.
    UNDERMESH_E2E_GIB=0.25  size of the big transfers (default 1).
    UNDERMESH_E2E_LOGS=DIR  where the logs go (default: they go with the cluster).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_mesh import MeshView
from e2e_pods import Pod, Way

from undermesh.lab.cluster import Cluster

HERE = Path(__file__).parent
MESH = os.environ.get("UNDERMESH_E2E_MESH", "1") != "0"
ENROLLED = ("mesh", "second", "flap")
UNFORESEEN = re.compile(r"Traceback|panicked|never retrieved|was destroyed|unforeseen|RuntimeError")

WayMaker = Callable[..., Way]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root; what looks at the mesh itself needs the mesh."""
    without = pytest.mark.skip(reason="UNDERMESH_E2E_MESH=0: this looks at the mesh itself")
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.root)
        if not MESH and "mesh" in getattr(item, "fixturenames", ()):
            item.add_marker(without)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, with the mesh running and every pod enrolled that has to be."""
    logs = os.environ.get("UNDERMESH_E2E_LOGS")
    with Cluster(HERE / "cluster", logs=Path(logs) if logs else None) as running:
        if MESH:
            running.start_mesh()
            for namespace in ENROLLED:
                running.wait_enrolled(namespace, 30)
        yield running
        unforeseen = [
            f"{log.name}: {line}"
            for log in sorted(running.logs.glob("*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if UNFORESEEN.search(line)
        ]
    assert not unforeseen, f"the logs of the parts have what nobody foresaw: {unforeseen[:10]}"


@pytest.fixture(scope="session")
def pods(cluster: Cluster) -> dict[str, Pod]:
    """Every pod by name, with the tool running in it."""
    return {pod.name: Pod.start(cluster, pod.name) for pod in cluster.manifest.pods}


@pytest.fixture
def way(cluster: Cluster, pods: dict[str, Pod]) -> WayMaker:
    """Makes ways: way("client", "far", 4), way("client", "far", 6, service="far")."""

    def make(client: str, server: str, family: int, *, service: str | None = None, port: int = 80) -> Way:
        host = pods[server].address(family)
        if service is not None:
            addresses = cluster.manifest.service(service).addresses
            host = next(address for address in addresses if (":" in address) == (family == 6))
        return Way(pods[client], pods[server], host, None if service is None else port)

    return make


@pytest.fixture
def mesh(cluster: Cluster) -> MeshView:
    """What is only there with the mesh: logs, metrics, policies, parts."""
    return MeshView(cluster)


@pytest.fixture
def steady(mesh: MeshView) -> Iterator[MeshView]:
    """For tests that break the mesh: it must be whole again afterwards, or the test fails."""
    mesh.wait_whole()
    yield mesh
    mesh.wait_whole()
