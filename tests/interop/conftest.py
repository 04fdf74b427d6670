"""A cluster with undermesh on two nodes, and a third one on which Envoy speaks HBONE in its place.

Environment:
    UNDERMESH_INTEROP_MIB=20   size of the big transfers.
    UNDERMESH_INTEROP_IDLE=3   seconds for which an idle stream stays so.
    UNDERMESH_INTEROP_LOGS=DIR where the logs go (default: they go with the cluster).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from e2e_mesh import MeshView
from e2e_pki import Authority
from e2e_pods import Pod
from interop_cluster import interop_cluster
from interop_config import Credentials
from interop_envoy import Envoy
from interop_ways import TRUST

from undermesh.lab.cluster import Cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def interop() -> Iterator[Cluster]:
    """The cluster."""
    logs = os.environ.get("UNDERMESH_INTEROP_LOGS")
    with interop_cluster(Path(logs) if logs else None) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def pods(interop: Cluster) -> dict[str, Pod]:
    """Every pod by name, with the tool running in it."""
    return {pod.name: Pod.start(interop, pod.name) for pod in interop.manifest.pods}


@pytest.fixture(scope="session")
def mesh(interop: Cluster) -> MeshView:
    """What undermesh says of itself."""
    return MeshView(interop)


@pytest.fixture(scope="session")
def ca(interop: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The cluster's CA."""
    return Authority.of_cluster(interop.run_dir / "state/controlplane/undermesh-ca", tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def roots(interop: Cluster) -> Path:
    """The roots of the cluster, in PEM."""
    return interop.mesh.root_bundle


@pytest.fixture(scope="session")
def server_credentials(ca: Authority, roots: Path, pods: dict[str, Pod]) -> Credentials:
    """What an Envoy in pod `peer` shows, and lets in: the whole trust domain."""
    return Credentials(roots, ca.leaf(pods["peer"].identity), prefix=TRUST)


@pytest.fixture(scope="session")
def envoy_server(interop: Cluster) -> Envoy:
    """The Envoy of pod `peer`, not started."""
    return Envoy(interop, "peer")


@pytest.fixture(scope="session")
def envoy_client(interop: Cluster) -> Envoy:
    """The Envoy of pod `envoy`, not started."""
    return Envoy(interop, "envoy")
