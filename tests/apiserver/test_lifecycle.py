"""What becomes of objects: versions, finalizers, owners, pods that end, namespaces, definitions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from api_client import Client

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.apiserver.kinds import BUILT_IN, Kind

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
SPEC = {"containers": [{"name": "c", "image": "x"}]}


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(200):
        if await check():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not within 4 s")


async def put(api: Client, name: str, **metadata: Any) -> Any:
    return await api.create(MAPS, {"metadata": {"name": name, **metadata}})


def owned_by(owner: Any, *, block: bool = False) -> list[Any]:
    metadata = owner["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": metadata["name"], "uid": metadata["uid"]}
    return [{**reference, "blockOwnerDeletion": block}]


async def missing(api: Client, path: str) -> bool:
    return (await api.ask("GET", path)).status == 404


async def test_stale_writes_are_refused_and_idle_ones_change_nothing(api: Client) -> None:
    made = await put(api, "a")
    changed = await api.replace(f"{MAPS}/a", {**made, "data": {"k": "v"}})
    stale = await api.ask("PUT", f"{MAPS}/a", made)
    assert (stale.status, stale.body["reason"]) == (409, "Conflict")
    assert stale.body["message"].endswith("please apply your changes to the latest version and try again")
    again = await api.replace(f"{MAPS}/a", changed)
    assert again["metadata"]["resourceVersion"] == changed["metadata"]["resourceVersion"]
    refused = await api.ask("DELETE", f"{MAPS}/a", {"preconditions": {"uid": "other"}})
    assert refused.status == 409


async def test_generated_names_dry_runs_and_identities(api: Client) -> None:
    made = await api.create(MAPS, {"metadata": {"generateName": "m-"}})
    assert made["metadata"]["name"].startswith("m-") and len(made["metadata"]["name"]) == 7
    dry = await api.ask("POST", f"{MAPS}?dryRun=All", {"metadata": {"name": "dry"}})
    assert dry.status == 201 and await missing(api, f"{MAPS}/dry")
    moved = await api.ask("POST", MAPS, {"metadata": {"name": "a", "namespace": "other"}})
    assert moved.status == 400
    assert (await api.ask("PATCH", f"{MAPS}/a", "[]", Content_Type="text/plain")).status == 415


async def test_status_and_spec_are_written_apart(api: Client) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    template = {"metadata": {"labels": {"a": "b"}}, "spec": SPEC}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    made = await api.create(path, {"metadata": {"name": "d"}, "spec": spec, "status": {"replicas": 9}})
    assert made["status"] == {}
    found = await api.patch(f"{path}/d/status", {"spec": {"replicas": 7}, "status": {"replicas": 3}})
    assert (found["spec"]["replicas"], found["status"]["replicas"], found["metadata"]["generation"]) == (1, 3, 1)
    found = await api.patch(f"{path}/d", {"spec": {"replicas": 7}, "status": {"replicas": 4}})
    assert (found["spec"]["replicas"], found["status"]["replicas"], found["metadata"]["generation"]) == (7, 3, 2)


async def test_finalizers_hold_an_object_until_the_last_is_gone(api: Client) -> None:
    await put(api, "a", finalizers=["x.io/one", "x.io/two"])
    held = await api.delete(f"{MAPS}/a")
    assert held["metadata"]["deletionTimestamp"]
    await api.patch(f"{MAPS}/a", {"metadata": {"finalizers": ["x.io/two"]}})
    assert not await missing(api, f"{MAPS}/a")
    await api.patch(f"{MAPS}/a", {"metadata": {"finalizers": None}})
    assert await missing(api, f"{MAPS}/a")


async def test_dependents_go_with_their_owner_in_the_background(api: Client) -> None:
    owner = await put(api, "owner")
    child = await put(api, "child", ownerReferences=owned_by(owner))
    await put(api, "grandchild", ownerReferences=owned_by(child))
    status = await api.delete(f"{MAPS}/owner")
    assert status["status"] == "Success"
    await until(lambda: missing(api, f"{MAPS}/grandchild"))
    assert await missing(api, f"{MAPS}/child")


async def test_foreground_deletion_waits_for_dependents(api: Client) -> None:
    owner = await put(api, "owner")
    await put(api, "child", ownerReferences=owned_by(owner, block=True), finalizers=["x.io/hold"])
    held = await api.delete(f"{MAPS}/owner", {"propagationPolicy": "Foreground"})
    assert held["metadata"]["finalizers"] == ["foregroundDeletion"]

    async def dying() -> bool:
        return "deletionTimestamp" in (await api.get(f"{MAPS}/child"))["metadata"]

    await until(dying)
    assert not await missing(api, f"{MAPS}/owner")
    await api.patch(f"{MAPS}/child", {"metadata": {"finalizers": None}})
    await until(lambda: missing(api, f"{MAPS}/owner"))


async def test_orphans_stay_without_their_owner(api: Client) -> None:
    owner = await put(api, "owner")
    await put(api, "child", ownerReferences=owned_by(owner))
    await api.delete(f"{MAPS}/owner", {"propagationPolicy": "Orphan"})
    await until(lambda: missing(api, f"{MAPS}/owner"))
    assert "ownerReferences" not in (await api.get(f"{MAPS}/child"))["metadata"]


async def test_what_refers_to_no_living_owner_is_collected(api: Client) -> None:
    owner = {"metadata": {"name": "never", "uid": "00000000-0000-0000-0000-000000000000"}}
    await put(api, "child", ownerReferences=owned_by(owner))
    await until(lambda: missing(api, f"{MAPS}/child"))


async def test_a_pod_on_a_node_ends_when_its_kubelet_says_so(api: Client) -> None:
    await api.create(PODS, {"metadata": {"name": "p"}, "spec": {**SPEC, "terminationGracePeriodSeconds": 9}})
    bound = await api.ask("POST", f"{PODS}/p/binding", {"target": {"kind": "Node", "name": "n"}})
    assert bound.status == 201
    assert (await api.ask("POST", f"{PODS}/p/binding", {"target": {"name": "m"}})).status == 409
    found = await api.delete(f"{PODS}/p")
    assert found["metadata"]["deletionGracePeriodSeconds"] == 9
    assert (await api.get(f"{PODS}/p"))["spec"]["nodeName"] == "n"
    await api.delete(f"{PODS}/p", {"gracePeriodSeconds": 0, "preconditions": {"uid": found["metadata"]["uid"]}})
    assert await missing(api, f"{PODS}/p")


async def test_a_pod_keeps_what_may_not_change(api: Client) -> None:
    await api.create(PODS, {"metadata": {"name": "p"}, "spec": SPEC})
    refused = await api.ask(
        "PATCH", f"{PODS}/p", {"spec": {"hostNetwork": True}}, Content_Type="application/merge-patch+json"
    )
    assert refused.status == 422 and "pod updates may not change fields" in refused.body["message"]
    image = {"spec": {"containers": [{"name": "c", "image": "y"}]}}
    found = await api.patch(f"{PODS}/p", image, "strategic-merge-patch+json")
    assert found["spec"]["containers"][0]["image"] == "y"


async def test_eviction_minds_the_budget(api: Client) -> None:
    budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
    spec = {"selector": {"matchLabels": {"app": "x"}}, "minAvailable": 1}
    await api.create(budgets, {"metadata": {"name": "b"}, "spec": spec})
    await api.create(PODS, {"metadata": {"name": "p", "labels": {"app": "x"}}, "spec": SPEC})
    await api.patch(f"{PODS}/p/status", {"status": {"phase": "Running"}})
    refused = await api.ask("POST", f"{PODS}/p/eviction", {})
    assert (refused.status, refused.body["details"]["causes"][0]["reason"]) == (429, "DisruptionBudget")
    await api.patch(f"{budgets}/b/status", {"status": {"disruptionsAllowed": 1}})
    assert (await api.ask("POST", f"{PODS}/p/eviction", {})).status == 201
    assert await missing(api, f"{PODS}/p")
    assert (await api.get(f"{budgets}/b"))["status"]["disruptionsAllowed"] == 0


async def test_a_namespace_closes_empties_and_goes(api: Client) -> None:
    await api.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
    assert (await api.get("/api/v1/namespaces/shop/serviceaccounts/default"))["metadata"]["uid"]
    assert (
        "BEGIN CERTIFICATE" in (await api.get("/api/v1/namespaces/shop/configmaps/kube-root-ca.crt"))["data"]["ca.crt"]
    )
    held = {"metadata": {"name": "held", "finalizers": ["x.io/hold"]}}
    await api.create("/api/v1/namespaces/shop/configmaps", held)
    await api.delete("/api/v1/namespaces/shop")
    refused = await api.ask("POST", "/api/v1/namespaces/shop/configmaps", {"metadata": {"name": "late"}})
    assert (refused.status, refused.body["details"]["causes"][0]["reason"]) == (403, "NamespaceTerminating")
    assert (await api.get("/api/v1/namespaces/shop"))["status"]["phase"] == "Terminating"
    patch = {"metadata": {"finalizers": None}}
    await api.patch("/api/v1/namespaces/shop/configmaps/held", patch)
    await until(lambda: missing(api, "/api/v1/namespaces/shop"))


async def test_events_are_the_same_in_both_groups(api: Client) -> None:
    body = {
        "metadata": {"name": "e"},
        "regarding": {"kind": "Pod", "name": "p", "namespace": "default"},
        "note": "hello",
        "reason": "Because",
        "type": "Normal",
        "action": "Act",
        "reportingController": "c",
        "reportingInstance": "i",
        "eventTime": "2026-01-01T00:00:00.000000Z",
    }
    await api.create("/apis/events.k8s.io/v1/namespaces/default/events", body)
    found = await api.get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name=p,reason=Because")
    event = found["items"][0]
    assert (event["message"], event["involvedObject"]["kind"], event["reportingComponent"]) == ("hello", "Pod", "c")
    again = await api.get("/apis/events.k8s.io/v1/namespaces/default/events/e")
    assert again["note"] == "hello" and again["apiVersion"] == "events.k8s.io/v1" and "message" not in again


async def test_versions_of_a_definition_show_one_object(api: Client, server: ApiServer) -> None:
    schema = {
        "openAPIV3Schema": {
            "type": "object",
            "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
        }
    }
    versions = [
        {"name": "v1", "served": True, "storage": True, "schema": schema},
        {"name": "v1beta1", "served": True, "storage": False, "schema": schema},
    ]
    spec = {"group": "x.io", "scope": "Cluster", "names": {"plural": "things", "kind": "Thing"}, "versions": versions}
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    made = await api.create(crds, {"metadata": {"name": "things.x.io"}, "spec": spec})
    assert {c["type"]: c["status"] for c in made["status"]["conditions"]} == {
        "NamesAccepted": "True",
        "Established": "True",
    }
    await api.create("/apis/x.io/v1beta1/things", {"metadata": {"name": "t"}, "spec": {"a": 1}, "lost": 1})
    found = await api.get("/apis/x.io/v1/things/t")
    assert found["apiVersion"] == "x.io/v1" and found["spec"] == {"a": 1} and "lost" not in found
    no_version = await api.ask("PUT", "/apis/x.io/v1/things/t", {"metadata": {"name": "t"}, "spec": {}})
    assert no_version.status == 422 and "must be specified for an update" in no_version.body["message"]
    assert (await api.ask("POST", crds, {"metadata": {"name": "bad"}, "spec": spec})).status == 422
    await api.delete(f"{crds}/things.x.io")
    assert await missing(api, "/apis/x.io/v1/things/t") and server.store.items("things.x.io") == []


BODIES: list[Any] = [
    {},
    {"metadata": {"name": "x"}},
    {"metadata": {"name": "x"}, "spec": {}},
    {"metadata": {"name": "x"}, "spec": {"selector": {"matchExpressions": [{"key": "a", "operator": "Odd"}]}}},
    {"metadata": {"name": "x"}, "spec": {"template": {"spec": {"containers": [{}], "volumes": [{}]}}}},
    {"metadata": {"name": "x", "ownerReferences": [{}]}, "spec": {"ports": [{}], "containers": [{"env": [{}]}]}},
    {"metadata": {"name": "x"}, "subjects": [{}], "rules": [{}], "endpoints": [{}], "spec": {"versions": [{}]}},
    {"metadata": None, "spec": None},
    [],
]


@pytest.mark.parametrize(
    "kind", [kind for kind in BUILT_IN if kind.kind != "TokenReview"], ids=lambda kind: kind.resource
)
async def test_no_half_filled_object_makes_the_server_fail(api: Client, kind: Kind) -> None:
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    path = f"{root}/namespaces/default/{kind.plural}" if kind.namespaced else f"{root}/{kind.plural}"
    for body in BODIES:
        answer = await api.ask("POST", path, body)
        assert answer.status < 500, (body, answer.body)
        table = await api.ask("GET", path, Accept="application/json;as=Table;v=v1;g=meta.k8s.io")
        assert table.status == (405 if kind.virtual else 200), (body, table.body)
        if answer.status == 201 and not kind.virtual:
            applied = {
                "apiVersion": kind.api_version,
                "kind": kind.kind,
                "metadata": {"name": "x", "labels": {"a": "b"}},
            }
            media = "application/apply-patch+yaml"
            again = await api.ask("PATCH", f"{path}/x?fieldManager=m", applied, Content_Type=media)
            assert again.status == 200, (body, again.body)
            await api.ask("DELETE", f"{path}/x", {"gracePeriodSeconds": 0})


@pytest.mark.parametrize(
    "body", [[], "text", {"spec": [1]}, {"target": 1}, {"deleteOptions": "x"}, {"spec": {"replicas": "many"}}]
)
async def test_odd_bodies_for_subresources_are_refused(api: Client, body: Any) -> None:
    await api.create(PODS, {"metadata": {"name": "p"}, "spec": SPEC})
    for path in (f"{PODS}/p/binding", "/api/v1/namespaces/default/serviceaccounts/default/token"):
        assert (await api.ask("POST", path, body if not isinstance(body, str) else '"text"')).status in (400, 422, 201)
    template = {"metadata": {"labels": {"a": "b"}}, "spec": SPEC}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    await api.create("/apis/apps/v1/namespaces/default/deployments", {"metadata": {"name": "d"}, "spec": spec})
    scale = "/apis/apps/v1/namespaces/default/deployments/d/scale"
    for media in (
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
        "application/json-patch+json",
    ):
        answer = await api.ask("PATCH", scale, body if not isinstance(body, str) else '"text"', Content_Type=media)
        assert answer.status in (200, 400, 422), answer.body
    for verb, path in (("POST", f"{PODS}/p/eviction"), ("DELETE", f"{PODS}/p"), ("PUT", scale)):
        assert (await api.ask(verb, path, body if not isinstance(body, str) else '"text"')).status < 500
