"""A destination that cannot be had is an error for the app within a second, never a hang or a clean end."""

from __future__ import annotations

import time

import pytest
from e2e_pods import REFUSALS

SOON = 1.0
UNREACHABLE = {"EHOSTUNREACH", "ENETUNREACH", *REFUSALS}
every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
every_client = pytest.mark.parametrize("client", ["client", "outside1"], ids=["enrolled", "control"])
NOBODY = {4: "10.77.0.1", 6: "fd00:77:77::1"}


def dial(pod, host, port):
    """Connect, send a little, and wait for an answer."""
    report = pod.connect(host, port, [["text", "anyone?"], ["recv_all"]], timeout=5.0).result()
    return report, report["failed_at"] - report["began"] if report["failed_at"] else None


@every_family
@every_client
@pytest.mark.parametrize("server", ["far", "near", "outside2"])
def test_a_port_on_which_nobody_listens_is_refused_at_once(pods, client, server, family):
    report, seconds = dial(pods[client], pods[server].address(family), 18200)
    assert report["error"] in REFUSALS, report
    assert report["received"] == 0
    assert seconds < SOON


@every_family
@every_client
def test_an_unreachable_address_is_an_error_at_once(pods, client, family):
    report, seconds = dial(pods[client], NOBODY[family], 80)
    assert report["error"] in UNREACHABLE, report
    # IPv6 drops the first ICMP error, which comes while connect() holds the socket; the SYN is repeated after 1 s.
    assert seconds < (SOON if family == 4 else 1.0 + SOON)


@every_family
@every_client
def test_a_service_without_endpoints_is_an_error_at_once(pods, way, client, family):
    report, seconds = dial(pods[client], way(client, "far", family, service="empty").host, 80)
    assert report["error"] in REFUSALS, report
    assert seconds < SOON


@every_family
def test_a_service_whose_only_endpoint_does_not_listen_is_an_error_at_once(pods, way, family):
    report, seconds = dial(pods["client"], way("client", "far", family, service="far").host, 80)
    assert report["error"] in REFUSALS, report
    assert seconds < SOON


@every_family
def test_a_port_that_the_service_does_not_have_is_an_error(pods, way, family):
    with pods["far"].listening([["text", "wrong"]], 8080):
        report, _ = dial(pods["client"], way("client", "far", family, service="far").host, 81)
    assert report["error"] in {*UNREACHABLE, "TIMEOUT"}, report
    assert report["received"] == 0


@every_family
def test_named_target_ports_lead_to_the_ports_of_that_name(pods, way, family):
    with (
        pods["far"].listening([["text", "http"], ["recv_all"]], 8080),
        pods["far"].listening([["text", "admin"], ["recv_all"]], 9080),
    ):
        address = way("client", "far", family, service="named").host
        found = {
            port: pods["client"].connect(address, port, [["end"], ["recv_all"]]).result()["head"] for port in (80, 81)
        }
    assert found == {80: "http", 81: "admin"}


@every_family
@pytest.mark.parametrize("port", [15001, 15006, 15008, 15000, 15020])
@pytest.mark.parametrize("client", ["client", "outside1"], ids=["enrolled", "un-enrolled"])
def test_the_ports_of_other_meshes_proxies_lead_nowhere_and_not_in_circles(pods, mesh, client, port, family):
    """CAP-01: junk to them on another pod, on the pod itself and on localhost ends soon, and leaves no sockets."""
    before = {node: len(mesh.descriptors("ztunnel", node)) for node in mesh.cluster.nodes}
    caller = pods[client]
    for host in (pods["far"].address(family), caller.address(family), {4: "127.0.0.1", 6: "::1"}[family]):
        began = time.monotonic()
        report = caller.connect(host, port, [["text", "junk\r\n\r\n"], ["end"], ["recv_all"]], timeout=5.0).result()
        assert time.monotonic() - began < 5.0
        # At most TLS's alert answers the junk.
        assert report["received"] <= 7, report
    after = {node: len(mesh.descriptors("ztunnel", node)) for node in mesh.cluster.nodes}
    assert all(after[node] <= before[node] + 4 for node in before), (before, after)
