"""Lists and watches on the wire: versions, pages, bookmarks, 410, selections, tables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from api_client import TOKENS, Client

from undermesh.lab.apiserver import ApiServer, Settings
from undermesh.lab.apiserver.faults import Fault
from undermesh.lab.apiserver.user import Write

MAPS = "/api/v1/namespaces/default/configmaps"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "state", tokens=TOKENS, bookmark_interval=0.3, history=50)


async def put(api: Client, name: str, **labels: str) -> Any:
    return await api.create(MAPS, {"metadata": {"name": name, "labels": labels}})


async def following(events: AsyncIterator[Any]) -> Any:
    return await asyncio.wait_for(anext(events), 10)


async def version(api: Client) -> str:
    return str((await api.get(MAPS))["metadata"]["resourceVersion"])


async def test_a_watch_from_a_version_sends_what_came_after(api: Client) -> None:
    await put(api, "a")
    start = await version(api)
    await put(api, "b")
    await api.delete(f"{MAPS}/a")
    async with api.watch(f"{MAPS}?watch=1&resourceVersion={start}") as events:
        first, second = await following(events), await following(events)
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "b")
        assert (second["type"], second["object"]["metadata"]["name"]) == ("DELETED", "a")
        assert int(second["object"]["metadata"]["resourceVersion"]) > int(
            first["object"]["metadata"]["resourceVersion"]
        )


async def test_a_streamed_list_ends_with_its_bookmark(api: Client) -> None:
    await put(api, "a")
    path = f"{MAPS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    async with api.watch(path) as events:
        names = [(await following(events))["object"]["metadata"]["name"] for _ in range(2)]
        end = await following(events)
        assert names == ["a", "kube-root-ca.crt"] and end["type"] == "BOOKMARK"
        assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        again = await following(events)
        assert again["type"] == "BOOKMARK" and "annotations" not in again["object"]["metadata"]
    refused = await api.ask("GET", f"{MAPS}?watch=1&sendInitialEvents=true")
    assert (refused.status, refused.body["reason"]) == (422, "Invalid")


async def test_bookmarks_carry_the_version_of_other_changes(api: Client, server: ApiServer) -> None:
    async with api.watch(f"{MAPS}?watch=1&allowWatchBookmarks=true&resourceVersion={await version(api)}") as events:
        await api.create("/api/v1/namespaces", {"metadata": {"name": "elsewhere"}})
        while (event := await following(events))["type"] != "BOOKMARK" or (
            int(event["object"]["metadata"]["resourceVersion"]) < server.store.version
        ):
            assert event["type"] == "BOOKMARK"


async def test_an_object_that_leaves_the_selection_is_deleted_for_its_watchers(api: Client) -> None:
    async with api.watch(f"{MAPS}?watch=1&labelSelector=x=1&resourceVersion={await version(api)}") as events:
        await put(api, "out", x="2")
        await put(api, "a", x="1")
        assert (await following(events))["object"]["metadata"]["name"] == "a"
        await api.patch(f"{MAPS}/a", {"data": {"k": "v"}})
        assert (await following(events))["type"] == "MODIFIED"
        left = await api.patch(f"{MAPS}/a", {"metadata": {"labels": {"x": "2"}}})
        event = await following(events)
        assert event["type"] == "DELETED" and event["object"]["metadata"]["labels"] == {"x": "1"}
        assert event["object"]["metadata"]["resourceVersion"] == left["metadata"]["resourceVersion"]
        await api.patch(f"{MAPS}/a", {"metadata": {"labels": {"x": "1"}}})
        assert (await following(events))["type"] == "ADDED"


async def test_versions_before_compaction_are_gone(api: Client, server: ApiServer) -> None:
    start = await version(api)
    await put(api, "a")
    await api.ask("POST", "/lab/compact")
    async with api.watch(f"{MAPS}?watch=1&resourceVersion={start}") as events:
        event = await following(events)
        assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")
    async with api.watch(f"{MAPS}?watch=1&resourceVersion={await version(api)}") as events:
        await put(api, "b")
        assert (await following(events))["object"]["metadata"]["name"] == "b"


async def test_history_is_bounded(api: Client) -> None:
    start = await version(api)
    for number in range(60):
        await put(api, f"m{number}")
    async with api.watch(f"{MAPS}?watch=1&resourceVersion={start}") as events:
        assert (await following(events))["object"]["code"] == 410


async def test_a_watch_ends_after_its_timeout(api: Client) -> None:
    async with api.watch(f"{MAPS}?watch=1&timeoutSeconds=1&resourceVersion={await version(api)}") as events:
        assert [event async for event in events] == []


async def test_pages_are_of_one_moment_and_expire(api: Client) -> None:
    for number in range(5):
        await put(api, f"m{number}")
    first = await api.get(f"{MAPS}?limit=2")
    token = first["metadata"]["continue"]
    assert first["metadata"]["remainingItemCount"] == 4
    await api.delete(f"{MAPS}/m4")
    rest = await api.get(f"{MAPS}?limit=10&continue={token}")
    assert [item["metadata"]["name"] for item in first["items"] + rest["items"]] == [
        "kube-root-ca.crt", *(f"m{number}" for number in range(5))
    ]  # fmt: skip
    assert rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    await api.ask("POST", "/lab/compact")
    gone = await api.ask("GET", f"{MAPS}?limit=10&continue={token}")
    assert (gone.status, gone.body["reason"]) == (410, "Expired")
    resumed = await api.get(f"{MAPS}?continue={gone.body['metadata']['continue']}")
    assert [item["metadata"]["name"] for item in resumed["items"]] == ["m1", "m2", "m3"]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("resourceVersion=999999", 504),
        ("resourceVersion=x", 400),
        ("continue=!!", 400),
        ("limit=many", 400),
        ("resourceVersionMatch=Exact", 422),
        ("fieldSelector=spec.x=1", 400),
        ("labelSelector=a in", 400),
    ],
)
async def test_list_parameters_that_make_no_sense_are_refused(api: Client, query: str, code: int) -> None:
    assert (await api.ask("GET", f"{MAPS}?{query}")).status == code


async def test_tables_and_metadata_come_on_request(api: Client) -> None:
    await put(api, "a")
    table = await api.get(MAPS, Accept="application/json;as=Table;v=v1;g=meta.k8s.io,application/json")
    assert table["kind"] == "Table" and [c["name"] for c in table["columnDefinitions"]] == ["Name", "Data", "Age"]
    assert table["rows"][0]["cells"][:2] == ["a", 0] and table["rows"][0]["object"]["kind"] == "PartialObjectMetadata"
    partial = await api.get(MAPS, Accept="application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io")
    assert partial["kind"] == "PartialObjectMetadataList" and set(partial["items"][0]) == {
        "kind",
        "apiVersion",
        "metadata",
    }
    assert (await api.ask("GET", MAPS, Accept="text/html")).status == 406
    assert "kind: ConfigMapList" in await api.get(MAPS, Accept="application/yaml")


async def test_discovery_comes_aggregated_and_plain(api: Client) -> None:
    accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    found = await api.ask("GET", "/apis", Accept=accept)
    assert found.body["kind"] == "APIGroupDiscoveryList" and "as=APIGroupDiscoveryList" in found.headers["Content-Type"]
    apps = next(item for item in found.body["items"] if item["metadata"]["name"] == "apps")
    names = {kind["resource"]: kind for kind in apps["versions"][0]["resources"]}
    assert names["deployments"]["shortNames"] == ["deploy"]
    assert [sub["subresource"] for sub in names["deployments"]["subresources"]] == ["scale", "status"]
    plain = await api.get("/apis/apps/v1")
    assert "deployments/scale" in [kind["name"] for kind in plain["resources"]]
    for path in ("/version", "/healthz", "/readyz", "/livez", "/openapi/v2", "/openapi/v3", "/openapi/v3/apis/apps/v1"):
        assert (await api.ask("GET", path)).status == 200, path


async def test_faults_hit_the_requests_they_name(api: Client, server: ApiServer) -> None:
    assert (
        await api.ask("POST", "/lab/faults", {"code": 429, "verb": "list", "count": 1, "retryAfter": 3})
    ).status == 200
    refused = await api.ask("GET", MAPS)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "3")
    assert (await api.ask("GET", MAPS)).status == 200
    server.faults.add(Fault(delay=0.4, resource="configmaps", count=1))
    before = asyncio.get_running_loop().time()
    await api.get(MAPS)
    assert asyncio.get_running_loop().time() - before >= 0.4
    assert (await api.ask("POST", "/lab/faults", {"codes": 1})).status == 400


async def test_a_restart_with_a_journal_keeps_objects_and_versions(tmp_path: Path) -> None:
    settings = replace(Settings(tmp_path / "kept", tokens=TOKENS), journal=True)
    async with aiohttp.ClientSession() as session:
        async with ApiServer(settings) as server:
            api = Client(session, server, "admin-token")
            await put(api, "a")
            await put(api, "b")
            await api.delete(f"{MAPS}/b")
            before = server.store.version
        with (tmp_path / "kept" / "journal.jsonl").open("ab") as out:
            out.write(b'{"resource":"configmaps","namesp')
        async with ApiServer(settings) as server:
            api = Client(session, server, "admin-token")
            names = [item["metadata"]["name"] for item in (await api.get(MAPS))["items"]]
            assert names == ["a", "kube-root-ca.crt"] and server.store.version >= before
            async with api.watch(f"{MAPS}?watch=1&resourceVersion=3") as events:
                assert (await following(events))["object"]["code"] == 410


async def test_many_watchers_keep_up_with_churn(api: Client, server: ApiServer) -> None:
    kind = server.catalog.find("", "v1", "configmaps")
    assert kind is not None

    async def count() -> int:
        seen = 0
        async with api.watch("/api/v1/configmaps?watch=1&labelSelector=churn=1") as events:
            async for event in events:
                seen += 1
                if event["type"] == "DELETED" and event["object"]["metadata"]["name"] == "m39":
                    return seen
        return -1

    watchers = [asyncio.create_task(count()) for _ in range(20)]
    for _ in range(200):
        if server.watches.count == 20:
            break
        await asyncio.sleep(0.02)
    for number in range(40):
        body = {"metadata": {"name": f"m{number}", "labels": {"churn": "1"}}}
        server.registry.create(kind, "default", body, Write())
        server.registry.delete(kind, "default", f"m{number}", {}, Write())
        if number % 10 == 0:
            await asyncio.sleep(0.03)
    assert await asyncio.wait_for(asyncio.gather(*watchers), 10) == [80] * 20
