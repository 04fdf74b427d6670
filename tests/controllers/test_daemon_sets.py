"""DaemonSets, as kubectl sees them."""

from __future__ import annotations

import pytest
from kubectl import Kubectl
from node_stand_in import node_body
from workloads import Object, is_ready, pods_of, template, until, workload

from undermesh.lab.client import DAEMON_SETS, NODES, PODS, Client

pytestmark = pytest.mark.usefixtures("nodes", "working")


def surge() -> Object:
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


async def rolled_out(kubectl: Kubectl, name: str = "agent") -> None:
    assert "successfully rolled out" in await kubectl("rollout", "status", f"daemonset/{name}", "--timeout=15s")


async def test_each_node_gets_one_pod_also_a_cordoned_one(client: Client, kubectl: Kubectl) -> None:
    await kubectl("cordon", "node2")
    await client.create(DAEMON_SETS, workload("agent"))
    await rolled_out(kubectl)
    pods = await pods_of(client, "agent")
    assert sorted(pod["spec"]["nodeName"] for pod in pods) == ["node1", "node2"]
    keys = {found["key"] for found in pods[0]["spec"]["tolerations"] if "tolerationSeconds" not in found}
    assert "node.kubernetes.io/unreachable" in keys
    assert "controller-revision-hash" in pods[0]["metadata"]["labels"]


async def test_labels_and_taints_of_nodes_decide(client: Client, kubectl: Kubectl) -> None:
    await client.create(DAEMON_SETS, workload("agent", template("agent", nodeSelector={"disk": "ssd"})))

    async def on(*nodes: str) -> bool:
        return sorted(pod["spec"].get("nodeName", "") for pod in await pods_of(client, "agent")) == list(nodes)

    await kubectl("label", "node", "node1", "disk=ssd")
    await until("a pod is on node1", lambda: on("node1"))
    await kubectl("label", "node", "node2", "disk=ssd")
    await until("pods are on both nodes", lambda: on("node1", "node2"))
    await kubectl("taint", "node", "node1", "only=others:NoExecute")
    await until("node1 is left", lambda: on("node2"))


@pytest.mark.parametrize("surging", [False, True])
async def test_an_update_goes_node_by_node(client: Client, kubectl: Kubectl, surging: bool) -> None:
    more = {"updateStrategy": surge()} if surging else {}
    await client.create(DAEMON_SETS, workload("agent", **more))
    await rolled_out(kubectl)
    await kubectl("set", "image", "daemonset/agent", "app=nginx:2")
    least, most = 9, 0

    async def updated() -> bool:
        nonlocal least, most
        pods = [pod for pod in await pods_of(client, "agent") if "deletionTimestamp" not in pod["metadata"]]
        least, most = min(least, sum(is_ready(pod) for pod in pods)), max(most, len(pods))
        return len(pods) == 2 and all(pod["spec"]["containers"][0]["image"] == "nginx:2" for pod in pods)

    await until("both nodes have the new image", updated)
    assert (least >= 2, most <= 3) == (surging, True)
    await rolled_out(kubectl)
    await kubectl("rollout", "undo", "daemonset/agent")
    await rolled_out(kubectl)

    async def undone() -> bool:
        pods = [pod for pod in await pods_of(client, "agent") if "deletionTimestamp" not in pod["metadata"]]
        return {pod["spec"]["containers"][0]["image"] for pod in pods} == {"nginx:1"}

    # With a surge, the last old pod goes after the rollout counts as done.
    await until("both nodes have the old image again", undone)


async def test_on_delete_waits_for_the_user(client: Client, kubectl: Kubectl) -> None:
    await client.create(DAEMON_SETS, workload("agent", updateStrategy={"type": "OnDelete"}))

    async def images() -> dict[str, str]:
        pods = [pod for pod in await pods_of(client, "agent") if is_ready(pod)]
        return {pod["spec"]["nodeName"]: pod["spec"]["containers"][0]["image"] for pod in pods}

    async def both() -> bool:
        return len(await images()) == 2

    await until("both are ready", both)
    await kubectl("set", "image", "daemonset/agent", "app=nginx:2")
    [first] = [pod for pod in await pods_of(client, "agent") if pod["spec"]["nodeName"] == "node1"]
    await client.delete(PODS, first["metadata"]["name"], "default")

    async def one_new() -> bool:
        return await images() == {"node1": "nginx:2", "node2": "nginx:1"}

    await until("only the deleted one is new", one_new)


async def test_a_node_that_joins_gets_its_pod(client: Client, kubectl: Kubectl) -> None:
    await client.create(DAEMON_SETS, workload("agent"))
    await rolled_out(kubectl)
    await client.create(NODES, node_body("node3"))

    async def there() -> bool:
        return any(pod["spec"].get("nodeName") == "node3" for pod in await pods_of(client, "agent"))

    await until("a pod is on node3", there)


async def test_a_failed_pod_is_replaced(client: Client, kubectl: Kubectl) -> None:
    await client.create(DAEMON_SETS, workload("agent"))
    await rolled_out(kubectl)
    [first, _] = await pods_of(client, "agent")
    await client.patch_status(PODS, first["metadata"]["name"], "default", {"status": {"phase": "Failed"}})

    async def replaced() -> bool:
        pods = await pods_of(client, "agent")
        return len([pod for pod in pods if is_ready(pod)]) == 2 and first["metadata"]["name"] not in [
            pod["metadata"]["name"] for pod in pods
        ]

    await until("a new pod runs in its place", replaced)
