from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from undermesh.lab.apiserver import ApiServer, Settings
from undermesh.lab.apiserver.kubelets import KubeletTable

sys.path.insert(0, str(Path(__file__).parent))

from api_client import TOKENS, Client
from api_fixtures import admin_kubeconfig, admin_kubectl, unpacked_kubectl  # noqa: F401 (fixtures)
from local_kubelet import LocalKubelet


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A module overrides this to change the server's settings."""
    return Settings(tmp_path / "state", tokens=TOKENS)


@pytest.fixture
def kubelet() -> LocalKubelet:
    return LocalKubelet()


@pytest_asyncio.fixture
async def server(settings: Settings, kubelet: LocalKubelet) -> AsyncIterator[ApiServer]:
    """A server of the test's own, with one node `node-a`."""
    table = KubeletTable()
    table.add("node-a", kubelet)
    async with ApiServer(settings, table) as running:
        yield running


@pytest_asyncio.fixture
async def connect(server: ApiServer) -> AsyncIterator[Callable[[str], Client]]:
    """Makes clients by token."""
    async with aiohttp.ClientSession() as session:
        yield lambda token: Client(session, server, token)


@pytest_asyncio.fixture
async def api(connect: Callable[[str], Client]) -> Client:
    """An administrator's client."""
    return connect("admin-token")
