"""The tunnel port towards foreign and hostile peers: what reference tables say, and nobody else suffers.

The client is Python's ssl and the h2 package, in the netns of a pod that is not enrolled.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import socket
import ssl
import struct

import pytest
from e2e_hbone import PORT, Dialler, Refused
from e2e_pki import HOUR, Authority
from e2e_pods import assert_works, eventually

from undermesh.lab import netns

CLIENT = "spiffe://cluster.local/ns/mesh/sa/client"
DAY = dt.timedelta(days=1)

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


def authority_of(address, port):
    """host:port as in :authority."""
    return f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"


@pytest.fixture
def ca(cluster, mesh, tmp_path):
    return Authority.of_cluster(cluster.run_dir / "state/controlplane/undermesh-ca", tmp_path)


@pytest.fixture
def foreign(tmp_path):
    return Authority.foreign(tmp_path)


@pytest.fixture
def dialler(cluster, mesh):
    return Dialler(lambda connect: netns.call(cluster.netns("outside1"), connect), cluster.run_dir / "state/root.pem")


@pytest.fixture
def still_serving(way, pods, dialler, ca):
    """After the test, others are served as if nothing had been."""
    yield
    assert_works(way("client", "far", 4))
    with pods["far"].listening([["echo"]]) as server, dialler.tunnel(pods["far"].address(4), ca.leaf(CLIENT)) as tunnel:
        status, _ = tunnel.connect(authority_of(pods["far"].address(4), server.port))
        assert status == 200


# === who gets in ===

BAD_CREDENTIALS = {
    "none": lambda ca, foreign: None,
    "of another CA": lambda ca, foreign: foreign.leaf(CLIENT),
    "self-signed": lambda ca, foreign: foreign.itself(),
    "of another trust domain": lambda ca, foreign: ca.leaf("spiffe://evil.example/ns/mesh/sa/client"),
    "expired": lambda ca, foreign: ca.leaf(CLIENT, begins=-2 * DAY, ends=-HOUR),
    "not yet valid": lambda ca, foreign: ca.leaf(CLIENT, begins=HOUR, ends=DAY),
    "without an identity": lambda ca, foreign: ca.leaf(dns=["client.mesh.svc"]),
    "with an identity of another shape": lambda ca, foreign: ca.leaf("spiffe://cluster.local/mesh/client"),
    "with an identity of empty parts": lambda ca, foreign: ca.leaf("spiffe://cluster.local/ns//sa/"),
    "with two identities": lambda ca, foreign: ca.leaf(CLIENT, "spiffe://cluster.local/ns/mesh/sa/other"),
}


@every_family
@pytest.mark.parametrize("credentials", BAD_CREDENTIALS.values(), ids=BAD_CREDENTIALS)
def test_a_peer_with_a_bad_certificate_is_refused(pods, dialler, ca, foreign, still_serving, credentials, family):
    address = pods["far"].address(family)
    with pods["far"].listening([["text", "secret"]]) as server:
        with pytest.raises(Refused), dialler.tunnel(address, credentials(ca, foreign)) as tunnel:
            status, _ = tunnel.connect(authority_of(address, server.port))
            pytest.fail(f"answered with status {status}")
        assert not server.peek(), "the app was reached"


def test_a_refused_certificate_is_counted_and_logged(mesh, pods, dialler, foreign):
    flag = {"response_flags": "TLS_FAILURE"}
    before = mesh.metric("node2", "istio_tcp_connections_failed_total", **flag)
    with pytest.raises(Refused), dialler.tunnel(pods["far"].address(4), foreign.leaf(CLIENT)) as tunnel:
        tunnel.connect(authority_of(pods["far"].address(4), 8080))
    eventually(lambda: mesh.metric("node2", "istio_tcp_connections_failed_total", **flag), lambda n: n > before, 3)


@pytest.mark.parametrize(
    "options", [{"version": ssl.TLSVersion.TLSv1_2}, {"alpn": ("http/1.1",)}], ids=["TLS 1.2", "ALPN http/1.1"]
)
def test_another_protocol_is_refused_in_the_handshake(pods, dialler, ca, still_serving, options):
    with pytest.raises(Refused), dialler.tls(pods["far"].address(4), ca.leaf(CLIENT), **options):
        pytest.fail("the handshake succeeded")


@every_family
def test_the_server_proves_its_own_identity_with_h2_and_tls_1_3(pods, dialler, ca, family):
    with dialler.tls(pods["far"].address(family), ca.leaf(CLIENT)) as connection:
        names = dict(connection.getpeercert()["subjectAltName"])
        assert names == {"URI": pods["far"].identity}
        assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "h2")


def test_a_certificate_that_the_control_plane_issued_gets_in(cluster, pods, dialler):
    """The one that node1's agent holds for the account of `client`."""
    name = hashlib.sha256(pods["client"].identity.encode()).hexdigest()[:40]
    issued = cluster.nodes["node1"].run_dir / "certificates" / f"{name}.pem"
    address = pods["far"].address(4)
    with pods["far"].listening([["echo"]]) as server, dialler.tunnel(address, issued) as tunnel:
        status, _ = tunnel.connect(authority_of(address, server.port))
        assert status == 200


