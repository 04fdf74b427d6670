"""Many connections, and slow readers (CON-04, CON-05)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from e2e_pods import assert_clean, assert_works, eventually

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
every_server = pytest.mark.parametrize("server", ["far", "near"], ids=["cross node", "same node"])

SLOW = 200 << 20
MORE_THAN_PLAIN = 64 << 20
"""Bytes that a chain of proxies may take in beyond what plain TCP does: window and socket buffers of two more hops."""


@every_family
@every_server
def test_300_connections_between_two_pods_work_at_the_same_time(pods, way, server, family):
    pair = way("client", server, family)
    with pair.listening([["echo"]]) as listener:
        found = pair.client.order("crowd", host=pair.host, port=listener.port, count=300, rounds=3)
        assert found["errors"] == {}
        assert found["opened"] == 300
        assert found["longest_connect"] < 1.0
        # Number 301 finds room too, at once.
        assert_works(way("client", server, family))
        assert_clean(*listener.results(300))


@every_family
def test_a_slow_reader_holds_its_sender_back_and_nobody_else(way, family):
    """The server's 200 MB are taken in as fast as the reader takes them out, give or take buffers."""
    reading = [["text", "?"], ["gate", "read"], ["recv_slow", 4 << 20, 1 << 20, 0.05], ["recv_all"]]
    sending = [["recv", 1], ["send", SLOW, 11], ["end"]]
    accepted = {}
    for name, pair in {"control": way("outside1", "outside2", family), "mesh": way("client", "far", family)}.items():
        with pair.listening(sending) as listener:
            client = pair.connect(listener, reading)
            eventually(listener.peek, bool, 2.0)
            accepted[name] = settled(lambda: listener.peek()[0]["sent"])
            began = time.monotonic()
            assert_works(way("client", "far", family))
            assert time.monotonic() - began < 1.0, "the slow reader slows others down"
            client.open_gate("read")
            report, sender = client.result(40), listener.result(40)
        assert_clean(report, sender)
        assert report["received"] == SLOW
        assert report["received_sha256"] == sender["sent_sha256"]
    assert accepted["mesh"] < accepted["control"] + MORE_THAN_PLAIN, accepted


def test_a_slow_reader_costs_bounded_memory(way, mesh):
    reading, sending = [["text", "?"], ["gate", "read"], ["recv_all"]], [["recv", 1], ["send", SLOW, 12], ["end"]]
    before = {node: resident(mesh.child("ztunnel", node)) for node in mesh.cluster.nodes}
    pair = way("client", "far", 4)
    with pair.listening(sending) as listener:
        clients = [pair.connect(listener, reading) for _ in range(4)]
        eventually(listener.peek, lambda found: len(found) == 4, 2.0)
        for index in range(4):
            settled(lambda index=index: listener.peek()[index]["sent"])
        grown = {node: resident(mesh.child("ztunnel", node)) - before[node] for node in before}
        for client in clients:
            client.pod.order("gate", handle=client.handle, name="read")
        reports = [client.result(60) for client in clients]
    assert_clean(*reports)
    # Four streams of at most a window of 4 MiB, what is on its way into TLS, and the allocator's reserve.
    assert all(growth < 64 << 20 for growth in grown.values()), grown


def settled(look, quiet: float = 0.4):
    """A number once it has not changed for a while."""
    value, since = look(), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(0.05)
        if (now := look()) != value:
            value, since = now, time.monotonic()
    return value


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
