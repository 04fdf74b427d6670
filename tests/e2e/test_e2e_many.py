"""Many connections at once, one after the other, idle and half-dead: they end without a trace and hinder nobody.

UNDERMESH_E2E_SHORTS (10000), UNDERMESH_E2E_STOPPED (50) and UNDERMESH_E2E_IDLE (15 s; keep-alive begins at 180 s and
gives up at 855 s) say how many and how long: `make soak`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from e2e_mesh import MeshView
from e2e_pods import assert_clean, assert_works, eventually

from undermesh.lab import netns

SHORTS = int(os.environ.get("UNDERMESH_E2E_SHORTS", "10000"))
STOPPED = int(os.environ.get("UNDERMESH_E2E_STOPPED", "50"))
IDLE = float(os.environ.get("UNDERMESH_E2E_IDLE", "15"))
PODS = ("client", "far", "near")
TCP_LISTEN, TCP_TIME_WAIT = "0A", "06"
SPARE = 32
"""Tunnels that stay warm, by FDs and sockets of a pod."""
MEMORY_SLACK = 24 << 20

pytestmark = pytest.mark.timeout(300 + IDLE + SHORTS / 100)


@pytest.fixture(scope="module")
def idle(pods):
    """Connections that say nothing while the other tests run: (when they began to be silent, client, server)."""
    steps = [["patience", IDLE + 300], ["text", "a"], ["recv", 1], ["gate", "wake"], ["text", "b"], ["recv", 1]]
    pairs = [("client", "far"), ("client", "near"), ("client", "outside2"), ("outside1", "far")]
    handles, clients = [], []
    for client, server in pairs:
        answer = pods[server].order("listen", steps=[["patience", IDLE + 300], ["echo"]])
        handles.append((pods[server], answer["handle"]))
        for family in (4, 6):
            host = pods[server].address(family)
            clients.append(pods[client].connect(host, answer["port"], [*steps, ["end"], ["recv_all"]]))
    for one in clients:
        eventually(one.peek, lambda found: found["received"] == 1 or found["error"], 10.0)
    yield time.monotonic(), clients
    for pod, handle in handles:
        pod.order("unlisten", handle=handle)


@pytest.mark.usefixtures("idle")
def test_ten_thousand_short_connections_leave_nothing_behind(way, mesh):
    def round_of(count):
        for server in ("far", "near"):
            for family in (4, 6):
                pair = way("client", server, family)
                with pair.listening([["echo"]]) as listener:
                    order = {"host": pair.host, "port": listener.port, "count": count // 4, "workers": 16}
                    assert pair.client.order("shorts", **order)["errors"] == {}

    # What is made once (tunnels, arenas, series) is there after some.
    round_of(SHORTS // 5)
    before, memory = inventory(mesh), memory_of(mesh)
    round_of(SHORTS)
    eventually(lambda: more(before, inventory(mesh)), lambda found: not found, 15.0)
    grown = {part: now - memory[part] for part, now in memory_of(mesh).items()}
    assert all(growth < MEMORY_SLACK for growth in grown.values()), grown


@pytest.mark.usefixtures("idle")
def test_a_thousand_connections_share_the_tunnels_to_one_peer(way, mesh):
    """They are closed by the client first, without waiting: the kernel alone is left to take in the other end."""
    pair, before = way("client", "far", 4), inventory(mesh)
    with pair.listening([["echo"]]) as listener:
        found = pair.client.order("crowd", host=pair.host, port=listener.port, count=1000, rounds=2)
    assert (found["opened"], found["errors"]) == (1000, {})
    tunnels = mesh.metric("node1", "undermesh_ztunnel_outbound_tunnels")
    assert 10 <= tunnels <= 60, "a hundred connections on each"
    eventually(lambda: more(before, inventory(mesh)), lambda found: not found, 10.0)


@pytest.mark.usefixtures("idle")
def test_readers_that_stop_stop_no_one_else(way, mesh):
    """All to one peer, so by the same tunnels; what they are owed waits at the sender, but for a window of each."""
    reading = [["text", "?"], ["gate", "never"]]
    pair = way("client", "far", 4)
    before = memory_of(mesh)
    with pair.listening([["recv", 1], ["send", 64 << 20, 3]]) as listener:
        clients = [pair.connect(listener, reading) for _ in range(STOPPED)]
        eventually(lambda: sum(one["sent"] > 0 for one in listener.peek()), lambda sent: sent == STOPPED, 30.0)
        for _ in range(5):
            began = time.monotonic()
            assert_works(way("client", "far", 4))
            assert time.monotonic() - began < 2.0
        grown = {part: now - before[part] for part, now in memory_of(mesh).items()}
        # 2 MiB of window, half of that to be sent, and the copies under way: per connection.
        assert all(growth < (STOPPED * 6 << 20) + MEMORY_SLACK for growth in grown.values()), grown
        for client in clients:
            client.open_gate("never")


@pytest.mark.usefixtures("idle")
def test_late_closers_leave_nothing_behind(way, mesh):
    """The server has closed; the client does so seconds later, as clients with a pool do."""
    before = inventory(mesh)
    for server in ("far", "near"):
        pair = way("client", server, 6)
        with pair.listening([["recv", 1], ["text", "bye"], ["close"]]) as listener:
            late = [["text", "?"], ["recv_all"], ["gate", "late"], ["close"]]
            clients = [pair.connect(listener, late) for _ in range(100)]
            for client in clients:
                eventually(client.peek, lambda found: found["ended"] or found["error"], 10.0)
            time.sleep(0.5)
            for client in clients:
                client.open_gate("late")
            assert_clean(*(client.result() for client in clients))
    eventually(lambda: more(before, inventory(mesh)), lambda found: not found, 15.0)


def test_connections_that_were_idle_still_work(idle):
    since, clients = idle
    time.sleep(max(0.0, since + IDLE - time.monotonic()))
    for client in clients:
        client.open_gate("wake")
    reports = [client.result() for client in clients]
    assert_clean(*reports)
    assert [report["received"] for report in reports] == [2] * len(clients)


def inventory(mesh: MeshView) -> Counter[str]:
    """What connections may leave: FDs of the parts, entries of the map, and sockets of the pods, by state."""
    found: Counter[str] = Counter()
    for node in mesh.cluster.nodes:
        found[f"captured on {node}"] = mesh.map_size(node, "captured")
        for kind in ("agent", "ztunnel"):
            found[f"files of {kind} on {node}"] = len(mesh.descriptors(kind, node))
    for pod in PODS:
        for state in netns.call(mesh.cluster.netns(pod), tcp_states):
            if state not in (TCP_LISTEN, TCP_TIME_WAIT):
                found[f"sockets of {pod} in state {state}"] += 1
    return found


def tcp_states() -> list[str]:
    """Of every TCP socket of the calling thread's netns; FIN_WAIT2 sockets are the kernel's to end."""
    files = [Path("/proc/thread-self/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    return [state for lines in files for line in lines if (state := line.split()[3]) != "05"]


def more(before: Counter[str], now: Counter[str]) -> dict[str, str]:
    return {kind: f"{before[kind]} -> {count}" for kind, count in now.items() if count > before[kind] + SPARE}


def memory_of(mesh: MeshView) -> dict[str, int]:
    """Resident bytes of each part."""
    return {
        f"{kind} on {node}": int(Path(f"/proc/{mesh.child(kind, node)}/statm").read_text().split()[1]) * page
        for page in (os.sysconf("SC_PAGE_SIZE"),)
        for kind in ("agent", "ztunnel")
        for node in mesh.cluster.nodes
    }