# === what is answered ===


@every_family
def test_a_good_peer_gets_200_and_its_bytes_flow(pods, dialler, ca, family):
    address = pods["far"].address(family)
    with (
        pods["far"].listening([["echo"]]) as server,
        dialler.tunnel(address, ca.leaf(CLIENT)) as tunnel,
    ):
        status, stream = tunnel.connect(authority_of(address, server.port))
        assert status == 200
        tunnel.send(stream, b"there and back")
        assert tunnel.receive(stream, 14) == b"there and back"
        # END_STREAM is the half-close: the echo sees it, ends its own side, and nothing is lost.
        tunnel.send(stream, b"last words", end=True)
        assert tunnel.receive(stream, 10) == b"last words"
        tunnel.wait_ended(stream)
        seen = server.result()
    assert seen["ended"] and seen["error"] is None
    assert seen["peer"][0] == pods["outside1"].address(family)


REQUESTS = {
    "the address of another pod of the node": ("CONNECT", lambda far, second: authority_of(second, 8080), 400),
    "the address of no pod": ("CONNECT", lambda far, second: "192.0.2.1:8080", 400),
    "localhost": ("CONNECT", lambda far, second: "127.0.0.1:8080", 400),
    "no port": ("CONNECT", lambda far, second: authority_of(far, "").rstrip(":"), 400),
    "a port that is none": ("CONNECT", lambda far, second: f"{far}:99999", 400),
    "port zero": ("CONNECT", lambda far, second: authority_of(far, 0), 400),
    "nonsense": ("CONNECT", lambda far, second: "%%%", 400),
    "nothing": ("CONNECT", lambda far, second: "", 400),
    "GET": ("GET", lambda far, second: authority_of(far, 8080), 400),
    "POST": ("POST", lambda far, second: authority_of(far, 8080), 400),
    "a port on which nobody listens": ("CONNECT", lambda far, second: authority_of(far, 18400), 503),
}


@every_family
@pytest.mark.parametrize(("method", "authority", "expected"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_for_what_is_not_here_is_answered_so(
    pods, dialler, ca, still_serving, method, authority, expected, family
):
    far, second = pods["far"].address(family), pods["second"].address(family)
    with (
        pods["second"].listening([["text", "secret"]], 8080) as other,
        pods["far"].listening([["text", "secret"]], 8080) as server,
        dialler.tunnel(far, ca.leaf(CLIENT)) as tunnel,
    ):
        stream = tunnel.open(authority(far, second), method)
        try:
            status = tunnel.status(stream)
        except Refused:
            # An authority that is none may be a malformed request (RFC 9113 8.1.1): the stream is reset then.
            assert authority(far, second) in ("%%%", "", f"{far}:99999"), "the request was well-formed"
        else:
            assert status == expected
        assert not other.peek() and not server.peek(), "an app was reached"
        # The tunnel itself is none the worse.
        status, _ = tunnel.connect(authority_of(far, 8080))
        assert status == 200


@every_family
def test_a_denied_peer_gets_401_and_others_their_200(mesh, pods, dialler, ca, family):
    far = pods["far"].address(family)
    deny = {"action": "DENY", "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/client"]}}]}]}
    flag = {"response_flags": "DENY"}
    before = mesh.metric("node2", "istio_tcp_connections_failed_total", **flag)
    with (
        mesh.policy("deny-client", deny),
        pods["far"].listening([["text", "secret"]], 8080) as server,
        dialler.tunnel(far, ca.leaf(CLIENT)) as denied,
        dialler.tunnel(far, ca.leaf("spiffe://cluster.local/ns/mesh/sa/other")) as allowed,
    ):
        assert denied.connect(authority_of(far, 8080))[0] == 401
        assert not server.peek()
        assert allowed.connect(authority_of(far, 8080))[0] == 200
    eventually(lambda: mesh.metric("node2", "istio_tcp_connections_failed_total", **flag), lambda n: n > before, 3)


