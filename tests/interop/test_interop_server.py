"""Envoy ends the tunnels, as a waypoint does: what it learns of the caller, and how its refusals reach the app."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import pytest
from e2e_mesh import logged
from e2e_pki import Authority
from e2e_pods import assert_clean, eventually
from interop_config import FAULTS, Credentials, server
from interop_envoy import entries
from interop_ways import FAMILIES, TRUST, authority

RESETS = {"ECONNRESET"}
APP = 8080
LONG = float(os.environ.get("UNDERMESH_INTEROP_IDLE", "3")) >= 30
CX = "http.connect_terminate.downstream_cx_total"
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@pytest.fixture(scope="module")
def app(pods):
    with pods["peer"].listening([["echo"]], APP) as listener:
        yield listener


@pytest.fixture(scope="module")
def standard(pods, envoy_server, server_credentials):
    """The Envoy with its usual settings; a test that stops it starts another."""

    def start():
        envoy_server.start(server(server_credentials, envoy_server.access_log))
        return envoy_server

    yield start
    envoy_server.stop()


@pytest.fixture
def serving(standard, envoy_server):
    if not envoy_server.is_running:
        standard()
    return envoy_server


@pytest.fixture
def other(envoy_server, server_credentials):
    """Runs an Envoy with other settings."""

    @contextlib.contextmanager
    def run(credentials=server_credentials, **settings):
        envoy_server.stop()
        with envoy_server.running(server(credentials, envoy_server.access_log, **settings)):
            yield envoy_server

    return run


def works(pods, family=4, count=1000):
    steps = [["send", count, 1], ["end"], ["recv_all"]]
    report = pods["client"].connect(pods["peer"].address(family), APP, steps).result()
    assert_clean(report)
    assert report["received_sha256"] == report["sent_sha256"]


# === what it learns ===


@every_family
def test_envoy_sees_who_calls_and_for_whom(serving, app, pods, mesh, family):
    with serving.log() as theirs, mesh.log("node1") as ours:
        works(pods, family)
        (seen,) = entries(theirs)
        (said,) = logged(ours)
    assert seen["peer"] == pods["client"].identity
    assert seen["authority"] == authority(pods["peer"].address(family), APP)
    assert seen["forwarded"] == f'for="{said["src.addr"]}"'
    assert seen["traceparent"].split("-")[1] == said["conn_id"]
    baggage = dict(pair.split("=") for pair in seen["baggage"].split(","))
    assert {"k8s.namespace.name": "mesh", "service.name": "client"}.items() <= baggage.items()
    assert said["dst.identity"] == pods["peer"].identity


# === what it refuses ===

# The routes are interop_config.FAULTS, by port; the reason is in ztunnel's log.
REFUSALS = {
    "by policy": (18403, "http status: 403 Forbidden: RBAC: access denied"),
    "for want of a route": (18404, "http status: 404 Not Found"),
    "for want of an endpoint": (18503, "http status: 503 Service Unavailable: no healthy upstream"),
    "as nobody listens": (18999, "http status: 503 Service Unavailable: upstream connect error"),
}


@pytest.mark.parametrize(("port", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_envoy_refuses_is_a_reset_with_its_reason(serving, pods, mesh, port, reason):
    with mesh.log("node1") as log:
        report = pods["client"].connect(pods["peer"].address(4), port, [["text", "x"], ["recv_all"]]).result(5)
        assert report["error"] in RESETS and report["received"] == 0, report
        (entry,) = logged(log, response_flags="CONNECT")
        assert reason in entry["error"]


CUTS = {"an idle stream": 18408, "an old stream": 18409}


@pytest.mark.parametrize("port", CUTS.values(), ids=CUTS)
def test_a_stream_that_envoy_cuts_is_a_reset(serving, pods, mesh, port):
    with mesh.log("node1") as log, pods["peer"].listening([["text", "half of"], ["recv_all"]], port):
        report = pods["client"].connect(pods["peer"].address(4), port, [["recv_all"]]).result(5)
        assert report["error"] in RESETS and report["head"] == "half of" and not report["ended"], report
        (entry,) = logged(log)
        assert entry["error"].startswith("destination: "), entry


@pytest.mark.parametrize("port", [18510, 18560], ids=["10 kB", "60 kB"])
def test_answers_with_large_headers_are_taken(serving, pods, port):
    assert FAULTS[port]["response_headers_to_add"]
    with pods["peer"].listening([["echo"]], port):
        report = pods["client"].connect(pods["peer"].address(4), port, [["text", "x"], ["end"], ["recv_all"]]).result(5)
    assert_clean(report)
    assert report["head"] == "x"


BAD_CREDENTIALS = {
    "of another account": (lambda ca, foreign, pods: ca.leaf(pods["far"].identity), "expected"),
    "of another trust domain": (
        lambda ca, foreign, pods: ca.leaf("spiffe://other.example/ns/mesh/sa/peer"),
        "expected",
    ),
    "of another CA": (lambda ca, foreign, pods: foreign.leaf(pods["peer"].identity), "UnknownIssuer"),
}


@pytest.mark.parametrize(("certificate", "reason"), BAD_CREDENTIALS.values(), ids=BAD_CREDENTIALS)
def test_an_envoy_with_a_certificate_of_others_gets_nothing(
    other, app, pods, mesh, ca, roots, tmp_path, certificate, reason
):
    shown = certificate(ca, Authority.foreign(tmp_path), pods)
    before = len(app.peek())
    with other(Credentials(roots, shown, prefix=TRUST)), mesh.log("node1") as log:
        report = pods["client"].connect(pods["peer"].address(4), APP, [["text", "x"], ["recv_all"]]).result(5)
        assert report["error"] in RESETS and report["received"] == 0, report
        (entry,) = logged(log, response_flags="TLS_FAILURE")
        assert reason in entry["error"], entry
    assert len(app.peek()) == before


def test_an_envoy_that_trusts_others_only_takes_nothing(other, app, pods, mesh, ca, roots):
    """In TLS 1.3 the client learns that after its own handshake."""
    mine = Credentials(roots, ca.leaf(pods["peer"].identity), prefix="spiffe://other.example/")
    with other(mine), mesh.log("node1") as log:
        report = pods["client"].connect(pods["peer"].address(4), APP, [["text", "x"], ["recv_all"]]).result(5)
        assert report["error"] in RESETS and report["received"] == 0, report
        (entry,) = logged(log)
        assert "alert" in entry["error"], entry


# === its limits ===


@pytest.mark.parametrize(("limit", "count"), [(1, 12), (2, 20), (100, 250)])
def test_more_streams_than_a_tunnel_may_have_get_more_tunnels(other, app, pods, limit, count):
    """All at once, from a pod that has no tunnel to it yet."""
    address = pods["peer"].address(4)
    with other(http2={"max_concurrent_streams": limit}) as envoy:
        started = time.monotonic()
        clients = [
            pods["client"].connect(address, APP, [["text", "x"], ["recv", 1], ["gate", "all"]]) for _ in range(count)
        ]
        for one in clients:
            eventually(one.peek, lambda report: report["received"] == 1 or not report["running"], 15)
        took = time.monotonic() - started
        for one in clients:
            one.open_gate("all")
        for one in clients:
            assert_clean(one.result())
        made = envoy.stats("http.connect_terminate.")["downstream_cx_total"]
    assert made >= -(-count // limit)
    assert made <= 2 * -(-count // limit) + 8, "far more tunnels than are needed"
    assert took < 10, "streams waited for a limit that others keep used up"


def test_small_windows_slow_down_and_lose_nothing(other, app, pods):
    http2 = {"initial_stream_window_size": 65535, "initial_connection_window_size": 65535}
    with other(http2=http2):
        report = pods["client"].connect(pods["peer"].address(4), APP, [["duplex", 4 << 20, 2]]).result(20)
    assert_clean(report)
    assert report["received_sha256"] == report["sent_sha256"]


# === GOAWAY, and worse ===


@pytest.mark.skipif(not LONG, reason="takes 20 s: make soak")
def test_an_envoy_that_does_not_answer_is_given_up(serving, app, pods, mesh):
    """Its own connection to the app hangs. Other streams of the tunnel go on."""
    with mesh.log("node1") as log:
        old = pods["client"].connect(pods["peer"].address(4), APP, [["ping", 0.1]])
        report = pods["client"].connect(pods["peer"].address(4), 18504, [["recv_all"]]).result(30)
        assert report["error"] in RESETS, report
        (entry,) = logged(log, response_flags="CONNECT")
        assert "did not answer" in entry["error"], entry
        assert old.stop()["error"] is None


@pytest.mark.skipif(not LONG, reason="takes 30 s: make soak")
def test_an_envoy_that_is_stopped_is_given_up(other, app, pods, mesh):
    """No PING comes back."""
    with other() as envoy, mesh.log("node1"):
        open_ = pods["client"].connect(pods["peer"].address(4), APP, [["text", "x"], ["recv", 1], ["recv_all"]])
        eventually(open_.peek, lambda report: report["received"] == 1, 5)
        with envoy.paused():
            report = open_.result(40)
        assert report["error"] in RESETS, report


GOAWAYS = {
    "after 3 requests": {"common": {"max_requests_per_connection": 3}},
    "after a second": {"common": {"max_connection_duration": "1s"}},
}


@pytest.mark.parametrize("settings", GOAWAYS.values(), ids=GOAWAYS)
def test_streams_outlive_a_goaway_and_new_ones_get_a_new_tunnel(other, app, pods, settings):
    address = pods["peer"].address(4)
    with other(**settings) as envoy:
        old = pods["client"].connect(address, APP, [["ping", 0.02]])
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            works(pods)
            time.sleep(0.1)
        report = old.stop()
        assert report["error"] is None and report["exchanges"] > 20, report
        stats = envoy.stats("http.connect_terminate.")
        assert stats["downstream_cx_total"] >= 2, stats


def test_an_envoy_that_drains_serves_on_and_lets_old_streams_end(other, app, pods):
    address = pods["peer"].address(4)
    with other() as envoy:
        old = pods["client"].connect(address, APP, [["ping", 0.02]])
        eventually(old.peek, lambda report: report["exchanges"] > 2, 5)
        envoy.admin("/drain_listeners?graceful&skip_exit", post=True)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            works(pods)
            time.sleep(0.05)
        report = old.stop()
        assert report["error"] is None and report["exchanges"] > 20, report
        assert envoy.stats("http.connect_terminate.")["downstream_cx_total"] >= 2


ABORT = """
import socket, struct, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
done = 0
while done < count:
    try:
        connection = socket.create_connection((host, port), timeout=2)
    except TimeoutError:
        continue
    with connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(b"x")
        connection.recv(1)
        done += 1
