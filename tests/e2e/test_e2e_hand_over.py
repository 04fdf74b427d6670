"""ztunnel is replaced while it works (LIF-05, design section 4): what is open lives on, new connections do not wait."""

from __future__ import annotations

import os
import signal
import time

import pytest
from e2e_pods import APP_PORT, assert_clean, assert_works, eventually, loads, pinging

from undermesh.lab import cgroups

NODES = ("node1", "node2")
TIMES = int(os.environ.get("UNDERMESH_E2E_HAND_OVERS", "10"))
LATE = 1 << 20
"""Bytes that go over a connection after the last hand-over."""


@pytest.fixture(autouse=True)
def steady_node(steady):
    """Nothing drains when a test begins or has ended."""
    yield
    for node in NODES:
        wait_drained(steady, node)


def wait_drained(mesh, node, seconds=10.0):
    """Until the older ztunnels of a node have ended."""
    part = mesh.part("ztunnel", node)
    eventually(lambda: len(part.children()), lambda count: count == 1, seconds)
    assert mesh.ztunnel_status(node)["draining"] == []


def connections_of(mesh, node, pid):
    """The connections that one of a node's ztunnels holds."""
    rows = mesh.cluster.agent_api(node, "/v1/connections").get("connections", [])
    return [row for row in rows if row["ztunnel_pid"] == pid]


class Open:
    """Connections of every kind that are open while the ztunnels change, both ways and in both families."""

    def __init__(self, pods):
        asks_late = [["text", "x"], ["gate", "go"], ["send", LATE, 1], ["end"], ["recv_all"]]
        half_closed = [["text", "question"], ["end"], ["recv_all"]]
        answers_late = [["recv_all"], ["gate", "go"], ["send", LATE, 2], ["end"]]
        self.pings, self.gated = [], []
        self._listeners = []
        for server in ("far", "client"):
            port = self._listen(pods[server], [["echo"]])
            other = self._listen(pods[server], answers_late)
            source = pods["client" if server == "far" else "far"]
            for family in (4, 6):
                address = pods[server].address(family)
                self.pings.append(pinging(source, address, port.port))
                self.gated.append((source.connect(address, port.port, asks_late), None))
                self.gated.append((source.connect(address, other.port, half_closed), other))

    def _listen(self, pod, steps):
        listening = pod.listening(steps)
        self._listeners.append(listening)
        return listening.__enter__()

    def finish(self):
        """Uses each to its end; nothing may have happened to it."""
        for client, server in self.gated:
            (server or client).open_gate("go")
        reports = [client.result(30) for client, _ in self.gated]
        ends = [ping.stop() for ping in self.pings]
        for listening in self._listeners:
            listening.__exit__(None, None, None)
        assert_clean(*reports, *ends)
        for report in reports:
            assert report["received"] in (LATE, LATE + 1), report
        return ends


def test_ten_hand_overs_in_a_row_under_traffic_reset_nothing_and_refuse_nothing(steady, pods, way):
    with loads(pods, way) as reports:
        open_ = Open(pods)
        try:
            seen = []
            for number in range(TIMES):
                seen.append(steady.hand_over(NODES[number % 2]))
                time.sleep(0.1)
        finally:
            ends = open_.finish()
    assert len({pid for pair in seen for pid in pair}) == TIMES + 2, seen
    for report in reports:
        assert report["errors"] == [], report["errors"][:5]
        assert report["done"] > 2 * TIMES
    longest = max(entry["longest"] for entry in (*reports, *ends))
    # A second of that is the machine's.
    assert longest < 3.0, "a hand-over made somebody wait"


def test_what_drains_is_shown_and_cut_by_a_policy_that_comes_later(steady, pods):
    with pods["far"].listening([["echo"]], APP_PORT) as server:
        open_ = [pinging(pods["client"], pods["far"].address(family), APP_PORT) for family in (4, 6)]
        old, new = steady.hand_over("node2")
        status = steady.ztunnel_status("node2")
        assert status["pid"] == new
        assert [(d["pid"], d["connections"]) for d in status["draining"]] == [(old, 2)]
        held = connections_of(steady, "node2", old)
        assert [row["draining"] for row in held] == [True, True]
        fresh = pinging(pods["client"], pods["far"].address(4), APP_PORT)
        assert [row["draining"] for row in connections_of(steady, "node2", new)] == [False]
        before = steady.ztunnel_status("node2")
        deny = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["mesh"]}}]}]}
        with steady.policy("late", deny):
            for client in (*open_, fresh):
                report = client.result(5)
                assert report["error"] == "ECONNRESET" and not report["ended"], report
            server.results(3, 5)
        assert before["draining"], "it ended before the policy came"


@pytest.mark.parametrize("node", NODES)
def test_sigterm_leaves_what_is_open_a_grace_and_the_second_one_resets_it(steady, pods, way, node):
    far = pods["far"]
    with far.listening([["echo"]], APP_PORT):
        open_ = [pinging(pods["client"], far.address(family), APP_PORT) for family in (4, 6)]
        part = steady.cluster.mesh.parts.pop(f"ztunnel-{node}")
        try:
            part.process.terminate()
            asked = time.monotonic()
            eventually(lambda: steady.ztunnel_status(node)["connected"], lambda connected: not connected, 3)
            waiting = pods["client"].connect(far.address(4), APP_PORT, [["text", "x"], ["end"], ["recv_all"]])
            time.sleep(0.5)
            assert not [client.peek()["error"] for client in open_ if client.peek()["error"]]
            assert waiting.peek()["error"] is None and waiting.peek()["received"] == 0
            assert time.monotonic() - asked < 4, "too slow a machine to tell the grace from its end"
            part.process.terminate()
            for client in open_:
                report = client.result(2)
                assert report["error"] == "ECONNRESET" and not report["ended"], report
            part.process.wait(5)
        finally:
            part.stop()
            steady.cluster.mesh.start_ztunnel(node)
        report = waiting.result(15)
        assert_clean(report)
        assert report["head"] == "x"
    steady.wait_whole()
    assert_works(way("client", "far", 4))


def test_the_old_one_accepts_again_when_its_successor_is_lost(steady, pods, way):
    part = steady.part("ztunnel", "node2")
    with pods["far"].listening([["echo"]], APP_PORT):
        open_ = pinging(pods["client"], pods["far"].address(6), APP_PORT)
        old, new = steady.hand_over("node2")
        part.process.send_signal(signal.SIGSTOP)
        try:
            os.kill(new, signal.SIGKILL)
            eventually(lambda: steady.ztunnel_status("node2")["pid"], lambda pid: pid == old, 8)
            assert_works(way("other", "far", 4))
        finally:
            part.let_go()
        eventually(lambda: steady.ztunnel_status("node2")["pid"], lambda pid: pid not in (old, new, 0), 8)
        assert old in cgroups.processes(part.place.cgroup)
        assert_clean(open_.stop())
