"""Pods that come, talk at once and go, many per second: all of it is captured, nothing of them stays.

UNDERMESH_CHURN_SECONDS (5) and UNDERMESH_CHURN_RATE (8 pods a second) say how long and how fast: `make soak`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mesh_churn import Churn, Outcome, server_pod

from undermesh.lab.capture import Capture
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.kube.inventory import counted, more
from undermesh.lab.mesh import wait_for
from undermesh.lab.wire import Observation

SECONDS = float(os.environ.get("UNDERMESH_CHURN_SECONDS", "5"))
RATE = float(os.environ.get("UNDERMESH_CHURN_RATE", "8"))
NAMESPACE = "churn"
NODES = ("node1", "node2")
IDENTITY = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"

pytestmark = [pytest.mark.root, pytest.mark.timeout(120 + 4 * SECONDS)]


@dataclass(frozen=True)
class Churned:
    """What one churn did, and what was seen of it from outside."""

    outcome: Outcome
    wires: dict[str, Observation]
    heard: dict[str, tuple[str, str]]
    """By the servers: client -> its address as it knows it itself, and as the server saw it."""
    records: list[dict[str, str]]
    """Of all access logs."""
    before: dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def churned(meshed_cluster: KubeCluster) -> Iterator[Churned]:
    """A churn that is over; its servers still run."""
    cluster = meshed_cluster
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "istio.io/dataplane-mode=ambient")
    for node in NODES:
        cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(server_pod(f"server-{node}", node)))
    cluster.kubectl("wait", "pod", "--all", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=30s")
    churn = Churn(cluster, NAMESPACE, secrets.token_hex(16), _servers(cluster))
    captures = {node: Capture(cluster.layout.node(node).netns, "eth0", churn.token.encode()) for node in NODES}
    try:
        wait_for("published servers", 15, lambda: _is_tunnelled(churn, captures))
        before = {node: counted(cluster.node(node)) for node in NODES}
        logs = [AccessLog(path) for node in NODES for path in _access_logs(cluster, node)]
        for log in logs:
            log.mark()
        outcome = churn.run(RATE, SECONDS)
        wires = {node: capture.observe() for node, capture in captures.items()}
        records = [entry for log in logs for entry in log.entries()]
        yield Churned(outcome, wires, _heard(cluster), records, before)
    finally:
        for capture in captures.values():
            capture.close()
    cluster.kubectl("delete", "namespace", NAMESPACE)


def _servers(cluster: KubeCluster) -> dict[str, str]:
    pods = cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
    address = {pod["spec"]["nodeName"]: pod["status"]["podIP"] for pod in pods}
    return {"node1": address["node2"], "node2": address["node1"]}


def _is_tunnelled(churn: Churn, captures: dict[str, Capture]) -> bool:
    """Whether one client from each node reaches its server by a tunnel: the servers are known to everyone."""
    assert not churn.run(4, 0.5).failed()
    seen = [capture.observe() for capture in captures.values()]
    return all(wire.tls_bytes() and not wire.token for wire in seen)


def _access_logs(cluster: KubeCluster, node: str) -> list[Path]:
    directory = cluster.layout.node(node).disk / "var/upper/log/pods"
    return sorted(directory.glob("undermesh-system_undermesh-node-*/ztunnel/*.log"))


def _heard(cluster: KubeCluster) -> dict[str, tuple[str, str]]:
    logs = [cluster.kubectl("logs", "-n", NAMESPACE, f"server-{node}") for node in NODES]
    said = [line.split() for log in logs for line in log.splitlines()]
    return {name: (own, seen) for name, own, seen in said}


def test_every_client_got_its_answer_and_is_gone(churned: Churned) -> None:
    outcome = churned.outcome
    assert len(outcome.clients) == int(RATE * SECONDS)
    assert not outcome.failed()
    assert not outcome.stuck()


def test_no_byte_of_a_clients_first_connection_was_in_the_clear(churned: Churned) -> None:
    for node, wire in churned.wires.items():
        assert wire.lost == 0, f"{node}: {wire.lost} packets were not seen"
        assert not wire.token, f"{node}: {', '.join(map(str, wire.token))}"
        assert wire.tls_bytes() > len(churned.outcome.clients) * 30


def test_the_servers_saw_each_clients_own_address(churned: Churned) -> None:
    assert churned.heard.keys() == churned.outcome.clients.keys()
    assert all(own == seen for own, seen in churned.heard.values()), churned.heard


def test_both_access_logs_name_both_identities_of_each_connection(churned: Churned) -> None:
    def named(direction: str) -> Counter[str]:
        return Counter(
            entry["src.addr"].rpartition(":")[0]
            for entry in churned.records
            if entry["direction"] == direction
            and (entry["src.identity"], entry["dst.identity"]) == (IDENTITY, IDENTITY)
            and "error" not in entry
        )

    expected = Counter(own for own, _ in churned.heard.values())
    assert named("outbound") == expected
    assert named("inbound") == expected


def test_nothing_of_the_clients_is_left(churned: Churned, meshed_cluster: KubeCluster) -> None:
    deadline = time.monotonic() + 15
    while (left := _left(churned, meshed_cluster)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
    pods = meshed_cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
    assert {pod["metadata"]["name"] for pod in pods} == {f"server-{node}" for node in NODES}


def _left(churned: Churned, cluster: KubeCluster) -> dict[str, dict[str, str]]:
    found = {node: more(churned.before[node], counted(cluster.node(node))) for node in NODES}
    return {node: kinds for node, kinds in found.items() if kinds}
