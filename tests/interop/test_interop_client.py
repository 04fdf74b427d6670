"""Envoy opens the tunnels, as a waypoint or gateway does: what ztunnel answers, and what ends what."""

from __future__ import annotations

import contextlib

import pytest
from e2e_mesh import logged
from e2e_pki import Authority
from e2e_pods import eventually
from interop_config import Credentials, Target, Tunnel, client
from interop_proxy import Proxy
from interop_ways import FAMILIES, authority, to_far

APP = 8080
CROWD_PORT, FLAP_PORT = 15961, 15962
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@pytest.fixture(scope="module")
def envoy(pods, ca, roots, envoy_client, tmp_path_factory):
    far = to_far(ca, roots, pods)
    address = pods["far"].address(4)
    caller = pods["client"].identity
    strangers = Authority.foreign(tmp_path_factory.mktemp("foreign"))

    def target(certificate, exact=pods["far"].identity):
        return Target(address, Credentials(roots, certificate, exact=exact))

    targets = {
        "v4": Target(address, far),
        "v6": Target(pods["far"].address(6), far),
        "another server expected": target(ca.leaf(caller), exact=pods["flap"].identity),
        "foreign trust domain": target(ca.leaf("spiffe://other.example/ns/mesh/sa/client")),
        "foreign CA": target(strangers.leaf(caller)),
        "no certificate": target(None),
        "plaintext": Target(address, None),
        "crowd": Target(address, far),
        "impatient": Target(address, far, common={"idle_timeout": "0.5s"}),
        "flap": Target(pods["flap"].address(4), to_far(ca, roots, pods, "flap")),
    }
    tunnels = {
        CROWD_PORT: Tunnel(authority(address, APP), "crowd"),
        FLAP_PORT: Tunnel(authority(pods["flap"].address(4), APP), "flap"),
    }
    config = client(targets, tunnels, far, envoy_client.access_log)
    with envoy_client.running(config), pods["far"].listening([["echo"]], APP) as server:
        envoy_client.server = server
        yield envoy_client


@pytest.fixture(scope="module")
def proxy(interop, envoy):
    return Proxy(interop, "envoy")


def accepted(envoy):
    """How many connections have reached the app."""
    return len(envoy.server.peek())


# === what is answered ===

REQUESTS = {
    "the app": (lambda far, flap: authority(far, APP), 200),
    "a port on which nobody listens": (lambda far, flap: authority(far, 18400), 503),
    "the tunnel's own port": (lambda far, flap: authority(far, 15008), 400),
    "another pod of the node": (lambda far, flap: authority(flap, APP), 400),
    "an address of no pod": (lambda far, flap: "192.0.2.1:8080", 400),
    "localhost": (lambda far, flap: "127.0.0.1:8080", 400),
    "a name of no service": (lambda far, flap: "nobody.mesh.svc.cluster.local:80", 400),
}


@every_family
@pytest.mark.parametrize(("where", "expected"), REQUESTS.values(), ids=REQUESTS)
def test_the_status_says_what_became_of_the_request(envoy, proxy, pods, where, expected, family):
    far, flap = (pods[name].address(family) for name in ("far", "flap"))
    before = accepted(envoy)
    assert proxy.status(where(far, flap), f"v{family}") == expected
    assert accepted(envoy) == before + (expected == 200)


@every_family
def test_policy_denies_with_401(envoy, proxy, pods, mesh, family):
    far = authority(pods["far"].address(family), APP)
    deny = {"action": "DENY", "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/client"]}}]}]}
    before = accepted(envoy)
    with mesh.policy("deny-envoy", deny), mesh.log("node2") as log:
        assert proxy.status(far, f"v{family}") == 401
        (entry,) = logged(log, response_flags="DENY")
        assert entry["src.identity"] == pods["client"].identity
    assert accepted(envoy) == before
    assert proxy.status(far, f"v{family}") == 200


# target: Envoy's reason, and ztunnel's (None: it was not refused there).
TLS_REFUSALS = {
    "another server expected": ("SAN", None),
    "foreign trust domain": ("", "trust domain"),
    "foreign CA": ("", "UnknownIssuer"),
    "no certificate": ("", "no certificate"),
    "plaintext": (None, "TLS handshake"),
}


