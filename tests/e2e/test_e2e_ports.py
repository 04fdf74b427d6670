"""Source ports that run out: an error at once for the app, with its reason in log and metrics, and nobody hangs.

A pod's range of ephemeral ports is made small, so that tens of connections do what tens of thousands do otherwise.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
from e2e_mesh import logged
from e2e_pods import assert_works, eventually

from undermesh.lab import netns

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
RANGE = "net/ipv4/ip_local_port_range"
FLAG = "NO_SOURCE_PORT"
SOON = 1.0


@pytest.fixture
def port_range(cluster):
    """port_range(pod, low, high): a pod's ephemeral ports, as they were again afterwards."""
    with contextlib.ExitStack() as stack:

        def change(pod, low, high):
            name = cluster.netns(pod)
            before = netns.read_sysctl(name, RANGE)
            netns.set_sysctls(name, {RANGE: f"{low} {high}"})
            stack.callback(netns.set_sysctls, name, {RANGE: before})

        yield change


def held(client, host, port, count, **options):
    """So many open connections, each of which got an answer."""
    steps = [["text", "?"], ["recv", 1], ["gate", "leave"], ["reset"]]
    opened = [
        client.connect(host, port, steps, **{name: value(index) for name, value in options.items()})
        for index in range(count)
    ]
    for one in opened:
        found = eventually(one.peek, lambda report: report["received"] == 1 or not report["running"], 5.0)
        assert found["running"], found
    return opened


def failed(mesh, node):
    return mesh.metric(node, "istio_tcp_connections_failed_total", response_flags=FLAG)


ASKING = [["text", "?"], ["recv", 1]]
ANSWERING = [["recv", 1], ["text", "!"], ["recv_all"]]
FEW = (1024, 65_519)
"""An ephemeral range that leaves 16 ports to ztunnel."""


def wait_few(client, host, listener):
    """Wait until ztunnel has heard of FEW; what has ended is in TIME_WAIT and stands in nobody's way."""
    eventually(
        lambda: client.connect(host, listener.port, ASKING).result() and listener.peek()[-1]["peer"][1],
        lambda found: found > FEW[1],
        15.0,
    )


@every_family
def test_a_pod_out_of_ports_towards_a_plain_destination_gets_an_error_at_once(mesh, pods, port_range, family):
    client, server = pods["other"], pods["outside2"]
    host = server.address(family)
    port_range("other", *FEW)
    with server.listening(ANSWERING) as listener, mesh.log("node1") as log:
        wait_few(client, host, listener)
        before = failed(mesh, "node1")
        opened = held(client, host, listener.port, 16)
        report = client.connect(host, listener.port, ASKING).result()
        assert report["error"] == "ECONNRESET", report
        assert report["failed_at"] - report["began"] < SOON
        (entry,) = logged(log, direction="outbound", response_flags=FLAG)
        assert "no source port is free" in entry["error"] and host in entry["error"], entry
        assert failed(mesh, "node1") == before + 1
        # Another destination has its own ports, and one that is given back serves again.
        with pods["outside1"].listening(ANSWERING) as another:
            assert client.connect(pods["outside1"].address(family), another.port, ASKING).result()["error"] is None
        opened[0].open_gate("leave")
        again = functools.partial(client.connect, host, listener.port, ASKING)
        eventually(lambda: again().result(), lambda found: found["error"] is None, 2.0)
        for one in opened[1:]:
            one.open_gate("leave")


@every_family
def test_what_ztunnel_dials_takes_no_port_of_the_apps_own(pods, port_range, family):
    """10 ports are enough for 10 connections, to a plain destination too."""
    client, server = pods["other"], pods["outside2"]
    port_range("other", 40_000, 40_009)
    with server.listening(ANSWERING) as listener:
        for one in held(client, server.address(family), listener.port, 10):
            one.open_gate("leave")


@every_family
def test_an_app_out_of_ports_of_its_own_is_told_so_as_without_the_mesh(pods, port_range, family):
    outcomes = {}
    for name in ("other", "outside1"):
        port_range(name, 40_000, 40_009)
        client, server = pods[name], pods["far"]
        with server.listening(ANSWERING) as listener:
            opened = held(client, server.address(family), listener.port, 10)
            report = client.connect(server.address(family), listener.port, [["recv_all"]]).result()
            for one in opened:
                one.open_gate("leave")
        assert report["failed_at"] - report["began"] < SOON
        outcomes[name] = report["error"]
    assert outcomes == dict.fromkeys(outcomes, "EADDRNOTAVAIL")


@every_family
def test_a_destination_out_of_ports_for_a_client_refuses_at_once_and_says_so_on_both_nodes(
    steady, way, pods, port_range, family
):
    """Deliveries take the client's address and a port outside of the destination's range: 16 are left of them."""
    client, server = pods["client"], pods["second"]
    host, before = server.address(family), failed(steady, "node2")
    port_range("second", *FEW)
    with (
        server.listening(ANSWERING) as listener,
        steady.log("node1") as log1,
        steady.log("node2") as log2,
    ):
        wait_few(client, host, listener)
        opened = held(client, host, listener.port, 16)
        report = client.connect(host, listener.port, ASKING).result()
        assert report["error"] == "ECONNRESET", report
        assert report["failed_at"] - report["began"] < SOON
        server_side = logged(log2, direction="inbound", response_flags=FLAG)
        assert str(client.address(family)) in server_side[0]["error"], server_side
        client_side = logged(log1, direction="outbound", response_flags="CONNECT")
        assert "no source port is free" in client_side[0]["error"], client_side
        assert failed(steady, "node2") >= before + 1
        assert_works(way("other", "second", family))
        for one in opened:
            one.open_gate("leave")
