"""The proxy with real nft in network namespaces and the lab's API server: who reaches whom."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kubeproxy_objects import endpoint, endpoint_slice, service
from kubeproxy_world import PODS as WORLD_PODS
from kubeproxy_world import SOON, Heard, World, node_address, pod_address, world

from undermesh.lab import netns
from undermesh.lab.client import ENDPOINT_SLICES, PODS, SERVICES, Client
from undermesh.lab.commands import run
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kubeproxy.proxy import Proxy

pytestmark = pytest.mark.root

UDP = [{"name": "dns", "port": 53, "protocol": "UDP"}]


@pytest.fixture(scope="module")
def net() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def layout(net: World, tmp_path: Path, kubeconfig: Path) -> ClusterLayout:
    return net.layout(tmp_path, kubeconfig)


@pytest_asyncio.fixture
async def proxy(layout: ClusterLayout, client: Client) -> AsyncIterator[Proxy]:
    made = Proxy(layout, client)
    async with made.following():
        await made.sync()
        running = asyncio.create_task(made.run())
        yield made
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def at(*pods: str, family: int = 4, ports: list[dict[str, Any]] | None = None, owner: str = "web") -> dict[str, Any]:
    """The slice of a Service whose endpoints are these pods."""
    found = [endpoint(pod_address(pod, family), f"node{WORLD_PODS[pod][0]}") for pod in pods]
    return endpoint_slice(owner, *found, ports=ports or [], family=family)


async def publish(client: Client, made: dict[str, Any], *slices: dict[str, Any]) -> dict[str, Any]:
    for piece in slices:
        await client.create(ENDPOINT_SLICES, piece)
    return await client.create(SERVICES, made)


async def eventually(attempt: Callable[[], Awaitable[Heard]]) -> Heard:
    """The answer, as soon as there is one."""
    async with asyncio.timeout(8):
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SOON):
                    return await attempt()
            await asyncio.sleep(0.02)


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while True:
            if condition():
                return
            await asyncio.sleep(0.05)


async def becomes_refused(attempt: Callable[[], Awaitable[Heard]]) -> None:
    async with asyncio.timeout(8):
        while True:
            try:
                async with asyncio.timeout(SOON):
                    await attempt()
            except ConnectionRefusedError:
                return
            except (OSError, TimeoutError):
                pass
            await asyncio.sleep(0.02)


async def test_a_cluster_ip_is_spread_over_all_endpoints_in_both_families(
    net: World, client: Client, proxy: Proxy
) -> None:
    made = await publish(
        client, service("web", ipFamilyPolicy="RequireDualStack"), at("a1", "a2"), at("a1", "a2", family=6)
    )
    async with net.serving("a1", "a2"):
        for address in made["spec"]["clusterIPs"]:
            await eventually(lambda a=address: net.ask("b1", a, 80))  # type: ignore[misc]
            for client_name in ("b1", "node1"):
                heard = [await net.ask(client_name, address, 80) for _ in range(24)]
                assert {one.server for one in heard} == {"a1", "a2"}
                if client_name == "b1":
                    family = 6 if ":" in address else 4
                    assert {one.peer for one in heard} == {pod_address("b1", family)}


async def test_a_pod_that_reaches_itself_by_its_service_sees_its_node(net: World, client: Client, proxy: Proxy) -> None:
    made = await publish(client, service("web"), at("a1"))
    async with net.serving("a1"):
        heard = await eventually(lambda: net.ask("a1", made["spec"]["clusterIP"], 80))
    assert heard.server == "a1" and heard.peer != pod_address("a1")


async def test_udp_goes_to_a_service_and_is_refused_without_endpoints(net: World, client: Client, proxy: Proxy) -> None:
    port = [{"name": "dns", "port": 8080, "protocol": "UDP"}]
    made = await publish(client, service("dns", ports=UDP), at("a2", ports=port, owner="dns"))
    address = made["spec"]["clusterIP"]
    async with net.serving("a2"):
        assert (await eventually(lambda: net.ask("b1", address, 53, udp=True))).server == "a2"
    await client.delete(ENDPOINT_SLICES, "dns-4", "default")
    await becomes_refused(lambda: net.ask("b1", address, 53, udp=True))


async def test_endpoints_come_and_go_and_without_any_a_connection_is_refused(
    net: World, client: Client, proxy: Proxy
) -> None:
    made = await publish(client, service("web"))
    address = made["spec"]["clusterIP"]
    await becomes_refused(lambda: net.ask("b1", address, 80))
    await becomes_refused(lambda: net.ask("node1", address, 80))
    async with net.serving("a1", "a2"):
        for pod in ("a1", "a2"):
            piece = await client.create(ENDPOINT_SLICES, at(pod))
            assert (await eventually(lambda: net.ask("b1", address, 80))).server == pod
            await client.delete(ENDPOINT_SLICES, piece["metadata"]["name"], "default")
            await becomes_refused(lambda: net.ask("b1", address, 80))
        with pytest.raises(ConnectionRefusedError):
            await net.ask("b1", address, 81)
    await client.delete(SERVICES, "web", "default")
    await becomes(lambda: address not in net.table(1) + net.table(2))


@pytest.mark.parametrize("family", [4, 6])
async def test_a_node_port_with_policy_cluster_reaches_any_node_and_hides_the_client(
    net: World, client: Client, proxy: Proxy, family: int
) -> None:
    made = await publish(
        client,
        service("web", type="NodePort", ipFamilyPolicy="RequireDualStack"),
        at("a2"),
        at("a2", family=6),
    )
    port = made["spec"]["ports"][0]["nodePort"]
    async with net.serving("a2"):
        heard = await eventually(lambda: net.ask("out", node_address(1, family), port))
        assert heard == Heard("a2", node_address(1, family))
        assert (await net.ask("node1", node_address(1, family), port)).server == "a2"
        assert (await net.ask("b1", node_address(1, family), port)).server == "a2"


async def test_a_node_port_with_policy_local_keeps_the_client_and_drops_it_on_other_nodes(
    net: World, client: Client, proxy: Proxy
) -> None:
    made = await publish(client, service("web", type="NodePort", externalTrafficPolicy="Local"), at("a2"))
    port = made["spec"]["ports"][0]["nodePort"]
    async with net.serving("a2"):
        heard = await eventually(lambda: net.ask("out", node_address(2), port))
        assert heard == Heard("a2", "172.30.0.99")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await net.ask("out", node_address(1), port)
        assert (await net.ask("node1", node_address(1), port)).server == "a2"
        assert (await net.ask("b1", node_address(1), port)).server == "a2"


async def test_external_and_load_balancer_addresses_lead_to_the_service(
    net: World, client: Client, proxy: Proxy
) -> None:
    await publish(client, service("web", type="LoadBalancer", externalIPs=["192.0.2.1"]), at("a1", "a2"))
    status = {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}]}}}
    await client.patch_status(SERVICES, "web", "default", status)
    async with net.serving("a1", "a2"):
        for address in ("192.0.2.1", "192.0.2.7"):
            assert (await eventually(lambda a=address: net.ask("out", a, 80))).peer != "172.30.0.99"  # type: ignore[misc]


async def test_internal_policy_local_stays_on_the_node(net: World, client: Client, proxy: Proxy) -> None:
    made = await publish(client, service("web", internalTrafficPolicy="Local"), at("a1", "a2"))
    async with net.serving("a1", "a2"):
        await eventually(lambda: net.ask("b1", made["spec"]["clusterIP"], 80))
        assert {(await net.ask("b1", made["spec"]["clusterIP"], 80)).server for _ in range(16)} == {"a1"}


async def test_affinity_keeps_a_client_at_its_endpoint_when_others_come(
    net: World, client: Client, proxy: Proxy
) -> None:
    made = await publish(client, service("web", sessionAffinity="ClientIP"), at("a1"))
    address = made["spec"]["clusterIP"]
    async with net.serving("a1", "a2"):
        await eventually(lambda: net.ask("b1", address, 80))
        piece = await client.get(ENDPOINT_SLICES, "web-4", "default")
        await client.update(ENDPOINT_SLICES, {**piece, "endpoints": at("a1", "a2")["endpoints"]})
        await becomes(lambda: f"{pod_address('a2')}:8080" in net.table(1))
        assert {(await net.ask("b1", address, 80)).server for _ in range(16)} == {"a1"}


async def test_a_host_port_leads_to_its_pod_as_long_as_it_is_there(net: World, client: Client, proxy: Proxy) -> None:
    container = {"name": "c", "image": "x", "ports": [{"containerPort": 8080, "hostPort": 9090}]}
    pod = {
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"nodeName": "node1", "containers": [container]},
    }
    await client.create(PODS, pod)
    addresses = [{"ip": pod_address("a1")}, {"ip": pod_address("a1", 6)}]
    status = {"phase": "Running", "podIP": addresses[0]["ip"], "podIPs": addresses}
    await client.patch_status(PODS, "p", "default", {"status": status})
    async with net.serving("a1"):
        for family, seen in ((4, "172.30.0.99"), (6, "fd00:30::99")):
            heard = await eventually(lambda f=family: net.ask("out", node_address(1, f), 9090))  # type: ignore[misc]
            assert heard == Heard("a1", seen)
        with pytest.raises(OSError):
            await net.ask("out", node_address(2), 9090)
        await client.delete(PODS, "p", "default", grace=0)
        await becomes_refused(lambda: net.ask("out", node_address(1), 9090))


async def test_a_node_that_was_rebooted_gets_its_rules_again(net: World, client: Client, proxy: Proxy) -> None:
    made = await publish(client, service("web"), at("a1"))
    async with net.serving("a1"):
        await eventually(lambda: net.ask("node2", made["spec"]["clusterIP"], 80))
        net.remove_node(2)
        net.build_node(2)
        assert (await eventually(lambda: net.ask("node2", made["spec"]["clusterIP"], 80))).server == "a1"


async def test_a_table_that_somebody_has_removed_is_made_anew_with_the_next_change(
    net: World, client: Client, proxy: Proxy
) -> None:
    old = await publish(client, service("old"))
    await becomes(lambda: old["spec"]["clusterIP"] in net.table(1))
    run(netns.enter(net.name("node1"), ["nft", "flush", "ruleset"]))
    made = await publish(client, service("web"), at("a1"))
    async with net.serving("a1"):
        assert (await eventually(lambda: net.ask("b1", made["spec"]["clusterIP"], 80))).server == "a1"


async def test_the_process_is_ready_when_the_rules_are_there_and_ends_when_told(
    net: World, client: Client, layout: ClusterLayout, tmp_path: Path
) -> None:
    made = await publish(client, service("web"), at("a1"))
    layout.save(tmp_path / "layout.json")
    argv = [sys.executable, "-m", "undermesh.lab.kubeproxy", "--layout", str(tmp_path / "layout.json")]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 15) == b"ready\n"
        async with net.serving("a1"):
            assert (await net.ask("b1", made["spec"]["clusterIP"], 80)).server == "a1"
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