# === how streams end ===


@pytest.fixture
def stream(pods, dialler, ca):
    """(tunnel, stream, server): an open stream to an app that goes through given steps."""

    def make(steps, use):
        far = pods["far"].address(4)
        with pods["far"].listening(steps) as server, dialler.tunnel(far, ca.leaf(CLIENT)) as tunnel:
            status, opened = tunnel.connect(authority_of(far, server.port))
            assert status == 200
            return use(tunnel, opened, server)

    return make


def test_a_reset_stream_is_a_reset_for_the_app(stream):
    def use(tunnel, opened, server):
        tunnel.send(opened, b"half of")
        eventually(server.peek, lambda found: bool(found) and found[0]["received"] == 7, 2)
        tunnel.reset(opened)
        return server.result(2)

    seen = stream([["recv_all"]], use)
    assert seen["error"] == "ECONNRESET" and not seen["ended"], seen


def test_a_tunnel_that_breaks_is_a_reset_for_the_app(stream):
    def use(tunnel, opened, server):
        tunnel.send(opened, b"half of")
        eventually(server.peek, lambda found: bool(found) and found[0]["received"] == 7, 2)
        tunnel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tunnel.socket.close()
        return server.result(2)

    seen = stream([["recv_all"]], use)
    assert seen["error"] == "ECONNRESET" and not seen["ended"], seen


def test_a_tunnel_that_is_closed_without_end_of_stream_is_a_reset_for_the_app(stream):
    """A FIN of TCP, and even TLS's close_notify, are no END_STREAM."""

    def use(tunnel, opened, server):
        tunnel.send(opened, b"half of")
        eventually(server.peek, lambda found: bool(found) and found[0]["received"] == 7, 2)
        tunnel.socket.unwrap().close()
        return server.result(2)

    seen = stream([["recv_all"]], use)
    assert seen["error"] == "ECONNRESET" and not seen["ended"], seen


def test_a_reset_by_the_app_resets_the_stream(stream):
    def use(tunnel, opened, server):
        with pytest.raises(Refused, match="stream reset"):
            tunnel.receive(opened, 1 << 30)

    stream([["text", "half of"], ["sleep", 0.1], ["reset"]], use)


def test_an_end_by_the_app_ends_the_stream(stream):
    def use(tunnel, opened, server):
        assert tunnel.receive(opened, 100) == b"all of it"

    stream([["text", "all of it"], ["end"], ["recv_all"]], use)


def test_streams_of_one_tunnel_do_not_hinder_each_other(pods, dialler, ca):
    """One app that does not read its stream, and 50 that do."""
    far = pods["far"].address(4)
    with (
        pods["far"].listening([["echo"]]) as echo,
        pods["far"].listening([["gate", "never"]]) as deaf,
        dialler.tunnel(far, ca.leaf(CLIENT)) as tunnel,
    ):
        _, stuck = tunnel.connect(authority_of(far, deaf.port))
        window = min(tunnel.h2.local_flow_control_window(stuck), 1 << 20)
        for start in range(0, window, 16384):
            tunnel.send(stuck, bytes(min(16384, window - start)))
        streams = [tunnel.connect(authority_of(far, echo.port)) for _ in range(50)]
        for number, (status, opened) in enumerate(streams):
            assert status == 200
            tunnel.send(opened, f"{number:04d}".encode())
        for number, (_, opened) in enumerate(streams):
            assert tunnel.receive(opened, 4) == f"{number:04d}".encode()
        deaf.open_gate("never")


