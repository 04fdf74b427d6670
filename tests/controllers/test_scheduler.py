"""Which node a pod gets, and what is said when it gets none."""

from __future__ import annotations

from typing import Any

import pytest
from kubectl import Kubectl
from node_stand_in import node_body
from workloads import Object, pods_of, template, until, workload

from undermesh.lab.client import DEPLOYMENTS, PODS, Client
from undermesh.lab.controllers.filters import NodeState, choose
from undermesh.lab.controllers.placement import requests_of
from undermesh.lab.controllers.quantity import milli


def pod(name: str, **spec: Any) -> Object:
    metadata = {"name": name, "namespace": "default", "uid": name, "labels": {"app": name.partition("-")[0]}}
    return {"metadata": metadata, "spec": {"containers": [{"name": "app", "image": "nginx"}], **spec}}


def asking(**requests: str) -> list[Object]:
    return [{"name": "app", "image": "nginx", "resources": {"requests": requests}}]


def nodes(*names: str, zone: str = "") -> list[NodeState]:
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return [NodeState(node_body(name, **labels)) for name in names]


def placed(wanted: Object, states: list[NodeState]) -> str:
    return choose(wanted, states, lambda _: {}).node


def refused(wanted: Object, states: list[NodeState]) -> str:
    verdict = choose(wanted, states, lambda _: {})
    assert not verdict.node
    return verdict.message


def test_the_emptier_node_is_taken_and_replicas_go_apart() -> None:
    states = nodes("a", "b")
    states[1].add(pod("other", containers=asking(cpu="2")))
    assert placed(pod("new"), states) == "a"
    owner = [{"kind": "ReplicaSet", "name": "web", "uid": "u", "controller": True}]
    sibling, new = pod("web-1"), pod("web-2")
    for one in (sibling, new):
        one["metadata"]["ownerReferences"] = owner
    states[0].add(sibling)
    assert placed(new, states) == "b"


def test_labels_affinity_and_names_of_nodes_decide() -> None:
    states = nodes("a", "b")
    states[1].node["metadata"]["labels"]["disk"] = "ssd"
    term = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}
    pinned = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}

    def required(*terms: Object) -> Object:
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)}}}

    assert placed(pod("p", nodeSelector={"disk": "ssd"}), states) == "b"
    assert placed(pod("p", affinity=required(term)), states) == "b"
    assert placed(pod("p", affinity=required(pinned)), states) == "a"
    assert "didn't match Pod's node affinity/selector" in refused(
        pod("p", affinity=required({**term, **pinned})), states
    )


