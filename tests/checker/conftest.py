"""The checker's pods, once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from undermesh.lab.checker.kubeground import KubeGround
from undermesh.lab.kube.cluster import KubeCluster


@pytest.fixture(scope="session")
def kube_ground(meshed_cluster: KubeCluster) -> Iterator[KubeGround]:
    """Pods in and out of the mesh, on the cluster that tests share."""
    with KubeGround(meshed_cluster, mesh=True) as ground:
        yield ground
