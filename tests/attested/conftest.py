"""A node with undermesh whose agent has lane attested on.

Environment:
    UNDERMESH_ATTESTED_LOGS=DIR where the logs go (default: they go with the cluster).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from e2e_mesh import MeshView
from e2e_pods import Pod

from undermesh.lab.cluster import Cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def near_cluster() -> Iterator[Cluster]:
    """The cluster."""
    logs = os.environ.get("UNDERMESH_ATTESTED_LOGS")
    options = ["--lane-attested", "on"]
    with Cluster(HERE / "cluster", logs=Path(logs) if logs else None, agent_options=options) as cluster:
        cluster.start_mesh("node1")
        cluster.wait_enrolled("mesh", 30)
        yield cluster


@pytest.fixture(scope="session")
def pods(near_cluster: Cluster) -> dict[str, Pod]:
    """Every pod by name, with the tool running in it."""
    return {
        pod.name: Pod.start(near_cluster, pod.name) for pod in near_cluster.manifest.pods if pod.namespace == "mesh"
    }


@pytest.fixture(scope="session")
def mesh(near_cluster: Cluster) -> MeshView:
    """What undermesh says of itself."""
    return MeshView(near_cluster)
