"""The roots in every namespace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cluster_harness import Cluster
from source_harness import FAST, Watched, until

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.controlplane.kubernetes.root_bundle import ENTRY, NAME, RootBundleWriter
from undermesh.lab.apiserver.faults import Fault


class Roots:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.bundle = b"one"
        self.watched = Watched(KubernetesSource.of_control_plane(Api(Access(cluster.kubeconfig), FAST)))
        self.writer = RootBundleWriter(cluster.api, lambda: self.watched.source.current.namespaces, lambda: self.bundle)

    def copies(self) -> dict[str, str]:
        stored = self.cluster.server.store.items("configmaps")
        found: list[dict[str, Any]] = [entry.obj for entry in stored if entry.obj["metadata"]["name"] == NAME]
        return {obj["metadata"]["namespace"]: obj["data"].get(ENTRY, "") for obj in found}

    async def all_have(self, text: str, *more: str) -> None:
        names = {"default", "kube-system", "kube-public", "kube-node-lease", "undermesh-system", *more}
        await until(lambda: self.copies() == dict.fromkeys(names, text))


@pytest.fixture
async def roots(cluster: Cluster) -> AsyncIterator[Roots]:
    roots = Roots(cluster)
    await roots.watched.start()
    task = asyncio.create_task(roots.writer.run())
    yield roots
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await roots.watched.stop()


async def test_every_namespace_has_them_also_one_that_comes_later(roots: Roots) -> None:
    await roots.all_have("one")
    await roots.cluster.namespace("later")
    await roots.all_have("one", "later")


async def test_new_roots_reach_every_copy(roots: Roots) -> None:
    await roots.all_have("one")
    roots.bundle = b"one and two"
    await roots.all_have("one and two")


async def test_a_copy_that_was_changed_or_deleted_is_put_right_and_other_entries_stay(roots: Roots) -> None:
    await roots.all_have("one")
    path = f"/api/v1/namespaces/default/configmaps/{NAME}"
    await roots.cluster.patch(path, {"data": {ENTRY: "forged", "own": "x"}})
    await until(lambda: roots.copies()["default"] == "one")
    assert (await roots.cluster.get(path))["data"]["own"] == "x"
    await roots.cluster.delete(path)
    await until(lambda: roots.copies().get("default") == "one")


async def test_a_server_that_fails_gets_them_later(roots: Roots) -> None:
    await roots.all_have("one")
    roots.cluster.server.faults.add(Fault(code=500, resource="configmaps", count=5))
    roots.cluster.server.watches.drop("configmaps")
    roots.bundle = b"two"
    await roots.all_have("two")


async def test_nothing_is_written_while_all_is_right(roots: Roots) -> None:
    await roots.all_have("one")
    await asyncio.sleep(0.2)
    before = roots.cluster.server.store.items("configmaps")
    versions = [entry.obj["metadata"]["resourceVersion"] for entry in before]
    await asyncio.sleep(1.2)
    after = roots.cluster.server.store.items("configmaps")
    assert [entry.obj["metadata"]["resourceVersion"] for entry in after] == versions
