from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from undermesh.lab.apiserver import ApiServer, Settings
from undermesh.lab.client import Client
from undermesh.lab.controllers.manager import controllers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "apiserver"))

from api_fixtures import admin_client, admin_kubeconfig, admin_kubectl, unpacked_kubectl  # noqa: F401 (fixtures)
from node_stand_in import Nodes


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    """A server of the test's own, without nodes."""
    async with ApiServer(Settings(tmp_path / "state")) as running:
        yield running


@pytest_asyncio.fixture
async def nodes(client: Client) -> AsyncIterator[Nodes]:
    """Two nodes whose pods run without containers."""
    async with Nodes(client, "node1", "node2") as playing:
        yield playing


@pytest_asyncio.fixture
async def working(client: Client) -> AsyncIterator[None]:
    """The controllers and the scheduler work; none of them may fail. A node is lost after a second."""
    async with controllers(client, grace=1.0) as task:
        yield
        assert not task.done(), task.exception()
