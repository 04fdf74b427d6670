"""Fixtures around a fixture `server`, an API server: a conftest.py imports those that its tests use.

The functions have other names than the fixtures, so that the importing module may use those as parameters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from kubectl import Kubectl

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.client import Client, load
from undermesh.lab.kube.programs import unpack


@pytest.fixture(scope="session", name="kubectl_program")
def unpacked_kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("kubectl", tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(name="kubeconfig")
def admin_kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    """An administrator's."""
    path = tmp_path / "kubeconfig"
    path.write_text(server.admin_kubeconfig())
    return path


@pytest.fixture(name="kubectl")
def admin_kubectl(kubectl_program: Path, kubeconfig: Path, tmp_path: Path) -> Kubectl:
    """kubectl with the KUBECONFIG of an administrator."""
    return Kubectl(kubectl_program, tmp_path, kubeconfig)


@pytest_asyncio.fixture(name="client")
async def admin_client(kubeconfig: Path) -> AsyncIterator[Client]:
    """An administrator's client."""
    async with Client(load(kubeconfig), agent="test") as connected:
        yield connected
