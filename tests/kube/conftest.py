from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from undermesh.lab.kube.cluster import KubeCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[KubeCluster]:
    """Two nodes, no mesh, shared by all tests that leave it as they found it."""
    with KubeCluster(f"tests-{os.getpid()}", nodes=2) as running:
        yield running