def test_taints_and_cordons_keep_away_what_does_not_tolerate_them() -> None:
    states = nodes("a", "b")
    states[0].node["spec"]["taints"] = [{"key": "only", "value": "some", "effect": "NoSchedule"}]
    states[1].node["spec"]["unschedulable"] = True
    assert refused(pod("p"), states) == (
        "0/2 nodes are available: 1 node(s) had untolerated taint {only: some}, 1 node(s) were unschedulable."
    )
    assert placed(pod("p", tolerations=[{"key": "only", "value": "some"}]), states) == "a"
    assert (
        placed(pod("p", tolerations=[{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]), states) == "b"
    )


def test_what_is_asked_for_must_be_left() -> None:
    states = nodes("a")
    states[0].add(pod("big", containers=asking(cpu="3500m", memory="1Gi")))
    assert placed(pod("p", containers=asking(cpu="500m")), states) == "a"
    assert "1 Insufficient cpu" in refused(pod("p", containers=asking(cpu="501m")), states)
    states[0].remove("big")
    assert placed(pod("p", containers=asking(cpu="501m")), states) == "a"


def test_init_containers_count_one_by_one() -> None:
    wanted = pod("p", containers=asking(cpu="1"), initContainers=[*asking(cpu="3"), *asking(cpu="2")])
    assert requests_of(wanted)["cpu"] == 3000
    sidecar = [{**asking(cpu="1")[0], "restartPolicy": "Always"}]
    assert requests_of(pod("p", containers=asking(cpu="1"), initContainers=sidecar))["cpu"] == 2000


def test_a_host_port_is_had_once() -> None:
    def with_port(name: str, address: str = "") -> Object:
        port = {"containerPort": 80, "hostPort": 80, "hostIP": address}
        return pod(name, containers=[{"name": "app", "image": "nginx", "ports": [port]}])

    states = nodes("a")
    states[0].add(with_port("one", "127.0.0.1"))
    assert placed(with_port("two", "127.0.0.2"), states) == "a"
    assert "didn't have free ports" in refused(with_port("three"), states)


def test_anti_affinity_works_both_ways_and_affinity_lets_the_first_in() -> None:
    def rule(kind: str, app: str) -> Object:
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": app}}}
        return {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}

    states = nodes("a", "b")
    states[0].add(pod("web-1", affinity=rule("podAntiAffinity", "db")))
    assert placed(pod("db-1"), states) == "b"
    assert placed(pod("db-1", affinity=rule("podAntiAffinity", "web")), states) == "b"
    assert placed(pod("near-1", affinity=rule("podAffinity", "web")), states) == "a"
    assert placed(pod("cache-1", affinity=rule("podAffinity", "cache")), states) in ("a", "b")
    assert "pod affinity rules" in refused(pod("p", affinity=rule("podAffinity", "nobody")), states)


def test_a_spread_keeps_zones_even() -> None:
    states = [*nodes("a", zone="z1"), *nodes("b", zone="z2")]
    constraint = {
        "maxSkew": 1,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }
    states[0].add(pod("web-1"))
    assert placed(pod("web-2", topologySpreadConstraints=[constraint]), states) == "b"
    states[1].node["spec"]["unschedulable"] = True
    assert "topology spread" in refused(pod("web-2", topologySpreadConstraints=[constraint]), states)


def test_quantities_are_read_as_kubernetes_does() -> None:
    found = [milli(text) for text in ("100m", "1.5", 2, "1Ki", "1M", "0.5Gi", "1e3", "1n")]
    assert found == [100, 1500, 2000, 1024_000, 10**9, 2**29 * 1000, 10**6, 1]
    with pytest.raises(ValueError, match="no quantity"):
        milli("much")


@pytest.mark.usefixtures("nodes", "working")
async def test_a_pod_that_fits_nowhere_says_why_and_goes_on_when_it_fits(client: Client, kubectl: Kubectl) -> None:
    await client.create(DEPLOYMENTS, workload("web", template("web", nodeSelector={"disk": "ssd"}), replicas=1))

    async def told() -> bool:
        return "FailedScheduling" in await kubectl("describe", "pods")

    await until("describe shows why", told)
    [waiting] = await pods_of(client, "web")
    [condition] = waiting["status"]["conditions"]
    assert (condition["reason"], condition["status"]) == ("Unschedulable", "False")
    await kubectl("label", "node", "node2", "disk=ssd")
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    [bound] = await pods_of(client, "web")
    assert bound["spec"]["nodeName"] == "node2"


@pytest.mark.usefixtures("nodes", "working")
async def test_a_cordoned_node_gets_nothing_new(client: Client, kubectl: Kubectl) -> None:
    await kubectl("cordon", "node1")
    await client.create(DEPLOYMENTS, workload("web", replicas=4))
    await kubectl("rollout", "status", "deployment/web", "--timeout=15s")
    assert {found["spec"]["nodeName"] for found in await pods_of(client, "web")} == {"node2"}


@pytest.mark.usefixtures("nodes", "working")
async def test_another_schedulers_pods_are_left_alone(client: Client) -> None:
    for name, scheduler in (("other", "mine"), ("ours", "default-scheduler")):
        body = pod(name, schedulerName=scheduler)
        del body["metadata"]["uid"]
        await client.create(PODS, body)

    async def bound() -> bool:
        return bool((await client.get(PODS, "ours", "default"))["spec"].get("nodeName"))

    await until("ours is bound", bound)
    assert "nodeName" not in (await client.get(PODS, "other", "default"))["spec"]