@pytest.mark.parametrize(("theirs", "ours"), TLS_REFUSALS.values(), ids=TLS_REFUSALS)
def test_a_tunnel_without_both_certificates_is_none(envoy, proxy, pods, mesh, request, theirs, ours):
    before = accepted(envoy)
    target = request.node.callspec.id
    with mesh.log("node2") as log:
        assert proxy.status(authority(pods["far"].address(4), APP), target) == 503
        if ours is not None:
            entry = logged(log, response_flags="TLS_FAILURE")[0]
            assert ours in entry["error"], entry
    assert accepted(envoy) == before


HEADERS = {"1 kB": (1, 200), "16 kB": (16, 200), "60 kB": (60, 200), "100 kB": (100, 431)}


@pytest.mark.parametrize(("size", "expected"), HEADERS.values(), ids=HEADERS)
def test_large_headers_pass_or_are_refused_and_harm_nobody(envoy, proxy, pods, size, expected):
    far = authority(pods["far"].address(4), APP)
    with proxy.connect(far, "v4") as other:
        assert proxy.status(far, "v4", {"baggage": "k=" + "x" * (size * 1000)}) == expected
        assert other.exchange(b"still here") == b"still here"


# === many, and for long ===


def test_500_streams_share_few_tunnels(envoy, pods, mesh):
    report = pods["envoy"].order("crowd", host="127.0.0.1", port=CROWD_PORT, count=500, rounds=2)
    assert report["opened"] == 500 and report["errors"] == {}, report
    made = envoy.stats("cluster.crowd.")["upstream_cx_total"]
    assert made <= 4, "Envoy has two workers, which share nothing"


def test_a_tunnel_that_envoy_closes_for_idleness_is_made_again(envoy, proxy, pods):
    far = authority(pods["far"].address(4), APP)
    for made in (1, 2):
        assert proxy.status(far, "impatient") == 200
        eventually(lambda: envoy.stats("cluster.impatient."), lambda found: found["upstream_cx_active"] == 0, 5)
        assert envoy.stats("cluster.impatient.")["upstream_cx_total"] == made


def test_streams_outlive_the_goaway_of_a_pod_that_leaves_the_mesh(envoy, interop, pods, mesh):
    """And when it is back, new streams get a new tunnel beside the old one."""
    connect = lambda: pods["envoy"].connect("127.0.0.1", FLAP_PORT, [["ping", 0.05]])  # noqa: E731
    with pods["flap"].listening([["echo"]], APP), contextlib.ExitStack() as stack:
        old = connect()
        stack.callback(old.stop)
        eventually(old.peek, lambda report: report["exchanges"] > 2, 5)
        interop.label_namespace("flap", {"undermesh.io/mesh": None})
        eventually(lambda: envoy.stats("cluster.flap."), lambda found: found.get("upstream_cx_close_notify") == 1, 10)
        interop.label_namespace("flap", {"undermesh.io/mesh": "enabled"})
        flap = interop.manifest.pod("flap")
        interop.agents.wait_pods({flap.uid: flap.name}, "enrolled", 15)
        exchanges = old.peek()["exchanges"]
        new = connect()
        stack.callback(new.stop)
        eventually(new.peek, lambda report: report["exchanges"] > 2, 5)
        eventually(old.peek, lambda report: report["exchanges"] > exchanges, 5)
        assert envoy.stats("cluster.flap.")["upstream_cx_total"] == 2
        for report in (old.stop(), new.stop()):
            assert report["error"] is None, report


def test_an_envoy_that_dies_is_a_reset_for_the_app(envoy, pods):
    before = accepted(envoy)
    client = pods["envoy"].connect("127.0.0.1", CROWD_PORT, [["text", "half of"], ["gate", "never"]])
    eventually(lambda: envoy.server.peek()[before:], lambda new: bool(new) and new[0]["received"] == 7, 5)
    envoy.stop()
    (last,) = eventually(lambda: envoy.server.peek()[before:], lambda new: not new[0]["running"], 5)
    assert last["error"] == "ECONNRESET" and not last["ended"], last
    client.open_gate("never")
