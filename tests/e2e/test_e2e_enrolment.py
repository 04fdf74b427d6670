"""Pods enter and leave the mesh under traffic."""

from __future__ import annotations

import time

from e2e_pods import APP_PORT, assert_clean, assert_works, eventually

from undermesh.lab.cluster import ENROL_LABEL

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
