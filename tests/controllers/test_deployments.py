"""Deployments and ReplicaSets, as kubectl sees them."""

from __future__ import annotations

import time

import pytest
from kubectl import Kubectl
from node_stand_in import Nodes
from workloads import is_ready, pods_of, template, until, workload

from undermesh.lab.client import DEPLOYMENTS, PODS, REPLICA_SETS, Client

pytestmark = pytest.mark.usefixtures("nodes", "working")


async def test_a_deployment_rolls_out_and_tells_so(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=3))
    assert "successfully rolled out" in await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    pods = await pods_of(client, "web")
    assert len(pods) == 3
    assert all(is_ready(pod) for pod in pods)
    assert {pod["spec"]["nodeName"] for pod in pods} == {"node1", "node2"}
    shown = await kubectl("get", "deployment", "web")
    assert "3/3" in shown
    described = await kubectl("describe", "deployment", "web")
    assert "Scaled up replica set web-" in described
    assert "NewReplicaSetAvailable" in described
    events = await kubectl("describe", "pod", pods[0]["metadata"]["name"])
    assert "Successfully assigned default/web-" in events


async def test_a_new_image_replaces_the_pods_within_the_limits(client: Client, kubectl: Kubectl) -> None:
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    await client.create(DEPLOYMENTS, workload("web", replicas=3, strategy=strategy))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("set", "image", "deployment/web", "app=nginx:2")
    least, most = 99, 0

    async def rolled() -> bool:
        nonlocal least, most
        pods = [pod for pod in await pods_of(client, "web") if "deletionTimestamp" not in pod["metadata"]]
        least, most = min(least, sum(is_ready(pod) for pod in pods)), max(most, len(pods))
        return len(pods) == 3 and all(pod["spec"]["containers"][0]["image"] == "nginx:2" for pod in pods)

    await until("all pods have the new image", rolled)
    assert (least, most) == (3, 4)
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    history = await kubectl("rollout", "history", "deployment/web")
    assert [line.split()[0] for line in history.splitlines()[2:4]] == ["1", "2"]


async def test_undo_brings_back_the_former_replica_set(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=2))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("set", "image", "deployment/web", "app=nginx:2")
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("rollout", "undo", "deployment/web")
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    pods = [pod for pod in await pods_of(client, "web") if "deletionTimestamp" not in pod["metadata"]]
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {"nginx:1"}
    sets, _ = await client.list(REPLICA_SETS, "default")
    revisions = sorted(found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] for found in sets)
    assert revisions == ["2", "3"]


async def test_a_template_that_never_gets_ready_stops_the_rollout(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=4, progressDeadlineSeconds=2))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    body = {"spec": {"template": template("web", annotations={"test/ready": "false"})}}
    await client.patch(DEPLOYMENTS, "web", "default", body)
    error = await kubectl.fails("rollout", "status", "deployment/web", "--timeout=15s")
    assert "exceeded its progress deadline" in error
    assert sum(is_ready(pod) for pod in await pods_of(client, "web")) == 3


async def test_a_paused_deployment_waits_and_scales(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=1))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("rollout", "pause", "deployment/web")
    await kubectl("set", "image", "deployment/web", "app=nginx:2")
    await kubectl("scale", "deployment/web", "--replicas=3")
    await kubectl("wait", "--for=jsonpath={.status.readyReplicas}=3", "deployment/web", "--timeout=15s")
    assert {pod["spec"]["containers"][0]["image"] for pod in await pods_of(client, "web")} == {"nginx:1"}
    await kubectl("rollout", "resume", "deployment/web")
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    pods = [pod for pod in await pods_of(client, "web") if "deletionTimestamp" not in pod["metadata"]]
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {"nginx:2"}


async def test_recreate_never_runs_two_templates_at_once(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=2, strategy={"type": "Recreate"}))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    await kubectl("set", "image", "deployment/web", "app=nginx:2")

    async def images() -> bool:
        found = {pod["spec"]["containers"][0]["image"] for pod in await pods_of(client, "web")}
        assert len(found) <= 1
        return found == {"nginx:2"}

    await until("the new pods are there", images)


async def test_a_deleted_pod_comes_back_and_a_freed_one_is_replaced(client: Client, nodes: Nodes) -> None:
    await client.create(REPLICA_SETS, workload("rs", replicas=2))

    async def ready() -> bool:
        return sum(is_ready(pod) for pod in await pods_of(client, "rs")) == 2

    await until("two pods are ready", ready)
    first, second = await pods_of(client, "rs")
    await client.delete(PODS, first["metadata"]["name"], "default")
    await client.patch(PODS, second["metadata"]["name"], "default", {"metadata": {"labels": {"app": "other"}}})

    async def replaced() -> bool:
        names = {pod["metadata"]["name"] for pod in await pods_of(client, "rs") if is_ready(pod)}
        return len(names) == 2 and not names & {first["metadata"]["name"], second["metadata"]["name"]}

    await until("two new pods are ready", replaced)
    freed = await client.get(PODS, second["metadata"]["name"], "default")
    assert "ownerReferences" not in freed["metadata"]


async def test_a_free_pod_that_matches_is_adopted(client: Client) -> None:
    await client.create(PODS, {"metadata": {"name": "old", "namespace": "default", "labels": {"app": "rs"}}, **_spec()})
    await client.create(REPLICA_SETS, workload("rs", replicas=1))

    async def adopted() -> bool:
        found = await client.get(PODS, "old", "default")
        return bool(found["metadata"].get("ownerReferences"))

    await until("the pod has an owner", adopted)
    assert len(await pods_of(client, "rs")) == 1


def _spec() -> dict[str, object]:
    return {"spec": template("rs")["spec"]}


async def test_a_refused_template_is_told_by_an_event_and_a_condition(client: Client, kubectl: Kubectl) -> None:
    await client.create(REPLICA_SETS, workload("rs", template("rs", serviceAccountName="nobody"), replicas=50))

    async def told() -> bool:
        return "FailedCreate" in await kubectl("describe", "rs", "rs")

    await until("describe shows why", told)
    found = await client.get(REPLICA_SETS, "rs", "default")
    assert found["status"]["conditions"][0]["type"] == "ReplicaFailure"


async def test_hundreds_of_pods_come_and_go_fast(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=200))
    start = time.monotonic()
    await kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    await kubectl("scale", "deployment/web", "--replicas=0")

    async def gone() -> bool:
        return not await pods_of(client, "web")

    await until("all pods are gone", gone, 30)
    assert time.monotonic() - start < 20
