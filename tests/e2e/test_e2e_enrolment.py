"""Pods come and go: in and out of the mesh under traffic, deleted, and made again with the same address (IDN-05)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import pytest
from e2e_mesh import logged
from e2e_pods import APP_PORT, Pod, assert_clean, assert_refused, assert_works, eventually

from undermesh.lab import cgroups, netns, network
from undermesh.lab.cluster import ENROL_LABEL
from undermesh.lab.commands import ip_batch

FLIPS = 5


def test_enrolling_and_un_enrolling_under_traffic_breaks_nothing(steady, pods, way, cluster):
    """In and out five times, with short conversations all the time and long ones across each change."""
    ping = [["ping", 0.02], ["end"], ["recv_all"]]
    ways = [way("flapclient", "flapserver", 4), way("flapclient", "flapserver", 6, service="flap")]
    # An un-enrolled caller and an enrolled one that stays: the change of the one end alone matters too.
    ways += [way("outside1", "flapserver", 6), way("client", "flapserver", 4)]
    with pods["flapserver"].listening([["echo"]], APP_PORT):
        loads = [one.client.load(one.host, one.port or APP_PORT, workers=1) for one in ways]
        try:
            for number in range(FLIPS):
                for label, state in ((None, "plain"), ("enabled", "enrolled")):
                    across = [one.client.connect(one.host, one.port or APP_PORT, ping) for one in ways]
                    for client in across:
                        eventually(client.peek, lambda found: found["exchanges"] > 0 or found["error"], 5.0)
                    cluster.label_namespace("flap", {ENROL_LABEL: label})
                    # Long connections hold up the end of an un-enrolment, so they end first.
                    time.sleep(0.5)
                    ends = [client.stop() for client in across]
                    assert_clean(*ends)
                    cluster.wait_pods("flap", state, 20)
                    errors = {str(one): load.peek()["errors"] for one, load in zip(ways, loads, strict=True)}
                    assert not any(errors.values()), (number, state, errors)
        finally:
            cluster.label_namespace("flap", {ENROL_LABEL: "enabled"})
            reports = [load.stop() for load in loads]
    for report in reports:
        assert report["errors"] == [], report["errors"][:5]
        assert report["done"] > 50
        assert report["longest"] < 3.0, report["longest"]
    steady.wait_whole()


@pytest.fixture
def doomed_file(cluster):
    """The YAML of pod `doomed`; put back, with the pod, when the test is over."""
    return (cluster.source.path / "doomed.yaml").read_text()


def kill_pod(cluster, name):
    """What kubelet and runtime do with a deleted pod: kill its processes, then take its netns away."""
    pod = cluster.manifest.pod(name)
    root = cluster.place(name).cgroup.parent
    for group in root.glob("*.scope"):
        for pid in cgroups.processes(group):
            os.kill(pid, 9)
    eventually(
        lambda: [pid for group in root.glob("*.scope") for pid in cgroups.processes(group)], lambda left: not left, 5
    )
    netns.delete(cluster.netns(name))
    for group in [*root.glob("*.scope"), root]:
        with contextlib.suppress(FileNotFoundError):
            group.rmdir()
    return pod


def make_pod(cluster, pod):
    """What runtime and CNI do for a new pod."""
    pods = tuple(pod if other.name == pod.name else other for other in cluster.manifest.pods)
    cluster.manifest = dataclasses.replace(cluster.manifest, pods=pods)
    name = cluster.netns(pod.name)
    node = cluster.nodes[pod.node].netns
    netns.create(name)
    netns.set_sysctls(name, network.POD_SYSCTLS)
    ip_batch(node, network.pod_link(pod, name))
    ip_batch(name, network.pod_commands(pod))
    cluster.spawn(pod.name, ["sleep", "infinity"], container="pause")


def holders(mesh, node, inode):
    """Which parts of a node hold an FD of a netns."""
    return [kind for kind in ("agent", "ztunnel") if f"net:[{inode}]" in mesh.descriptors(kind, node)]


def test_of_a_deleted_pod_nothing_is_left_and_its_successor_has_only_its_own_identity(
    steady, pods, way, cluster, doomed_file
):
    old = cluster.manifest.pod("doomed")
    inode = Path(f"/run/netns/{cluster.netns('doomed')}").stat().st_ino
    veth = network.host_side(old)
    sizes = {name: steady.map_size("node2", name) for name in ("enrolled", "pods")}
    assert holders(steady, "node2", inode) == ["agent", "ztunnel"]
    assert any(old.uid in pin for pin in steady.pins("node2"))
    assert_works(way("client", "doomed", 4))
    port = pods["doomed"].order("listen", steps=[["echo"]])["port"]
    client = pods["client"].connect(old.addresses[0], port, [["ping", 0.05], ["end"], ["recv_all"]])
    eventually(client.peek, lambda found: found["exchanges"] > 2, 5.0)
    kill_pod(cluster, "doomed")
    deleted = time.monotonic()
    cluster.source.remove("doomed.yaml")
    ended = client.result(10)
    try:
        assert ended["error"] is not None, "its open connection ended as if all were well"
        eventually(lambda: holders(steady, "node2", inode), lambda found: not found, 8.0)
        eventually(lambda: [pin for pin in steady.pins("node2") if old.uid in pin], lambda found: not found, 8.0)
        now = {name: steady.map_size("node2", name) for name in sizes}
        assert now == {name: size - 1 for name, size in sizes.items()}
        assert steady.pod_status("doomed") == {}
        # The kernel frees a netns, and with it the other end of its veth, when the last holder lets go.
        node = cluster.nodes["node2"].netns
        links = lambda: netns.call(node, lambda: Path("/proc/thread-self/net/dev").read_text())  # noqa: E731
        eventually(links, lambda text: veth not in text, 8.0)
        assert time.monotonic() - deleted < 20
    finally:
        new = dataclasses.replace(old, uid=f"{old.uid[:-2]}77", service_account="reborn")
        text = doomed_file.replace(old.uid, new.uid).replace("serviceAccountName: doomed", "serviceAccountName: reborn")
        make_pod(cluster, new)
        cluster.write("doomed.yaml", text)
        pods["doomed"] = Pod.start(cluster, "doomed")
    cluster.wait_enrolled("mesh", 20)
    reborn = pods["doomed"]
    assert reborn.identity.endswith("/sa/reborn")
    with steady.log("node1") as log1, steady.log("node2") as log2:
        assert_works(way("client", "doomed", 4))
        assert_works(way("doomed", "near", 4))
        (outbound,) = logged(log1, direction="outbound", src_workload="client")
        (inbound,) = logged(log1, direction="inbound", dst_workload="near")
        (server,) = logged(log2, direction="inbound", dst_workload="doomed")
    assert outbound["dst.identity"] == server["dst.identity"] == reborn.identity
    assert inbound["src.identity"] == reborn.identity
    account = "cluster.local/ns/mesh/sa/{}".format
    only = {"rules": [{"from": [{"source": {"principals": [account("doomed")]}}]}]}
    with steady.policy("only-the-old", {**only, "action": "DENY"}):
        assert_works(way("doomed", "near", 4))
    with steady.policy("only-the-old", {**only, "action": "ALLOW"}):
        assert_refused(way("doomed", "near", 4))


def test_many_changes_leave_no_descriptors_behind(steady, cluster, pods, way):
    """FDs of both parts after enrolling and un-enrolling as before."""

    def counts():
        return {
            (kind, node): len(steady.descriptors(kind, node)) for kind in ("agent", "ztunnel") for node in cluster.nodes
        }

    before = counts()
    for _ in range(3):
        for label, state in ((None, "plain"), ("enabled", "enrolled")):
            cluster.label_namespace("flap", {ENROL_LABEL: label})
            cluster.wait_pods("flap", state, 20)
    assert_works(way("flapclient", "flapserver", 4))
    eventually(counts, lambda now: all(now[key] <= before[key] + 4 for key in before), 8.0)
