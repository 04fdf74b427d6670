"""Deleted pods leave nothing behind, and who gets their address does not get their identity (IDN-05)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from e2e_mesh import logged
from e2e_pods import assert_refused, assert_works, eventually
from e2e_runtime import Runtime

GONE = 8.0
"""Seconds in which everything of a deleted pod must be gone."""


@pytest.fixture
def runtime(cluster, pods):
    return Runtime(cluster, pods)


def only(account):
    """A rule for one account of namespace mesh."""
    return {"rules": [{"from": [{"source": {"principals": [f"cluster.local/ns/mesh/sa/{account}"]}}]}]}


def holders(mesh, inode):
    """Which parts of node2 hold an FD of a netns."""
    return [kind for kind in ("agent", "ztunnel") if f"net:[{inode}]" in mesh.descriptors(kind, "node2")]


def test_of_a_deleted_pod_nothing_is_left_and_its_successor_has_only_its_own_identity(
    steady, pods, way, cluster, runtime
):
    old = cluster.manifest.pod("doomed")
    inode = Path(f"/run/netns/{cluster.netns('doomed')}").stat().st_ino
    sizes = {name: steady.map_size("node2", name) for name in ("enrolled", "pods")}
    assert holders(steady, inode) == ["agent", "ztunnel"]
    assert any(old.uid in pin for pin in steady.pins("node2"))
    port = pods["doomed"].order("listen", steps=[["echo"]])["port"]
    client = pods["client"].connect(old.addresses[0], port, [["ping", 0.05], ["end"], ["recv_all"]])
    eventually(client.peek, lambda found: found["exchanges"] > 2, 5.0)
    runtime.delete("doomed")
    try:
        assert client.result(10)["error"] is not None, "its open connection ended as if all were well"
        eventually(lambda: holders(steady, inode), lambda found: not found, GONE)
        eventually(lambda: [pin for pin in steady.pins("node2") if old.uid in pin], lambda found: not found, GONE)
        now = {name: steady.map_size("node2", name) for name in sizes}
        assert now == {name: size - 1 for name, size in sizes.items()}
        assert steady.pod_status("doomed") == {}
    finally:
        reborn = runtime.make_again("doomed", "reborn")
    cluster.wait_enrolled("mesh", 20)
    assert reborn.identity.endswith("/sa/reborn")
    with steady.log("node1") as log1, steady.log("node2") as log2:
        assert_works(way("client", "doomed", 4))
        assert_works(way("doomed", "near", 4))
        (outbound,) = logged(log1, direction="outbound", src_workload="client")
        (inbound,) = logged(log1, direction="inbound", dst_workload="near")
        (server,) = logged(log2, direction="inbound", dst_workload="doomed")
    assert outbound["dst.identity"] == server["dst.identity"] == reborn.identity
    assert inbound["src.identity"] == reborn.identity
    with steady.policy("only-the-old", {**only("doomed"), "action": "DENY"}):
        assert_works(way("doomed", "near", 4))
    with steady.policy("only-the-old", {**only("doomed"), "action": "ALLOW"}):
        assert_refused(way("doomed", "near", 4))


def test_a_reused_address_does_not_lend_its_old_identity_while_the_control_plane_is_away(
    steady, pods, way, cluster, runtime
):
    """The successor cannot be enrolled without a certificate; until then it is a stranger to the policy."""
    account = cluster.manifest.pod("doomed").service_account
    successor = {"doomed": "reborn", "reborn": "doomed"}[account]
    guard = {**only(account), "action": "ALLOW", "selector": {"matchLabels": {"app": "near"}}}
    with steady.policy("only-the-old", guard):
        assert_works(way("doomed", "near", 4))
        with steady.control_plane_away():
            runtime.delete("doomed")
            runtime.make_again("doomed", successor)
            until = time.monotonic() + 3.0
            while time.monotonic() < until:
                for family in (4, 6):
                    assert_refused(way("doomed", "near", family))
            assert_works(way("doomed", "outside2", 4))
        steady.wait_whole()
        assert_refused(way("doomed", "near", 4))
    with steady.policy("only-the-new", {**only(successor), "action": "ALLOW"}):
        assert_works(way("doomed", "near", 4))
