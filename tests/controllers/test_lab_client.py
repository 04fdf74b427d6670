"""The lab's own client against the lab's API server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.client import (
    CONFIG_MAPS,
    EVENTS,
    NODES,
    PODS,
    SERVICE_ACCOUNTS,
    AlreadyExists,
    ChangeType,
    Client,
    ClientError,
    Conflict,
    Informer,
    Invalid,
    NotFound,
    Recorder,
    load,
)


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default"}, "data": data}


def pod(name: str, node: str = "") -> dict[str, Any]:
    spec: dict[str, Any] = {"containers": [{"name": "app", "image": "nginx"}]}
    if node:
        spec["nodeName"] = node
    return {"metadata": {"name": name, "namespace": "default"}, "spec": spec}


async def test_an_object_is_created_read_replaced_patched_and_deleted(client: Client) -> None:
    made = await client.create(CONFIG_MAPS, config_map("m", a="1"))
    assert (await client.get(CONFIG_MAPS, "m", "default")) == made
    replaced = await client.update(CONFIG_MAPS, {**made, "data": {"a": "2"}})
    patched = await client.patch(CONFIG_MAPS, "m", "default", {"data": {"b": "3"}})
    assert (replaced["data"], patched["data"]) == ({"a": "2"}, {"a": "2", "b": "3"})
    await client.delete(CONFIG_MAPS, "m", "default", uid=made["metadata"]["uid"])
    with pytest.raises(NotFound, match="configmaps/m: 404"):
        await client.get(CONFIG_MAPS, "m", "default")


async def test_each_refusal_has_its_error(client: Client) -> None:
    made = await client.create(CONFIG_MAPS, config_map("m"))
    with pytest.raises(AlreadyExists):
        await client.create(CONFIG_MAPS, config_map("m"))
    await client.update(CONFIG_MAPS, {**made, "data": {"a": "1"}})
    with pytest.raises(Conflict):
        await client.update(CONFIG_MAPS, {**made, "data": {"a": "2"}})
    with pytest.raises(Conflict):
        await client.delete(CONFIG_MAPS, "m", "default", uid="another")
    with pytest.raises(Invalid):
        await client.create(PODS, {"metadata": {"name": "p", "namespace": "default"}, "spec": {"containers": []}})


async def test_a_status_is_written_apart_from_the_rest(client: Client) -> None:
    await client.create(PODS, pod("p"))
    done = await client.patch_status(PODS, "p", "default", {"status": {"phase": "Running"}, "spec": {"x": 1}})
    assert done["status"]["phase"] == "Running"
    assert "x" not in done["spec"]


async def test_a_pod_is_bound_once(client: Client) -> None:
    made = await client.create(PODS, pod("p"))
    await client.bind(made, "node1")
    assert (await client.get(PODS, "p", "default"))["spec"]["nodeName"] == "node1"
    with pytest.raises(Conflict):
        await client.bind(made, "node2")


async def test_a_service_account_gets_a_token(client: Client) -> None:
    await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "app", "namespace": "default"}})
    status = await client.token("app", "default", audiences=("istio-ca",), seconds=600)
    assert status["token"].count(".") == 2
    assert status["expirationTimestamp"]


async def test_an_informer_reports_what_is_there_and_each_change(client: Client) -> None:
    await client.create(PODS, pod("a", "node1"))
    await client.create(PODS, pod("other", "node2"))
    async with Informer(client, PODS, field_selector="spec.nodeName=node1") as pods:
        changes = pods.subscribe()
        await client.create(PODS, pod("b", "node1"))
        await client.patch(PODS, "a", "default", {"metadata": {"labels": {"x": "y"}}})
        await client.delete(PODS, "b", "default", grace=0)
        seen = [await asyncio.wait_for(changes.get(), 5) for _ in range(4)]
    assert [(change.type, change.obj["metadata"]["name"]) for change in seen] == [
        (ChangeType.ADDED, "a"),
        (ChangeType.ADDED, "b"),
        (ChangeType.MODIFIED, "a"),
        (ChangeType.DELETED, "b"),
    ]
    assert [obj["metadata"]["name"] for obj in pods.items()] == ["a"]
    assert seen[0].obj["kind"] == "Pod"


async def test_an_index_follows_the_objects(client: Client) -> None:
    indexes = {"node": lambda obj: [obj["spec"].get("nodeName", "")]}
    async with Informer(client, PODS, indexes=indexes) as pods:
        made = await client.create(PODS, pod("p"))
        await asyncio.wait_for(pods.changed(), 5)
        assert [found["metadata"]["name"] for found in pods.by("node", "")] == ["p"]
        await client.bind(made, "node1")
        await asyncio.wait_for(pods.changed(), 5)
        assert pods.by("node", "") == []
        assert [found["metadata"]["name"] for found in pods.by("node", "node1")] == ["p"]


async def test_an_informer_goes_on_after_dropped_watches_and_a_forgotten_version(
    client: Client, server: ApiServer
) -> None:
    async with Informer(client, CONFIG_MAPS, namespace="default") as maps:
        changes = maps.subscribe()
        server.watches.drop()
        await client.create(CONFIG_MAPS, config_map("m"))
        change = await asyncio.wait_for(changes.get(), 5)
        while change.obj["metadata"]["name"] != "m":
            change = await asyncio.wait_for(changes.get(), 5)
        maps._version = "1"
        server.watches.drop()
        await client.delete(CONFIG_MAPS, "m", "default")
        while change.type is not ChangeType.DELETED:
            change = await asyncio.wait_for(changes.get(), 5)


async def test_own_writes_are_seen_at_once_and_never_undone_by_older_news(client: Client) -> None:
    async with Informer(client, PODS) as pods:
        for _ in range(20):
            made = await client.create(PODS, pod("p"))
            pods.absorb(made)
            assert pods.get("p", "default") is not None
            newer = await client.patch(PODS, "p", "default", {"metadata": {"labels": {"x": "y"}}})
            pods.absorb(newer)
            pods.absorb(made)
            assert pods.get("p", "default") == newer
            pods.absorb_removal(await client.delete(PODS, "p", "default"))
            assert pods.get("p", "default") is None
        last = await client.create(PODS, pod("last"))
        while pods.get("last", "default") is None:
            await asyncio.wait_for(pods.changed(), 5)
        pods.absorb({**last, "metadata": {**last["metadata"], "name": "ghost", "resourceVersion": "2"}})
        assert [found["metadata"]["name"] for found in pods.items()] == ["last"]
        assert not pods._removed


async def test_equal_events_are_counted(client: Client) -> None:
    made = await client.create(PODS, pod("p"))
    async with Recorder(client, "kubelet", host="node1") as recorder:
        for _ in range(3):
            recorder.event(made, "Normal", "Pulled", "present", field_path="spec.containers{app}")
        recorder.event(made, "Warning", "Failed", "no")
        found: list[dict[str, Any]] = []
        while len(found) < 2:
            found = (await client.list(EVENTS, "default", field_selector="involvedObject.name=p"))[0]
    counts = {event["reason"]: event["count"] for event in found}
    assert counts == {"Pulled": 3, "Failed": 1}
    assert found[0]["source"] == {"component": "kubelet", "host": "node1"}


async def test_a_server_that_is_away_is_named(kubeconfig: Path, server: ApiServer) -> None:
    text = kubeconfig.read_text().replace(server.url, "https://127.0.0.1:1")
    kubeconfig.write_text(text)
    async with Client(load(kubeconfig)) as away:
        with pytest.raises(ClientError, match="GET /api/v1/nodes"):
            await away.list(NODES)


def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("kind: Config\n")
    with pytest.raises(ClientError, match="no usable KUBECONFIG"):
        load(tmp_path / "k")