# === hostile bytes ===

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def frame(kind, flags, stream, payload):
    """A frame of HTTP/2 (RFC 9113 4.1)."""
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


HOSTILE = {
    "no preface": b"\0" * 200,
    "HTTP/1.1": b"CONNECT 10.1.2.20:8080 HTTP/1.1\r\nHost: 10.1.2.20:8080\r\n\r\n",
    "a frame longer than allowed": PREFACE + SETTINGS + b"\xff\xff\xff\x00\0\0\0\0\x01" + bytes(1 << 16),
    "SETTINGS of a wrong length": PREFACE + frame(4, 0, 0, b"12345"),
    "SETTINGS on a stream": PREFACE + frame(4, 0, 1, b""),
    "HEADERS on stream 0": PREFACE + SETTINGS + frame(1, 5, 0, b"\x82"),
    "HEADERS that are no HPACK": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff" * 100),
    "HEADERS without an end": PREFACE + SETTINGS + frame(1, 0, 1, b"\x82") + frame(6, 0, 0, b"12345678"),
    "DATA before HEADERS": PREFACE + SETTINGS + frame(0, 0, 1, b"data"),
    "PUSH_PROMISE from a client": PREFACE + SETTINGS + frame(5, 4, 1, b"\0\0\0\x02\x82"),
    "a window that overflows": PREFACE + SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
    "an even stream": PREFACE + SETTINGS + frame(1, 5, 2, b"\x82"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_peer_that_breaks_the_protocol_is_cut_off(pods, dialler, ca, still_serving, data):
    with dialler.tls(pods["far"].address(4), ca.leaf(CLIENT)) as connection:
        try:
            connection.sendall(data)
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            pytest.fail("the connection stays open")
        except OSError:
            pass


@pytest.mark.parametrize("size", [100_000, 1_000_000], ids=["100 kB", "1 MB"])
def test_headers_that_are_too_long_are_refused(pods, dialler, ca, still_serving, size):
    far = pods["far"].address(4)
    with pods["far"].listening([["echo"]]) as server:
        with dialler.tunnel(far, ca.leaf(CLIENT)) as tunnel:
            try:
                stream = tunnel.open(authority_of(far, server.port), extra=[("baggage", "x" * 1000)] * (size // 1000))
                status = tunnel.status(stream)
            except Refused:
                pass
            else:
                assert status in (400, 431)
        assert not server.peek()


def test_a_thousand_streams_reset_at_once_do_no_harm(pods, dialler, ca, still_serving):
    """HTTP/2 rapid reset (CVE-2023-44487): cutting the peer off is an answer too."""
    far = pods["far"].address(4)
    with pods["far"].listening([["echo"]]) as server, dialler.tunnel(far, ca.leaf(CLIENT)) as tunnel:
        try:
            for _ in range(1000):
                tunnel.reset(tunnel.open(authority_of(far, server.port)))
        except Refused:
            return


def test_bytes_that_are_no_tls_reach_no_app(pods, dialler, still_serving):
    with pods["far"].listening([["text", "secret"]], 8080) as server:
        with dialler.tcp(pods["far"].address(4)) as connection:
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = connection.recv(1000)
            except ConnectionResetError:
                answer = b""
        assert b"secret" not in answer and b"HTTP/1" not in answer
        assert not server.peek()


def test_silent_connections_to_the_tunnel_port_keep_nobody_else_out(pods, dialler, still_serving, way):
    with contextlib.ExitStack() as connections:
        for _ in range(50):
            connections.enter_context(dialler.tcp(pods["far"].address(4)))
        assert_works(way("client", "far", 4))


def test_the_tunnel_port_of_an_un_enrolled_pod_is_its_own(pods, dialler):
    with pods["outside2"].listening([["text", "mine"]], PORT), dialler.tcp(pods["outside2"].address(4)) as connection:
        assert connection.recv(10) == b"mine"
