"""What an operator types first on a cluster, with the real kubectl, and what a cluster answers."""

from __future__ import annotations

import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest

from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.mesh import wait_for

pytestmark = pytest.mark.root

CURL = ("--image=curlimages/curl", "--restart=Never", "--rm", "-i", "--quiet")


def column(table: str, heading: str) -> list[str]:
    """One column of kubectl's table."""
    lines = table.splitlines()
    start = re.search(rf"(^|  ){re.escape(heading)}( |$)", lines[0])
    assert start is not None, table
    begin = start.start() + (2 if start.group(1) else 0)
    return [line[begin:].split("  ")[0].strip() for line in lines[1:]]


@pytest.fixture(scope="module", autouse=True)
def nginx(cluster: KubeCluster) -> Iterator[None]:
    """`kubectl create deployment` and `expose`, as the first thing that people try."""
    assert "deployment.apps/nginx created" in cluster.kubectl("create", "deployment", "nginx", "--image=nginx")
    assert "service/nginx exposed" in cluster.kubectl("expose", "deployment", "nginx", "--port=80")
    out = cluster.kubectl("rollout", "status", "deployment/nginx", "--timeout=30s")
    assert 'deployment "nginx" successfully rolled out' in out
    yield
    assert "deleted" in cluster.kubectl("delete", "deployment,service", "nginx")


def pod(cluster: KubeCluster) -> str:
    """The name of a pod of nginx that stays: one that is ending may be gone when it is used."""
    found = cluster.api.get("/api/v1/namespaces/default/pods?labelSelector=app%3Dnginx")["items"]
    return next(f"pod/{one['metadata']['name']}" for one in found if "deletionTimestamp" not in one["metadata"])


def test_get_nodes_shows_two_that_are_ready(cluster: KubeCluster) -> None:
    table = cluster.kubectl("get", "nodes", "-o", "wide")
    assert column(table, "NAME") == ["node1", "node2"]
    assert column(table, "STATUS") == ["Ready", "Ready"]
    assert column(table, "INTERNAL-IP") == ["172.30.0.11", "172.30.0.12"]
    assert all("://" in runtime for runtime in column(table, "CONTAINER-RUNTIME"))


def test_get_pods_of_all_namespaces_shows_dns_running(cluster: KubeCluster) -> None:
    table = cluster.kubectl("get", "pods", "-A")
    assert any(name.startswith("coredns-") for name in column(table, "NAME"))
    assert set(column(table, "STATUS")) == {"Running"}


def test_a_deployment_gets_a_pod_with_addresses_of_both_families(cluster: KubeCluster) -> None:
    ips = cluster.kubectl("get", pod(cluster), "-o", "jsonpath={.status.podIPs[*].ip}").split()
    assert [("." in ip, ":" in ip) for ip in ips] == [(True, False), (False, True)]


def test_a_pod_reaches_a_service_by_its_name(cluster: KubeCluster) -> None:
    out = cluster.kubectl("run", "curl", *CURL, "--", "-s", "--max-time", "5", "http://nginx.default.svc.cluster.local")
    assert "Welcome to nginx!" in out


def test_logs_shows_the_requests(cluster: KubeCluster) -> None:
    cluster.kubectl("run", "curl", *CURL, "--", "-s", "--max-time", "5", "http://nginx/seen-in-logs")
    wait_for("the request in the log", 5, lambda: "/seen-in-logs" in cluster.kubectl("logs", "deployment/nginx"))


def test_exec_runs_in_the_pod(cluster: KubeCluster) -> None:
    assert cluster.kubectl("exec", "deploy/nginx", "--", "hostname").strip() == pod(cluster).partition("/")[2]
    failed = cluster.run_kubectl("exec", "deploy/nginx", "--", "sh", "-c", "exit 3")
    assert (failed.returncode, "exit code 3" in failed.stderr) == (3, True)
    assert cluster.run_kubectl("exec", "-i", "deploy/nginx", "--", "cat", stdin="typed").stdout == "typed"


def test_port_forward_reaches_the_pod(cluster: KubeCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [str(cluster.kubectl_program), "port-forward", "service/nginx", f"{port}:80"]
    with subprocess.Popen(line, env=cluster.kubectl_environment(), stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            assert f"127.0.0.1:{port} -> 80" in forward.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                assert b"Welcome to nginx!" in answer.read()
        finally:
            forward.terminate()


def test_scale_makes_pods_on_both_nodes_and_endpoints(cluster: KubeCluster) -> None:
    cluster.kubectl("scale", "deployment/nginx", "--replicas=4")
    cluster.kubectl("rollout", "status", "deployment/nginx", "--timeout=30s")
    table = cluster.kubectl("get", "pods", "-l", "app=nginx", "-o", "wide")
    assert set(column(table, "NODE")) == {"node1", "node2"}
    slices = ("get", "endpointslices", "-l", "kubernetes.io/service-name=nginx", "-o")
    ready = "jsonpath={.items[?(@.addressType=='IPv4')].endpoints[?(@.conditions.ready==true)].addresses[0]}"
    wait_for("four endpoints", 5, lambda: len(cluster.kubectl(*slices, ready).split()) == 4)
    cluster.kubectl("scale", "deployment/nginx", "--replicas=1")
    wait_for("one endpoint", 10, lambda: len(cluster.kubectl(*slices, ready).split()) == 1)


def test_describe_tells_a_pods_story(cluster: KubeCluster) -> None:
    told = cluster.kubectl("describe", pod(cluster))
    for part in (
        "Node:             node",
        "Status:           Running",
        "Image:          nginx",
        "Scheduled",
        "Started",
    ):
        assert part in told, told


def test_an_image_that_the_lab_does_not_know_says_what_to_do(cluster: KubeCluster) -> None:
    cluster.kubectl("run", "unknown", "--image=example.com/unknown:1")

    def status() -> str:
        return column(cluster.kubectl("get", "pod", "unknown"), "STATUS")[0]

    try:
        wait_for("a refusal", 10, lambda: status() in ("ErrImagePull", "ImagePullBackOff"))
        assert "this lab pulls nothing" in cluster.kubectl("describe", "pod", "unknown")
    finally:
        cluster.kubectl("delete", "pod", "unknown", "--now")


def test_drain_moves_pods_away_and_uncordon_lets_them_come_back(cluster: KubeCluster) -> None:
    node = cluster.kubectl("get", pod(cluster), "-o", "jsonpath={.spec.nodeName}")
    other = {"node1": "node2", "node2": "node1"}[node]
    assert f"node/{node} cordoned" in cluster.kubectl("cordon", node)
    assert "Ready,SchedulingDisabled" in cluster.kubectl("get", "node", node)
    out = cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=40s")
    assert f"node/{node} drained" in out
    cluster.kubectl("rollout", "status", "deployment/nginx", "--timeout=30s")
    assert cluster.kubectl("get", pod(cluster), "-o", "jsonpath={.spec.nodeName}") == other
    assert f"node/{node} uncordoned" in cluster.kubectl("uncordon", node)


def test_delete_replaces_a_pod_of_a_deployment(cluster: KubeCluster) -> None:
    old = pod(cluster)
    assert "deleted" in cluster.kubectl("delete", old)
    cluster.kubectl("rollout", "status", "deployment/nginx", "--timeout=30s")
    assert pod(cluster) != old
