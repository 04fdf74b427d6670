from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[1] / "apiserver"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kubernetes"))

from api_fixtures import unpacked_kubectl  # noqa: F401 (fixtures)
from cluster_harness import Cluster, running
from kubectl import Kubectl


@pytest_asyncio.fixture
async def empty_cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """An API server that enforces RBAC, with nothing of ours in it."""
    async with running(tmp_path, rbac=True) as cluster:
        yield cluster


@pytest.fixture
def kubectl(kubectl_program: Path, empty_cluster: Cluster, tmp_path: Path) -> Kubectl:
    return Kubectl(kubectl_program, tmp_path, empty_cluster.kubeconfig)
