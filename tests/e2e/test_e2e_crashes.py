"""Parts of undermesh die (LIF-04, design section 9): what breaks, what does not, and never a byte in plaintext."""

from __future__ import annotations

import os
import signal
import time

import pytest
from e2e_pods import APP_PORT, assert_clean, assert_works, eventually, loads, pinging
from e2e_wire import Wire

NODES = ("node1", "node2")
RECOVERY = 10.0


@pytest.fixture
def wire(cluster, mesh):
    with Wire.watched(cluster) as watched:
        yield watched


def test_the_wire_capture_sees_plaintext_if_there_is_some(way, pods, cluster):
    """Without this, seeing none would prove nothing."""
    with Wire.watched(cluster) as watched:
        plain = way("outside1", "outside2", 4)
        assert_clean(*plain.talk([["text", watched.token], ["end"], ["recv_all"]], [["echo"]]))
        watched.assert_plaintext()


@pytest.mark.parametrize("node", NODES)
def test_a_killed_ztunnel_resets_what_was_open_and_new_connections_wait_for_its_successor(
    steady, wire, pods, way, node
):
    far = pods["far"]
    with far.listening([["echo"]], APP_PORT) as server:
        open_ = [pinging(pods["client"], far.address(family), APP_PORT, wire.token) for family in (4, 6)]
        part = steady.part("ztunnel", node)
        pid, killed = part.kill_child(hold=True), time.monotonic()
        try:
            for client in open_:
                report = client.result(3)
                assert report["error"] == "ECONNRESET", report
                assert not report["ended"], "an aborted transfer looked complete"
                assert report["failed_at"] - killed < 1.0
            for report in server.results(2, 3):
                assert report["error"] == "ECONNRESET" and not report["ended"], report
            steps = [["text", wire.token], ["end"], ["recv_all"]]
            fresh = [
                pods["client"].connect(far.address(family), APP_PORT, steps) for family in (4, 6) for _ in range(3)
            ]
            time.sleep(0.3)
            assert not [report for report in (client.peek() for client in fresh) if report["error"]], "not even waited"
        finally:
            part.let_go()
        reports = [client.result(10) for client in fresh]
        assert_clean(*reports)
        assert all(report["head"] == wire.token for report in reports)
        assert max(report["ended_at"] - killed for report in reports) < 5.0
    assert steady.child("ztunnel", node) != pid
    wire.assert_no_plaintext()
    assert_works(way("client", "far", 4))


def test_ten_crashes_of_the_agents_under_load_change_nothing(steady, wire, pods, way, cluster):
    enrolled = ("client", "far", "near")
    pins = {node: steady.pins(node) for node in NODES}
    listeners = {pod: steady.listener_inodes(pod) for pod in enrolled}
    with loads(pods, way, wire.token) as reports:
        # The app's own listeners come and go with the tests: what is compared is there before and after.
        open_ = [pinging(pods["client"], pods["far"].address(family), APP_PORT, wire.token) for family in (4, 6)]
        for number in range(10):
            node = NODES[number % 2]
            before = steady.child("agent", node)
            steady.part("agent", node).kill_child()
            eventually(lambda node=node: steady.child("agent", node), lambda pid, old=before: pid != old, 5.0)
            steady.cluster.wait_ready(node)
        steady.wait_whole()
        ends = [client.stop() for client in open_]
    assert_clean(*ends)
    # Ten starts of Python on few cores: a second of that is the machine's.
    assert max(end["longest"] for end in ends) < 2.0, "open connections stood still"
    for report in reports:
        assert report["errors"] == [], report["errors"][:5]
        assert report["done"] > 50
        assert report["longest"] < 2.0, "new connections had to wait"
    wire.assert_no_plaintext()
    assert {node: steady.pins(node) for node in NODES} == pins
    assert {pod: steady.listener_inodes(pod) for pod in enrolled} == listeners


@pytest.mark.parametrize("node", NODES)
def test_agent_and_ztunnel_killed_at_once_lose_no_new_connection_and_leak_nothing(steady, wire, pods, way, node):
    with pods["far"].listening([["echo"]], APP_PORT):
        parts = [steady.part(kind, node) for kind in ("agent", "ztunnel")]
        killed = time.monotonic()
        try:
            for part in parts:
                part.kill_child(hold=True)
            steps = [["text", wire.token], ["end"], ["recv_all"]]
            address = pods["far"].address(4)
            fresh = [pods["client"].connect(address, APP_PORT, steps, timeout=RECOVERY) for _ in range(3)]
            time.sleep(0.5)
        finally:
            for part in parts:
                part.let_go()
        reports = [client.result(15) for client in fresh]
        assert_clean(*reports)
        assert max(report["ended_at"] for report in reports) - killed < RECOVERY
    wire.assert_no_plaintext()
    steady.wait_whole()
    assert_works(way("client", "far", 4))


@pytest.mark.parametrize("node", NODES)
def test_both_containers_of_a_node_gone_for_good_means_silence_and_not_plaintext(steady, wire, pods, way, node):
    """The supervisors die too, and with them the last FDs of the listeners: SYNs are dropped until all is back."""
    cluster = steady.cluster
    with pods["far"].listening([["echo"]], APP_PORT):
        parts = [cluster.mesh.parts.pop(f"{kind}-{node}") for kind in ("agent", "ztunnel")]
        for part in parts:
            children = part.children()
            part.process.kill()
            for child in children:
                os.kill(child, signal.SIGKILL)
            part.process.wait()
        steps = [["text", wire.token], ["end"], ["recv_all"]]
        waiting = pods["client"].connect(pods["far"].address(4), APP_PORT, steps, timeout=30.0)
        time.sleep(0.5)
        early = waiting.peek()
        assert early["received"] == 0
        started = time.monotonic()
        cluster.start_mesh(node)
        steady.wait_whole()
        assert time.monotonic() - started < RECOVERY
        report = waiting.result(30)
        # Refused or served late are both right; an end that looks complete is not.
        assert report["error"] is not None or report["head"] == wire.token, report
        again = pods["client"].connect(pods["far"].address(4), APP_PORT, steps).result()
        assert_clean(again)
    wire.assert_no_plaintext()
