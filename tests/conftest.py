"""Shared by all Python tests.

What needs root is skipped without it, before any of its fixtures runs. Where several workers share the tests
(`pytest -n N --dist loadscope`), the tests of one file stay together, and those of a directory that share a cluster.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

sys.path.insert(0, str(Path(__file__).parent))

from features import needs_root

if TYPE_CHECKING:
    from undermesh.lab.kube.cluster import KubeCluster

# The longest first: what is left at the end is then short, and no worker waits for the others.
CLUSTERS = {
    "tests/e2e/": "e2e",
    "tests/mesh/": "meshed",
    "tests/checker/": "meshed",
    "tests/kube/": "kube",
    "tests/interop/": "interop",
}
"""Directory -> the cluster that its tests share."""


class _Together(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        shared = (cluster for directory, cluster in CLUSTERS.items() if nodeid.startswith(directory))
        return next(shared, nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, c in enumerate(CLUSTERS) if item.nodeid.startswith(c)), len(CLUSTERS)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") is not None:
        needs_root()


@pytest.fixture(scope="session")
def meshed_cluster() -> Iterator[KubeCluster]:
    """Two nodes with the mesh and nothing in it, shared by tests that leave it as they found it."""
    from undermesh.lab.kube.cluster import KubeCluster

    with KubeCluster(f"mesh-tests-{os.getpid()}", nodes=2) as cluster:
        cluster.install_mesh()
        yield cluster
