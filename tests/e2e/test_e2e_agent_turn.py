"""Two agents on one node, as while a new pod of the DaemonSet takes the place of an old one: one of them works."""

from __future__ import annotations

import os
import signal

from e2e_pods import APP_PORT, assert_clean, assert_works, eventually, loads, pinging

NODE = "node2"
ENROLLED = ("far", "near")


def working(mesh):
    """The pid of the agent that answers; 0: none does now."""
    try:
        return mesh.cluster.agent_api(NODE, "/v1/status")["agent"]["pid"]
    except Exception:  # noqa: BLE001 -- LabError and whatever an agent that ends leaves of its answer
        return 0


def test_the_newer_agent_works_the_older_one_waits_and_comes_back_when_it_is_needed(steady, pods, way):
    mesh = steady.cluster.mesh
    old, first = mesh.parts.pop(f"agent-{NODE}"), working(steady)
    pins = steady.pins(NODE)
    listeners = {pod: steady.listener_inodes(pod) for pod in ENROLLED}
    new = mesh.start_agent(NODE)
    try:
        with loads(pods, way) as reports:
            open_ = [pinging(pods["client"], pods["far"].address(family), APP_PORT) for family in (4, 6)]
            second = eventually(lambda: working(steady), lambda pid: pid not in (0, first), 20)
            steady.wait_whole()

            # A crash of the newer one is its supervisor's business.
            os.kill(second, signal.SIGKILL)
            eventually(lambda: working(steady), lambda pid: pid not in (0, first, second), 20)
            steady.wait_whole()

            # Its pod goes for good: the older one works again.
            assert new.stop()
            mesh.parts[f"agent-{NODE}"] = old
            eventually(lambda: working(steady), lambda pid: pid == first, 30)
            steady.wait_whole()
            ends = [client.stop() for client in open_]
        assert_clean(*ends)
        for report in reports:
            assert report["errors"] == [], report["errors"][:5]
    finally:
        new.stop()
        mesh.parts[f"agent-{NODE}"] = old
    assert steady.pins(NODE) == pins
    assert {pod: steady.listener_inodes(pod) for pod in ENROLLED} == listeners
    assert_works(way("client", "far", 4))
