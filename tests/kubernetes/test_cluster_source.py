"""The source against the lab's API server: TLS, client certificates, all kinds, and bad days."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cluster_harness import Cluster, running
from source_harness import FAST, Watched, until

from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.lab.apiserver.faults import Fault
from undermesh.lab.apiserver.server import ApiServer, Settings

# Not installed there.
KINDS_OF_ISTIO = ["AuthorizationPolicy", "PeerAuthentication", "ServiceEntry", "WorkloadEntry"]
POLICIES = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies"


@pytest.fixture
async def source(cluster: Cluster) -> AsyncIterator[Watched]:
    watched = Watched(KubernetesSource.of_control_plane(Api(Access(cluster.kubeconfig), FAST)))
    yield watched
    await watched.stop()


async def test_every_kind_is_read_as_the_server_writes_it(cluster: Cluster, source: Watched) -> None:
    await cluster.define_kinds()
    await cluster.namespace("shop")
    await cluster.create(
        "/api/v1/nodes", {"metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "z1"}}}
    )
    await cluster.pod("shop", "web", "10.0.0.1")
    await cluster.create(
        "/api/v1/namespaces/shop/services",
        {"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}},
    )
    await cluster.create(
        "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices",
        {
            "metadata": {"name": "outside", "labels": {"kubernetes.io/service-name": "db"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.9"], "conditions": {"ready": True}}],
            "ports": [{"port": 5432}],
        },
    )
    await until(lambda: "security.istio.io" in str(cluster.server.catalog.__dict__))
    await cluster.create(
        POLICIES,
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": "closed"},
            "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]},
        },
    )
    await cluster.create(
        POLICIES.replace("authorizationpolicies", "peerauthentications"),
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "ports"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"80": {"mode": "STRICT"}}},
        },
    )
    entries = "/apis/networking.istio.io/v1/namespaces/shop"
    outer = {"apiVersion": "networking.istio.io/v1"}
    service = {"hosts": ["db.example"], "addresses": ["203.0.113.1"], "ports": [{"number": 80, "name": "a"}]}
    await cluster.create(
        f"{entries}/serviceentries", {**outer, "kind": "ServiceEntry", "metadata": {"name": "db"}, "spec": service}
    )
    machine = {"address": "192.0.2.8", "ports": {"a": 8000}}
    await cluster.create(
        f"{entries}/workloadentries", {**outer, "kind": "WorkloadEntry", "metadata": {"name": "vm"}, "spec": machine}
    )
    first = await source.start()
    assert source.source.errors == ()
    assert first.service_entries[ObjectKey("shop", "db")].spec.hosts == ("db.example",)
    assert first.workload_entries[ObjectKey("shop", "vm")].spec.ports == {"a": 8000}
    key = ObjectKey("shop", "web")
    assert "shop" in first.namespaces and "node-a" in first.nodes
    assert ObjectKey("shop", "default") in first.service_accounts
    assert [str(address) for address in first.pods[key].addresses] == ["10.0.0.1"]
    assert first.services[key].spec.addresses and first.services[key].spec.ports[0].port == 80
    assert first.authorization_policies[ObjectKey("shop", "closed")].spec.action == "DENY"
    ports = first.peer_authentications[ObjectKey("shop", "ports")]
    assert {str(port): entry.mode for port, entry in ports.spec.port_level_mtls.items()} == {"80": "STRICT"}
    assert ports.metadata.creation_timestamp > "2026"
    outside = first.endpoint_slices[ObjectKey("shop", "outside")]
    assert outside.service == "db" and outside.endpoints[0].addresses == ("192.0.2.9",)


async def test_policies_count_once_their_definition_is_installed(cluster: Cluster, source: Watched) -> None:
    await cluster.namespace("shop")
    await source.start()
    await until(lambda: "there are none until the kind is installed" in source.errors)
    await cluster.define_kinds()
    await until(lambda: source.source.errors == ())
    await cluster.create(
        POLICIES,
        {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "none"}, "spec": {}},
    )
    await until(lambda: source.source.current.authorization_policies)


async def test_through_all_kinds_of_trouble_the_state_ends_where_the_server_s_is(
    cluster: Cluster, source: Watched
) -> None:
    """And no pod that exists throughout is ever missing."""
    await cluster.namespace("shop")
    await cluster.pod("shop", "always", "10.0.0.1")
    await source.start()
    pods: dict[str, str] = {"always": "10.0.0.1"}
    chance = random.Random(20261125)
    for round_ in range(60):
        trouble = chance.choice(("none", "drop", "compact", "429", "500", "slow"))
        match trouble:
            case "drop":
                cluster.server.watches.drop("pods")
            case "compact":
                cluster.server.compact()
                cluster.server.watches.drop("")
            case "429" | "500":
                cluster.server.faults.add(
                    Fault(
                        code=int(trouble),
                        verb=chance.choice(("list", "watch")),
                        resource="pods",
                        count=2,
                        retry_after=0,
                    )
                )
                cluster.server.watches.drop("pods")
            case "slow":
                cluster.server.faults.add(Fault(delay=0.1, verb="list", resource="pods", count=1))
        if len(pods) > 3 and chance.random() < 0.4:
            name = chance.choice([name for name in pods if name != "always"])
            del pods[name]
            await cluster.delete(f"/api/v1/namespaces/shop/pods/{name}")
        else:
            name, ip = f"web-{round_:02}", f"10.0.1.{round_ + 1}"
            pods[name] = ip
            await cluster.pod("shop", name, ip)
        await asyncio.sleep(chance.random() * 0.05)
    await until(
        lambda: {k.name: str(p.addresses[0]) for k, p in source.source.current.pods.items() if p.addresses} == pods,
        seconds=30,
    )
    assert all(ObjectKey("shop", "always") in state.pods for state in source.states)


async def test_while_the_server_is_away_the_last_state_stands_and_then_the_difference_follows(tmp_path: Path) -> None:
    async with running(tmp_path, journal=True) as cluster:
        port = int(cluster.server.url.rpartition(":")[2])
        await cluster.namespace("shop")
        await cluster.pod("shop", "stays", "10.0.0.1")
        await cluster.pod("shop", "goes", "10.0.0.2")
        source = Watched(KubernetesSource.of_control_plane(Api(Access(cluster.kubeconfig), FAST)))
        await source.start()
    try:
        await until(lambda: "the last state stands" in source.errors)
        assert source.pods == ["goes", "stays"]
        async with ApiServer(Settings(tmp_path / "apiserver", journal=True, port=port)) as server:
            cluster.server = server
            await cluster.delete("/api/v1/namespaces/shop/pods/goes")
            await cluster.pod("shop", "comes", "10.0.0.3")
            await source.pods_are("comes", "stays")
            await until(lambda: sorted(problem.subject for problem in source.source.errors) == KINDS_OF_ISTIO)
    finally:
        await source.stop()
        await cluster.api.close()
    assert all(ObjectKey("shop", "stays") in state.pods for state in source.states)
