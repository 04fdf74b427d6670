from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cluster_harness import SYSTEM, Cluster, running
from scripted_server import Server
from source_harness import FAST, Watched

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.source import KubernetesSource


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server().running() as running:
        yield running


@pytest.fixture
async def api(server: Server, tmp_path: Path) -> AsyncIterator[Api]:
    api = Api(Access(server.kubeconfig(tmp_path)), FAST)
    yield api
    await api.close()


@pytest.fixture
async def watched(api: Api) -> AsyncIterator[Watched]:
    """A source of the control plane that is not watched yet."""
    watched = Watched(KubernetesSource.of_control_plane(api))
    yield watched
    await watched.stop()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """The lab's API server with our system namespace."""
    async with running(tmp_path) as cluster:
        await cluster.namespace(SYSTEM)
        yield cluster
