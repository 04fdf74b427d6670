"""What authors read in their policies' status, and that nobody else's words there are touched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cluster_harness import Cluster
from source_harness import FAST

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.problems import Problem
from undermesh.controlplane.kubernetes.policy_status import PolicyStatusWriter
from undermesh.controlplane.translate import Settings

GROUP = "/apis/security.istio.io/v1/namespaces/shop"
PATHS = {
    "AuthorizationPolicy": f"{GROUP}/authorizationpolicies",
    "PeerAuthentication": f"{GROUP}/peerauthentications",
}
AUTHORIZATION, PEER = PATHS
L7 = [{"to": [{"operation": {"paths": ["/admin"]}}]}]
SELECTED = {"selector": {"matchLabels": {"app": "web"}}}

SPIFFE = {"rules": [{"from": [{"source": {"principals": ["spiffe://td/ns/a/sa/b"]}}]}]}
BAD_BLOCK = {"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": ["x"]}}]}]}
MISSPELT = {"rules": [{"from": [{"source": {"principal": ["x"]}}]}]}
TARGET = {"targetRefs": [{"kind": "Gateway", "name": "w"}]}
PORTS = {"portLevelMtls": {"http": {"mode": "DISABLE"}}, **SELECTED}

# Kind, name, spec; the condition's status, reason and a part of its message.
TABLE: list[tuple[str, str, dict[str, Any], str, str, str]] = [
    (AUTHORIZATION, "fine", {"action": "DENY", "rules": [{}]}, "True", "Accepted", "enforced on every node as"),
    (AUTHORIZATION, "audit", {"action": "AUDIT", "rules": [{}]}, "True", "Accepted", "recorded on every node"),
    (AUTHORIZATION, "dry-run", {"rules": [{}]}, "True", "Accepted", "nothing is decided"),
    (AUTHORIZATION, "spiffe", SPIFFE, "True", "Accepted", "enforced on every node as"),
    (AUTHORIZATION, "deny-l7", {"action": "DENY", "rules": L7}, "False", "UnsupportedValue", "denies more than is"),
    (AUTHORIZATION, "allow-l7", {"rules": L7}, "False", "UnsupportedValue", "allows nobody"),
    (AUTHORIZATION, "custom", {"action": "CUSTOM", "rules": [{}]}, "False", "UnsupportedValue", "denied until then"),
    (AUTHORIZATION, "target", TARGET, "False", "AncestorNotBound", "waypoint"),
    (AUTHORIZATION, "bad", BAD_BLOCK, "False", "Invalid", "denies everybody"),
    (AUTHORIZATION, "unreadable", MISSPELT, "False", "Invalid", "principal"),
    (AUTHORIZATION, "known", {"rules": [{"fromm": []}]}, "False", "Invalid", "the strictest policy"),
    (PEER, "strict", {"mtls": {"mode": "STRICT"}}, "True", "Accepted", "enforced on every node"),
    (PEER, "younger", {"mtls": {"mode": "DISABLE"}}, "False", "Conflicted", "shop/strict is older"),
    (PEER, "ports", PORTS, "False", "Invalid", "means STRICT"),
    (PEER, "mode", {"mtls": {"mode": "strict"}}, "False", "Invalid", "mode"),
]


@pytest.fixture
async def written(cluster: Cluster) -> AsyncIterator[Cluster]:
    """A cluster with policies' kinds, whose leader writes."""
    await cluster.namespace("shop")
    await cluster.define_kinds()
    api = Api(Access(cluster.kubeconfig), FAST)
    problem = Problem("server", "it is so; the strictest policy stands", subject="AuthorizationPolicy shop/known")
    task = asyncio.create_task(PolicyStatusWriter(api, Settings(), lambda: (problem,)).run())
    yield cluster
    assert not task.done(), task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await api.close()


async def create(cluster: Cluster, kind: str, name: str, spec: dict[str, Any], **meta: object) -> None:
    body = {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec}
    await cluster.create(PATHS[kind], body)


async def read(cluster: Cluster, kind: str, name: str) -> dict[str, dict[str, Any]]:
    found = await cluster.get(f"{PATHS[kind]}/{name}")
    return {condition["type"]: condition for condition in found.get("status", {}).get("conditions", [])}


async def ours(cluster: Cluster, kind: str, name: str, generation: int) -> dict[str, Any]:
    """The condition once it is of that generation."""
    async with asyncio.timeout(10):
        while True:
            found = (await read(cluster, kind, name)).get("ZtunnelAccepted", {})
            if found.get("observedGeneration") == generation:
                return found
            await asyncio.sleep(0.05)


async def test_each_policy_says_how_what_is_enforced_differs_from_what_is_written(written: Cluster) -> None:
    for kind, name, spec, *_ in TABLE:
        # The ages of objects have a resolution of a second.
        if name == "younger":
            await asyncio.sleep(1.1)
        notes = {"istio.io/dry-run": "true"} if name == "dry-run" else {}
        await create(written, kind, name, spec, annotations=notes)
    for kind, name, _, status, reason, message in TABLE:
        found = await ours(written, kind, name, 1)
        assert (found["status"], found["reason"]) == (status, reason), (name, found)
        assert message in found["message"], (name, found)
        assert found["lastTransitionTime"] > "2026"


async def test_an_edit_is_judged_anew_and_the_words_of_others_stay(written: Cluster) -> None:
    await create(written, AUTHORIZATION, "p", {"action": "DENY", "rules": L7})
    first = await ours(written, AUTHORIZATION, "p", 1)
    path = f"{PATHS[AUTHORIZATION]}/p"
    foreign = {"type": "WaypointAccepted", "status": "Unknown", "reason": "Pending", "message": ""}
    await written.patch(f"{path}/status", {"status": {"conditions": [foreign, first]}})
    await written.patch(path, {"spec": {"rules": [{}]}})
    second = await ours(written, AUTHORIZATION, "p", 2)
    assert (first["status"], second["status"]) == ("False", "True")
    assert (await read(written, AUTHORIZATION, "p"))["WaypointAccepted"] == foreign

    # Taken away by somebody, it comes back; nothing is written while nothing is wrong.
    await written.patch(f"{path}/status", {"status": {"conditions": [foreign]}})
    await ours(written, AUTHORIZATION, "p", 2)
    version = (await written.get(path))["metadata"]["resourceVersion"]
    await asyncio.sleep(1.2)
    assert (await written.get(path))["metadata"]["resourceVersion"] == version
