"""EndpointSlices and Endpoints of Services."""

from __future__ import annotations

from typing import Any

import pytest
from workloads import Object, pods_of, template, until, workload

from undermesh.lab.client import DEPLOYMENTS, ENDPOINT_SLICES, ENDPOINTS, PODS, SERVICES, Client, NotFound
from undermesh.lab.controllers.endpoints import slices_for, subsets_for

pytestmark = pytest.mark.usefixtures("nodes", "working")


def service(name: str, **spec: Any) -> Object:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    return {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"app": "web"}, "ports": ports, **spec},
    }


async def slices_of(client: Client, name: str) -> list[Object]:
    found, _ = await client.list(ENDPOINT_SLICES, "default", label_selector=f"kubernetes.io/service-name={name}")
    return found


async def endpoints_in(client: Client, name: str, count: int) -> list[Object]:
    async def there() -> list[Object] | None:
        found = [endpoint for one in await slices_of(client, name) for endpoint in one.get("endpoints") or ()]
        good = len(found) == count and all(endpoint["conditions"]["ready"] for endpoint in found)
        return found if good else None

    if count == 0:
        return []
    result: list[Object] = await until(f"{count} ready endpoints of {name}", there)
    return result


async def test_ready_pods_become_endpoints(client: Client) -> None:
    await client.create(SERVICES, service("web"))
    await client.create(DEPLOYMENTS, workload("web", replicas=3))
    endpoints = await endpoints_in(client, "web", 3)
    pods = {pod["metadata"]["name"]: pod for pod in await pods_of(client, "web")}
    for endpoint in endpoints:
        pod = pods[endpoint["targetRef"]["name"]]
        assert endpoint["addresses"] == [pod["status"]["podIP"]]
        assert endpoint["nodeName"] == pod["spec"]["nodeName"]
        assert endpoint["conditions"] == {"ready": True, "serving": True, "terminating": False}
    [one] = await slices_of(client, "web")
    assert one["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}]
    legacy = await client.get(ENDPOINTS, "web", "default")
    assert len(legacy["subsets"][0]["addresses"]) == 3


async def test_a_pod_that_is_not_ready_is_not_served_unless_asked_for(client: Client) -> None:
    await client.create(SERVICES, service("web"))
    await client.create(SERVICES, service("early", publishNotReadyAddresses=True, clusterIP="None"))
    pods = template("web", annotations={"test/ready": "false"})
    await client.create(DEPLOYMENTS, workload("web", pods, replicas=1))
    await endpoints_in(client, "early", 1)

    async def shown() -> list[Object]:
        return [endpoint for one in await slices_of(client, "web") for endpoint in one.get("endpoints") or ()]

    [endpoint] = await until("the pod is an endpoint", shown)
    assert endpoint["conditions"] == {"ready": False, "serving": False, "terminating": False}
    legacy = await client.get(ENDPOINTS, "web", "default")
    assert "addresses" not in legacy["subsets"][0]
    assert (await slices_of(client, "early"))[0]["metadata"]["labels"]["service.kubernetes.io/headless"] == ""


async def test_named_ports_follow_each_pod(client: Client) -> None:
    ports = [{"name": "http", "port": 80, "targetPort": "web"}]
    await client.create(SERVICES, service("web", ports=ports))
    for number in (8080, 9090):
        container = {"name": "app", "image": "nginx", "ports": [{"name": "web", "containerPort": number}]}
        pod = {"metadata": {"name": f"p{number}", "namespace": "default", "labels": {"app": "web"}}}
        await client.create(PODS, {**pod, "spec": {"containers": [container]}})
    await endpoints_in(client, "web", 2)
    found = {
        one["endpoints"][0]["targetRef"]["name"]: one["ports"][0]["port"] for one in await slices_of(client, "web")
    }
    assert found == {"p8080": 8080, "p9090": 9090}


async def test_a_service_without_selector_keeps_its_own_endpoints(client: Client) -> None:
    plain = service("ext")
    del plain["spec"]["selector"]
    await client.create(SERVICES, plain)
    labels = {"kubernetes.io/service-name": "ext"}
    own = {
        "metadata": {"name": "ext-1", "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.1"]}],
        "ports": [],
    }
    await client.create(ENDPOINT_SLICES, own)
    await client.create(SERVICES, service("web"))

    async def other() -> bool:
        return len(await slices_of(client, "web")) == 1

    await until("the other service has a slice", other)
    [one] = await slices_of(client, "ext")
    assert one["metadata"]["name"] == "ext-1"
    with pytest.raises(NotFound):
        await client.get(ENDPOINTS, "ext", "default")


async def test_a_deleted_service_leaves_nothing(client: Client) -> None:
    await client.create(SERVICES, service("web"))
    await client.create(DEPLOYMENTS, workload("web", replicas=1))
    await endpoints_in(client, "web", 1)
    await client.delete(SERVICES, "web", "default")

    async def gone() -> bool:
        left, _ = await client.list(ENDPOINTS, "default", field_selector="metadata.name=web")
        return not left and not await slices_of(client, "web")

    await until("slices and endpoints are gone", gone)


def _pod(number: int, **status: Any) -> Object:
    ready = {"type": "Ready", "status": "True"}
    addresses = [{"ip": f"10.244.1.{number}"}, {"ip": f"fd00:10:244:1::{number:x}"}]
    return {
        "metadata": {"name": f"p{number:03}", "namespace": "default", "uid": f"u{number}", "labels": {"app": "web"}},
        "spec": {"nodeName": "node1", "containers": [], "hostname": f"p{number}", "subdomain": "web"},
        "status": {"phase": "Running", "podIPs": addresses, "conditions": [ready], **status},
    }


async def test_both_families_get_slices_with_host_names_and_zones() -> None:
    node = {"metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "z1"}}}
    both = service("web", ipFamilies=["IPv4", "IPv6"])
    found = slices_for(both, [_pod(1)], {"node1": node})
    assert [(one["addressType"], one["endpoints"][0]["addresses"]) for one in found] == [
        ("IPv4", ["10.244.1.1"]),
        ("IPv6", ["fd00:10:244:1::1"]),
    ]
    assert {(one["endpoints"][0]["hostname"], one["endpoints"][0]["zone"]) for one in found} == {("p1", "z1")}


async def test_a_pod_that_ends_still_serves_and_is_not_ready() -> None:
    ending = _pod(1)
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    [one] = slices_for(service("web"), [ending, _pod(2, phase="Succeeded")], {})
    assert [endpoint["conditions"] for endpoint in one["endpoints"]] == [
        {"ready": False, "serving": True, "terminating": True}
    ]
    assert subsets_for(service("web"), [ending]) == []


async def test_a_slice_has_a_hundred_endpoints_at_most() -> None:
    found = slices_for(service("web"), [_pod(n) for n in range(1, 251)], {})
    assert [len(one["endpoints"]) for one in found] == [100, 100, 50]
