"""The control plane is gone for a while (design section 9): the last state stands, restarts included."""

from __future__ import annotations

import contextlib
import time

import pytest
from e2e_hbone import Dialler
from e2e_pki import Authority
from e2e_pods import APP_PORT, assert_clean, assert_refused, assert_works, eventually

from undermesh.lab import netns

NODES = ("node1", "node2")
DENY_OTHER = {
    "action": "DENY",
    "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/other"]}}]}],
}


def wait_agent(mesh, node):
    """Wait until a node's agent has its ztunnel again, with every pod that is enrolled in the kernel."""

    def whole():
        with contextlib.suppress(Exception):
            status = mesh.cluster.agent_api(node, "/v1/status")
            states = {pod["name"]: pod["state"] for pod in status["pods"] if pod["desired"] == "enrolled"}
            return status["ztunnel"]["connected"] and set(states.values()) == {"enrolled"}
        return False

    eventually(whole, bool, 20.0)


def knows_it_is_away(status):
    """An agent's status without a control plane."""
    return not status["control_plane"]["connected"]


def check(way):
    """What the state says: `client` may, `other` may not, on both kinds of way."""
    for server in ("far", "near"):
        assert_works(way("client", server, 4))
        assert_refused(way("other", server, 6))


def test_everything_goes_on_without_the_control_plane_through_restarts_of_agent_and_ztunnel(steady, pods, way):
    ping = [["ping", 0.05], ["end"], ["recv_all"]]
    with steady.policy("deny-other", DENY_OTHER), pods["far"].listening([["echo"]], 18600):
        with steady.control_plane_away():
            client = pods["client"].connect(pods["far"].address(4), 18600, ping)
            eventually(lambda: steady.cluster.agent_api("node1", "/v1/status"), knows_it_is_away, 10.0)
            check(way)
            for node in NODES:
                old = steady.child("agent", node)
                steady.part("agent", node).kill_child()
                eventually(lambda node=node: steady.child("agent", node), lambda pid, old=old: pid != old, 5.0)
                wait_agent(steady, node)
            check(way)
            assert_clean(client.stop())
            for node in NODES:
                steady.part("ztunnel", node).kill_child()
                wait_agent(steady, node)
            check(way)
            # Both have lost everything they had in memory by now; the state was kept.
            steady.part("agent", "node2").kill_child()
            steady.part("ztunnel", "node2").kill_child()
            wait_agent(steady, "node2")
            check(way)
        steady.wait_whole()
        check(way)


def test_a_change_of_policy_arrives_when_the_control_plane_is_back(steady, pods, way):
    with steady.policy("flexible", DENY_OTHER) as policy:
        with steady.control_plane_away():
            policy.write({**DENY_OTHER, "selector": {"matchLabels": {"app": "nobody"}}})
            time.sleep(1.0)
            assert_refused(way("other", "far", 4))
        with pods["far"].listening([["text", "hi"], ["recv_all"]], APP_PORT):

            def reached() -> bool:
                steps = [["recv", 2], ["end"]]
                return pods["other"].connect(pods["far"].address(4), APP_PORT, steps).result()["error"] is None

            # The agents try again every 15 s at the longest.
            eventually(reached, bool, 20.0)
        steady.wait_whole()


@pytest.fixture
def serial(cluster, mesh, tmp_path):
    """The serial number of the certificate that `far` shows to a peer."""
    ca = Authority.of_cluster(cluster.run_dir / "state/controlplane/undermesh-ca", tmp_path)
    dialler = Dialler(
        lambda connect: netns.call(cluster.netns("outside1"), connect), cluster.run_dir / "state/root.pem"
    )

    def look(address):
        with dialler.tls(address, ca.leaf("spiffe://cluster.local/ns/mesh/sa/client")) as connection:
            return int(connection.getpeercert()["serialNumber"], 16)

    return look


def test_new_certificates_replace_old_ones_without_a_cut(steady, pods, way, cluster, serial):
    """The leaves of both nodes are issued anew, as at renewal; open connections live on, new ones use the new."""
    far = pods["far"]
    with far.listening([["echo"]], APP_PORT):
        ping = [["ping", 0.02], ["end"], ["recv_all"]]
        open_ = [pods["client"].connect(far.address(family), APP_PORT, ping) for family in (4, 6)]
        load = pods["client"].load(far.address(4), APP_PORT)
        before = serial(far.address(4))
        for node in NODES:
            # Without the kept files the next agent has to ask for every identity again.
            for kept in (cluster.nodes[node].run_dir / "certificates").glob("*.pem"):
                kept.unlink()
            old = steady.child("agent", node)
            steady.part("agent", node).kill_child()
            eventually(lambda node=node: steady.child("agent", node), lambda pid, old=old: pid != old, 5.0)
        steady.wait_whole()
        eventually(lambda: serial(far.address(4)), lambda found: found != before, 5.0)
        report, ends = load.stop(), [client.stop() for client in open_]
    assert report["errors"] == [], report["errors"][:5]
    assert_clean(*ends)
    shown = {
        cert["identity"]: int(cert["serial"].replace(":", ""), 16)
        for cert in cluster.agent_api("node2", "/v1/certs")["certs"]
    }
    assert shown[far.identity] == serial(far.address(4))


def test_the_status_says_that_the_control_plane_is_away_and_that_it_is_back(steady):
    def control_plane():
        return steady.cluster.agent_api("node1", "/v1/status")["control_plane"]

    def checked():
        checks = steady.cluster.agent_api("node1", "/v1/check")["checks"]
        return next(found for found in checks if found["name"] == "control plane")

    with steady.control_plane_away():
        assert eventually(control_plane, lambda found: not found["connected"], 10.0)["error"]
        assert not checked()["ok"] and checked()["next_step"]
    eventually(control_plane, lambda found: found["connected"], 15.0)
    assert checked()["ok"]
