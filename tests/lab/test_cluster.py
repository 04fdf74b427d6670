"""The cluster without a mesh: pods reach each other as on any CNI, and it comes and goes without a trace."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import APPS, DEMO

from undermesh.lab import cgroups, netns, snapshot
from undermesh.lab.cluster import Cluster
from undermesh.lab.errors import LabError

pytestmark = pytest.mark.root

GET = "import sys,urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=3).read().decode())"


@pytest.fixture(scope="module")
def serving(cluster: Cluster) -> Cluster:
    cluster.spawn("orders", [sys.executable, "-I", "-S", str(APPS / "server.py"), "http", "8080", "secret"])
    cluster.wait_listening("orders", 8080)
    return cluster


@pytest.mark.parametrize(
    ("client", "url", "seen_as"),
    [
        pytest.param("web", "http://10.1.2.10:8080/", "::ffff:10.1.1.10", id="IPv4, pod, other node"),
        pytest.param("web", "http://[fd00:10:1:2::10]:8080/", "fd00:10:1:1::10", id="IPv6, pod, other node"),
        pytest.param("web", "http://10.96.0.10/", "::ffff:10.1.1.10", id="IPv4, service, other node"),
        pytest.param("web", "http://[fd00:10:96::10]/", "fd00:10:1:1::10", id="IPv6, service, other node"),
        pytest.param("sink", "http://10.1.2.10:8080/", "::ffff:10.1.2.12", id="IPv4, pod, same node"),
        pytest.param("sink", "http://[fd00:10:96::10]/", "fd00:10:1:2::12", id="IPv6, service, same node"),
    ],
)
def test_pods_reach_each_other_with_their_own_addresses(serving: Cluster, client: str, url: str, seen_as: str) -> None:
    done = serving.exec(client, [sys.executable, "-I", "-c", GET, url])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["client"], answer["token"]) == (seen_as, "secret")


def test_a_node_reaches_its_pods_and_a_closed_port_refuses(serving: Cluster) -> None:
    done = serving.node_exec("node2", [sys.executable, "-I", "-c", GET, "http://10.1.2.10:8080/"])
    assert done.returncode == 0, done.stderr
    done = serving.node_exec("node2", [sys.executable, "-I", "-c", GET, "http://10.1.2.10:8081/"])
    assert "Connection refused" in done.stderr


def test_processes_of_a_pod_live_in_its_cgroup_and_netns(cluster: Cluster) -> None:
    done = cluster.exec("web", ["sh", "-c", "cat /proc/self/cgroup; stat -Lc %i /proc/self/ns/net; ls /sys/fs/bpf"])
    uid = cluster.manifest.pod("web").uid.replace("-", "_")
    assert f"/{cluster.prefix}/node1/kubepods.slice/kubepods-pod{uid}.slice/cri-containerd-app.scope" in done.stdout
    assert str(netns.path(cluster.netns("web")).stat().st_ino) in done.stdout
    assert done.returncode == 0, done.stderr


def test_two_clusters_stand_side_by_side(cluster: Cluster) -> None:
    with Cluster(DEMO) as other:
        assert other.exec("web", ["true"]).returncode == 0
    assert cluster.exec("web", ["true"]).returncode == 0


def test_a_cluster_comes_and_goes_without_a_trace() -> None:
    cluster = Cluster(DEMO)
    before = snapshot.take_host(cluster.prefix)
    cluster.start()
    child = cluster.spawn("web", ["sleep", "infinity"])
    kinds = {kind for kind, _ in snapshot.take_host(cluster.prefix) - before}
    assert {"mount", "netns", "process", "cgroup", "file"} <= kinds
    cluster.stop()
    assert snapshot.differences(before, snapshot.take_host(cluster.prefix)) == []
    assert child.poll() is not None


def test_a_cluster_that_cannot_be_built_leaves_nothing() -> None:
    cluster = Cluster(DEMO)
    before = snapshot.take_host(cluster.prefix)
    name = cluster.netns("sink")
    (netns.NETNS_DIR / name).parent.mkdir(exist_ok=True)
    (netns.NETNS_DIR / name).touch()  # the last pod's name is taken
    with pytest.raises(FileExistsError):
        cluster.start()
    assert snapshot.differences(before, snapshot.take_host(cluster.prefix)) == []


def test_what_needs_a_mesh_says_so_without_one(cluster: Cluster) -> None:
    with pytest.raises(LabError, match="the mesh is not started"):
        cluster.stop_mesh("node1")
    with pytest.raises(LabError, match="the mesh is not started"):
        cluster.agent_api("node1", "/v1/status")


def test_a_pods_command_gets_no_more_time_than_it_may(cluster: Cluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.exec("web", ["sleep", "60"], timeout=0.2)
    assert cgroups.processes(cluster.place("web").cgroup) == []