"""
"""Its connections use the ports of earlier ones: one that hangs is not what is asked here."""


def test_apps_that_abort_their_connections_do_no_harm_to_others(serving, interop, app, pods):
    """Envoy drops a connection on which more than 1000 streams were reset: its guard against floods."""
    address = pods["peer"].address(4)
    old = pods["client"].connect(address, APP, [["ping", 0.02]])
    eventually(old.peek, lambda report: report["exchanges"] > 2, 5)
    done = interop.exec("client", [sys.executable, "-c", ABORT, address, str(APP), "1500"], timeout=60)
    assert done.returncode == 0, done.stderr
    report = old.stop()
    assert report["error"] is None, report


def test_an_envoy_that_dies_is_a_reset_and_its_successor_is_found(standard, serving, app, pods, mesh):
    with mesh.log("node1") as log:
        open_ = pods["client"].connect(pods["peer"].address(4), APP, [["text", "x"], ["recv_all"]])
        eventually(open_.peek, lambda report: report["received"] == 1, 5)
        serving.stop()
        report = open_.result(5)
        assert report["error"] in RESETS and not report["ended"], report
        logged(log, **{"dst.addr": f"{pods['peer'].address(4)}:{APP}"})
        report = pods["client"].connect(pods["peer"].address(4), APP, [["text", "x"], ["recv_all"]]).result(5)
        assert report["error"] in RESETS
        (entry,) = logged(log, response_flags="CONNECT")
        assert "refused" in entry["error"], entry
    standard()
    works(pods)
