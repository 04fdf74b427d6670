"""StatefulSets, as kubectl sees them."""

from __future__ import annotations

import pytest
from kubectl import Kubectl
from workloads import Object, is_ready, pods_of, template, until, workload

from undermesh.lab.client import PODS, STATEFUL_SETS, Client
from undermesh.lab.client.resources import PERSISTENT_VOLUME_CLAIMS

pytestmark = pytest.mark.usefixtures("nodes", "working")


async def images(client: Client) -> dict[str, str]:
    pods = [pod for pod in await pods_of(client, "db") if "deletionTimestamp" not in pod["metadata"]]
    return {pod["metadata"]["name"]: pod["spec"]["containers"][0]["image"] for pod in pods}


async def rolled_out(kubectl: Kubectl) -> None:
    await kubectl("rollout", "status", "statefulset/db", "--timeout=20s")


async def test_pods_come_in_order_with_names_of_their_own(client: Client, kubectl: Kubectl) -> None:
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    await client.create(STATEFUL_SETS, workload("db", replicas=3, serviceName="db", volumeClaimTemplates=[claim]))
    seen: list[list[str]] = []

    async def complete() -> bool:
        claims, _ = await client.list(PERSISTENT_VOLUME_CLAIMS, "default")
        for found in claims:
            bound = {"status": {"phase": "Bound"}}
            await client.patch_status(PERSISTENT_VOLUME_CLAIMS, found["metadata"]["name"], "default", bound)
        pods = await pods_of(client, "db")
        seen.append([pod["metadata"]["name"] for pod in pods])
        for before, after in zip(sorted(seen[-1]), sorted(seen[-1])[1:], strict=False):
            assert next(is_ready(pod) for pod in pods if pod["metadata"]["name"] == before), after
        return sum(is_ready(pod) for pod in pods) == 3

    await until("three pods are ready", complete)
    await rolled_out(kubectl)
    first = await client.get(PODS, "db-0", "default")
    assert (first["spec"]["hostname"], first["spec"]["subdomain"]) == ("db-0", "db")
    claims, _ = await client.list(PERSISTENT_VOLUME_CLAIMS, "default")
    assert sorted(found["metadata"]["name"] for found in claims) == ["data-db-0", "data-db-1", "data-db-2"]


async def test_an_update_goes_from_the_last_to_the_first_and_back_by_undo(client: Client, kubectl: Kubectl) -> None:
    await client.create(STATEFUL_SETS, workload("db", replicas=3, serviceName="db"))
    await rolled_out(kubectl)
    await kubectl("set", "image", "statefulset/db", "app=nginx:2")
    orders = set()

    async def updated() -> bool:
        found = await images(client)
        orders.add("".join("n" if found.get(f"db-{n}") == "nginx:2" else "o" for n in range(3)))
        return list(found.values()) == ["nginx:2"] * 3

    await until("all have the new image", updated)
    assert orders <= {"ooo", "oon", "onn", "nnn"}
    await rolled_out(kubectl)
    await kubectl("rollout", "undo", "statefulset/db")
    await rolled_out(kubectl)
    assert set((await images(client)).values()) == {"nginx:1"}


async def test_a_partition_keeps_the_lower_ones_as_they_are_even_when_deleted(client: Client, kubectl: Kubectl) -> None:
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"partition": 1}}
    await client.create(STATEFUL_SETS, workload("db", replicas=2, serviceName="db", updateStrategy=strategy))
    await rolled_out(kubectl)
    await kubectl("set", "image", "statefulset/db", "app=nginx:2")

    async def is_parted() -> bool:
        return await images(client) == {"db-0": "nginx:1", "db-1": "nginx:2"}

    await until("only the upper one is new", is_parted)
    await rolled_out(kubectl)
    old = (await client.get(PODS, "db-0", "default"))["metadata"]["uid"]
    await client.delete(PODS, "db-0", "default")

    async def back() -> Object | None:
        pods = [pod for pod in await pods_of(client, "db") if pod["metadata"]["name"] == "db-0" and is_ready(pod)]
        return pods[0] if pods and pods[0]["metadata"]["uid"] != old else None

    again = await until("db-0 is back", back)
    assert again["spec"]["containers"][0]["image"] == "nginx:1"


async def test_scaling_down_removes_the_last_ones_first(client: Client, kubectl: Kubectl) -> None:
    body = workload("db", template("db"), replicas=3, serviceName="db", podManagementPolicy="Parallel")
    await client.create(STATEFUL_SETS, body)
    await rolled_out(kubectl)
    await kubectl("scale", "statefulset/db", "--replicas=1")

    async def one() -> bool:
        return [pod["metadata"]["name"] for pod in await pods_of(client, "db")] == ["db-0"]

    await until("only the first is left", one)
