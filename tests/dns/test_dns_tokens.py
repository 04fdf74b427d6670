"""The kubelet replaces a pod's token before it expires; the server goes on with the new one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from kubectl import Kubectl

import undermesh.lab
from undermesh.lab.apiserver import ApiServer
from undermesh.lab.client import SERVICES, Client
from undermesh.lab.dns import __main__ as program
from undermesh.lab.dns.access import in_cluster

MANIFESTS = Path(next(iter(undermesh.lab.__path__))) / "manifests"
API = ("kubernetes", "default", "svc", "cluster", "local")


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_a_new_token_is_taken_up_without_a_gap(
    server: ApiServer, client: Client, kubectl: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_LOOK_AT_TOKEN", 0.05)
    await kubectl("apply", "-f", str(MANIFESTS))
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    (tmp_path / "ca.crt").write_text(server.authority.pem)

    async def renew(seconds: int) -> None:
        status = await client.token("coredns", "kube-system", seconds=seconds)
        (tmp_path / "token").write_text(status["token"])

    await renew(3600)
    resolver = program.Resolver("cluster.local", lambda: in_cluster(environ, tmp_path))
    following = asyncio.create_task(resolver.follow())
    try:
        await becomes(lambda: resolver.zone is not None)
        first = resolver.zone
        await renew(7200)

        def replaced() -> bool:
            assert resolver.zone is not None and resolver.zone.find(API).records
            return resolver.zone is not first

        await becomes(replaced)
        late = {"metadata": {"name": "late", "namespace": "default"}, "spec": {"ports": [{"port": 1}]}}
        await client.create(SERVICES, late)
        await becomes(lambda: resolver.zone is not None and resolver.zone.find(("late", *API[1:])).exists)
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
