"""The official client's list and watch, as an informer uses them, while the server gives it trouble."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.apiserver.faults import Fault
from undermesh.lab.apiserver.user import Write

kubernetes = pytest.importorskip("kubernetes", reason="requirements-dev.txt names it")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Informer(threading.Thread):
    """Keeps a copy of the ConfigMaps of a namespace: list, watch from there, list again when told to."""

    def __init__(self, config: Any, namespace: str) -> None:
        super().__init__(daemon=True)
        self._core = kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(config))
        self._namespace = namespace
        self._ended = threading.Event()
        self.seen: dict[str, dict[str, str]] = {}
        self.lists = 0
        self.refusals: list[int] = []

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self._round()
            except kubernetes.client.exceptions.ApiException as error:
                self.refusals.append(error.status)
                self._ended.wait(0.05)

    def _round(self) -> None:
        found = self._core.list_namespaced_config_map(self._namespace)
        self.lists += 1
        self.seen = {item.metadata.name: item.data or {} for item in found.items}
        version = found.metadata.resource_version
        while not self._ended.is_set():
            stream = kubernetes.watch.Watch().stream(
                self._core.list_namespaced_config_map, self._namespace, resource_version=version, timeout_seconds=5,
                allow_watch_bookmarks=True,
            )  # fmt: skip
            for event in stream:
                version = event["raw_object"]["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                name = event["object"].metadata.name
                if event["type"] == "DELETED":
                    self.seen.pop(name, None)
                else:
                    self.seen[name] = event["object"].data or {}

    def stop(self) -> None:
        self._ended.set()


@pytest_asyncio.fixture
async def informer(server: ApiServer, tmp_path: Path) -> AsyncIterator[Informer]:
    path = tmp_path / "kubeconfig"
    path.write_text(server.admin_kubeconfig())
    config = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(str(path), client_configuration=config)
    made = Informer(config, "default")
    yield made
    server.faults.clear()
    made.stop()
    server.watches.drop()
    if made.is_alive():
        await asyncio.to_thread(made.join, 10)


class Writer:
    """Changes ConfigMaps in the server's own process."""

    def __init__(self, server: ApiServer) -> None:
        self._registry = server.registry
        kind = server.catalog.find("", "v1", "configmaps")
        assert kind is not None
        self._kind = kind
        self.wanted: dict[str, dict[str, str]] = {}

    def put(self, name: str, value: str) -> None:
        body = {"metadata": {"name": name}, "data": {"value": value}}
        if name in self.wanted:
            self._registry.update(self._kind, "default", name, lambda current: body, Write())
        else:
            self._registry.create(self._kind, "default", body, Write())
        self.wanted[name] = {"value": value}

    def drop(self, name: str) -> None:
        self._registry.delete(self._kind, "default", name, {}, Write())
        del self.wanted[name]


async def agree(informer: Informer, writer: Writer) -> None:
    """Wait until the copy is what was written."""
    for _ in range(200):
        seen = {name: data for name, data in informer.seen.items() if name != "kube-root-ca.crt"}
        if seen == writer.wanted:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"after 10 s the informer has {seen}, not {writer.wanted}")


async def begin(server: ApiServer, informer: Informer) -> None:
    """Start it and wait until it watches."""
    informer.start()
    for _ in range(200):
        if informer.lists and server.watches.count:
            return
        await asyncio.sleep(0.05)
    pytest.fail("after 10 s the informer does not watch")


async def test_an_informer_follows_every_change(server: ApiServer, informer: Informer) -> None:
    writer = Writer(server)
    writer.put("before", "1")
    await begin(server, informer)
    await agree(informer, writer)
    for number in range(50):
        writer.put(f"c{number % 7}", str(number))
    writer.drop("before")
    await agree(informer, writer)
    assert informer.lists == 1


async def test_dropped_watches_lose_nothing(server: ApiServer, informer: Informer) -> None:
    writer = Writer(server)
    await begin(server, informer)
    await agree(informer, writer)
    for number in range(20):
        writer.put(f"c{number}", "x")
        server.watches.drop("configmaps")
        await asyncio.sleep(0.02)
    writer.drop("c3")
    await agree(informer, writer)


async def test_compaction_makes_it_list_again(server: ApiServer, informer: Informer) -> None:
    writer = Writer(server)
    await begin(server, informer)
    await agree(informer, writer)
    server.faults.add(Fault(code=503, verb="watch"))
    server.watches.drop()
    for number in range(5):
        writer.put(f"c{number}", "x")
    server.compact()
    server.faults.clear()
    await agree(informer, writer)
    assert informer.lists >= 2 and 410 in informer.refusals


async def test_throttling_and_failures_delay_it_only(server: ApiServer, informer: Informer) -> None:
    writer = Writer(server)
    writer.put("a", "1")
    server.faults.add(Fault(code=429, verb="list", count=2, retry_after=0))
    server.faults.add(Fault(code=500, verb="list", count=2))
    informer.start()
    await agree(informer, writer)
    assert 500 in informer.refusals
