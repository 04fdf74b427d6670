"""Nodes that go away, are drained or tainted, and what becomes of their pods."""

from __future__ import annotations

from typing import Any

import pytest
from kubectl import Kubectl
from node_stand_in import Nodes
from workloads import Object, is_ready, pods_of, template, until, workload

from undermesh.lab.client import (
    DAEMON_SETS,
    DEPLOYMENTS,
    NODES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    Client,
)
from undermesh.lab.controllers.eviction import stays_for

pytestmark = pytest.mark.usefixtures("nodes", "working")


def budget(**spec: Any) -> Object:
    return {
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, **spec},
    }


async def taints_of(client: Client, node: str) -> set[tuple[str, str]]:
    found = await client.get(NODES, node)
    return {(taint["key"].rpartition("/")[2], taint["effect"]) for taint in found["spec"].get("taints") or ()}


async def test_a_silent_node_is_lost_and_comes_back(client: Client, nodes: Nodes) -> None:
    leave = [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 1}]
    await client.create(DEPLOYMENTS, workload("web", template("web", tolerations=leave), replicas=2))
    await client.create(DAEMON_SETS, workload("agent"))

    async def ready() -> bool:
        pods = [*await pods_of(client, "web"), *await pods_of(client, "agent")]
        return sum(is_ready(pod) for pod in pods) == 4

    await until("all pods are ready", ready)
    nodes.alive.discard("node2")

    async def lost() -> bool:
        return ("unreachable", "NoExecute") in await taints_of(client, "node2")

    await until("node2 is tainted", lost)
    [condition] = [c for c in (await client.get(NODES, "node2"))["status"]["conditions"] if c["type"] == "Ready"]
    assert (condition["status"], condition["reason"]) == ("Unknown", "NodeStatusUnknown")

    async def moved() -> bool:
        pods = [pod for pod in await pods_of(client, "web") if is_ready(pod)]
        return [pod["spec"]["nodeName"] for pod in pods] == ["node1", "node1"]

    await until("its replicas run on node1", moved)
    daemons = {pod["spec"]["nodeName"]: is_ready(pod) for pod in await pods_of(client, "agent")}
    assert daemons == {"node1": True, "node2": False}
    nodes.alive.add("node2")
    ready_again = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "lastHeartbeatTime": "2030-01-01T00:00:00Z",
    }
    await client.patch_status(NODES, "node2", "", {"status": {"conditions": [ready_again]}})

    async def back() -> bool:
        return not await taints_of(client, "node2")

    await until("node2 has no taints", back)


async def test_drain_moves_the_pods_as_far_as_the_budget_allows(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=4))
    await client.create(DAEMON_SETS, workload("agent"))
    await client.create(POD_DISRUPTION_BUDGETS, budget(maxUnavailable=1))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("wait", "--for=jsonpath={.status.disruptionsAllowed}=1", "pdb/web", "--timeout=10s")
    out = await kubectl("drain", "node1", "--ignore-daemonsets", "--timeout=35s")
    assert "drained" in out
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    assert {pod["spec"]["nodeName"] for pod in await pods_of(client, "web")} == {"node2"}
    assert len(await pods_of(client, "agent")) == 2
    assert ("unschedulable", "NoSchedule") in await taints_of(client, "node1")
    await kubectl("uncordon", "node1")

    async def open_again() -> bool:
        return not await taints_of(client, "node1")

    await until("node1 has no taints", open_again)


async def test_a_budget_that_allows_nothing_stops_a_drain(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=2))
    await client.create(POD_DISRUPTION_BUDGETS, budget(minAvailable=2))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("wait", "--for=jsonpath={.status.currentHealthy}=2", "pdb/web", "--timeout=10s")
    error = await kubectl.fails("drain", "node1", "--timeout=2s")
    assert "disruption budget" in error
    assert sum(is_ready(pod) for pod in await pods_of(client, "web")) == 2


async def test_pods_of_a_node_that_is_deleted_go(client: Client, kubectl: Kubectl, nodes: Nodes) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=2))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    nodes.alive.discard("node2")
    await client.delete(NODES, "node2")

    async def moved() -> bool:
        pods = await pods_of(client, "web")
        return len(pods) == 2 and {pod["spec"].get("nodeName") for pod in pods} == {"node1"}

    await until("both replicas run on node1", moved)


async def test_a_no_execute_taint_drives_out_what_does_not_tolerate_it(client: Client, kubectl: Kubectl) -> None:
    tolerated = [{"key": "only", "operator": "Exists"}]
    await client.create(DEPLOYMENTS, workload("web", replicas=2))
    await client.create(DEPLOYMENTS, workload("tough", template("tough", tolerations=tolerated), replicas=2))
    for name in ("web", "tough"):
        await kubectl("rollout", "status", f"deployment/{name}", "--timeout=15s")
    await kubectl("taint", "node", "node1", "only=some:NoExecute")

    async def moved() -> bool:
        pods = await pods_of(client, "web")
        return len(pods) == 2 and {pod["spec"].get("nodeName") for pod in pods} == {"node2"}

    await until("web runs on node2", moved)
    assert {pod["spec"]["nodeName"] for pod in await pods_of(client, "tough")} == {"node1", "node2"}


async def test_a_pod_stays_as_long_as_it_tolerates_each_taint() -> None:
    def pod(*tolerations: Object) -> Object:
        return {"spec": {"tolerations": list(tolerations)}}

    taint = {"key": "k", "effect": "NoExecute"}
    short, long = ({"key": "k", "operator": "Exists", "tolerationSeconds": n} for n in (5, 50))
    assert stays_for(pod(), [taint]) == 0
    assert stays_for(pod(short, long), [taint]) == 5
    assert stays_for(pod({"operator": "Exists"}, short), [taint]) is None
    assert stays_for(pod(short), [taint, {"key": "other", "effect": "NoExecute"}]) == 0
    assert stays_for(pod(), []) is None


async def test_a_deleted_pod_without_a_node_does_not_linger(client: Client) -> None:
    body = {
        "metadata": {"name": "p", "namespace": "default"},
        "spec": template("p", nodeSelector={"no": "node"})["spec"],
    }
    await client.create(PODS, body)

    async def told() -> bool:
        conditions = (await client.get(PODS, "p", "default"))["status"].get("conditions") or ()
        return any(found.get("reason") == "Unschedulable" for found in conditions)

    await until("its status says that it fits nowhere", told)
    await client.delete(PODS, "p", "default")
    assert not [pod for pod in (await client.list(PODS, "default"))[0] if pod["metadata"]["name"] == "p"]
