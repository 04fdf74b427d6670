from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from undermesh.lab.apiserver import ApiServer, Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "apiserver"))

from api_fixtures import admin_client, admin_kubeconfig, admin_kubectl, unpacked_kubectl  # noqa: F401 (fixtures)


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    """A server of the test's own, which enforces RBAC."""
    async with ApiServer(Settings(tmp_path / "state", rbac=True)) as running:
        yield running
