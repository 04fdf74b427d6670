"""What is written down of a connection: one record per side with Istio's keys, and metrics that agree with it."""

from __future__ import annotations

import re

import pytest
from e2e_mesh import logged
from e2e_pods import assert_clean, eventually

pytestmark = pytest.mark.usefixtures("mesh")
every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])

UP, DOWN = 123_457, 7_654_321
KEYS = {
    "src.addr",
    "src.workload",
    "src.namespace",
    "src.identity",
    "dst.addr",
    "dst.hbone_addr",
    "dst.workload",
    "dst.namespace",
    "dst.identity",
    "direction",
    "bytes_sent",
    "bytes_recv",
    "duration",
}
SIDES = {"outbound": "client", "inbound": "far"}


def exchange(way):
    """One conversation of UP bytes there, DOWN bytes back, and half a second."""
    client, server = way.talk(
        [["send", UP, 1], ["end"], ["recv_all"]], [["recv_all"], ["sleep", 0.5], ["send", DOWN, 2], ["end"]]
    )
    assert_clean(client, server)
    return client, server


def milliseconds(duration):
    """'1234ms' as a number."""
    return int(re.fullmatch(r"(\d+)ms", duration)[1])


@every_family
def test_each_side_writes_one_record_with_both_identities_and_the_true_counts(mesh, pods, way, family):
    tunnelled = way("client", "far", family)
    with mesh.log("node1") as log1, mesh.log("node2") as log2:
        client, server = exchange(tunnelled)
        wanted = {"src_identity": pods["client"].identity, "dst_identity": pods["far"].identity}
        (outbound,) = logged(log1, direction="outbound", **wanted)
        (inbound,) = logged(log2, direction="inbound", **wanted)
        everything = [*log1.entries(), *log2.entries()]
    assert len(everything) == 2, everything
    for entry in (outbound, inbound):
        assert entry.keys() >= KEYS, KEYS - entry.keys()
        # Istio's meaning: what was sent to the client, and what was received from it.
        assert (entry["bytes_recv"], entry["bytes_sent"]) == (UP, DOWN)
        assert 500 <= milliseconds(entry["duration"]) < 3000
        assert (entry["src.workload"], entry["dst.workload"]) == ("client", "far")
        assert (entry["src.namespace"], entry["dst.namespace"]) == ("mesh", "mesh")
        assert entry["lane"] == "hbone"
        assert "error" not in entry
        assert entry["dst.hbone_addr"].endswith(":15008")
    assert outbound["src.addr"] == text(client["local"])
    assert outbound["dst.addr"] == text(client["peer"])
    assert inbound["dst.addr"] == text(server["local"])
    assert inbound["src.addr"].rpartition(":")[0] == text(client["local"]).rpartition(":")[0]
    assert outbound["conn_id"] == inbound["conn_id"], "the sides cannot be put together"


def text(address):
    """[host, port] as in the log."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@every_family
def test_same_node_connections_are_recorded_on_both_sides_too(mesh, pods, way, family):
    with mesh.log("node1") as log:
        exchange(way("client", "near", family))
        for direction in SIDES:
            (entry,) = logged(log, direction=direction, dst_identity=pods["near"].identity)
            assert (entry["bytes_recv"], entry["bytes_sent"]) == (UP, DOWN)
            assert entry["src.identity"] == pods["client"].identity


@every_family
def test_a_service_is_named(mesh, way, family):
    with mesh.log("node1") as log1, mesh.log("node2") as log2:
        exchange(way("client", "far", family, service="far"))
        for log, direction in ((log1, "outbound"), (log2, "inbound")):
            (entry,) = logged(log, direction=direction)
            assert entry["dst.service"] == "far.mesh.svc.cluster.local", entry


PLAIN = {
    "from an un-enrolled pod": ("outside1", "far", "node2", "inbound"),
    "to an un-enrolled pod": ("client", "outside2", "node1", "outbound"),
}


@every_family
@pytest.mark.parametrize(("client", "server", "node", "direction"), PLAIN.values(), ids=PLAIN)
def test_plaintext_is_recorded_as_such_and_without_a_peers_identity(mesh, way, client, server, node, direction, family):
    with mesh.log(node) as log:
        exchange(way(client, server, family))
        (entry,) = logged(log, direction=direction)
    assert entry["lane"] == "plain"
    assert (entry["bytes_recv"], entry["bytes_sent"]) == (UP, DOWN)
    assert (entry["src.workload"], entry["dst.workload"]) == (client, server)
    assert not entry.get("dst.hbone_addr")
    # An identity is what a certificate proved; nobody proves one in plaintext.
    assert not entry.get("src.identity" if direction == "inbound" else "dst.identity")


def test_a_failure_is_recorded_with_its_reason_on_both_sides(mesh, pods):
    with mesh.log("node1") as log1, mesh.log("node2") as log2:
        pods["client"].connect(pods["far"].address(4), 18500, [["recv_all"]]).result()
        (outbound,) = logged(log1, direction="outbound")
        (inbound,) = logged(log2, direction="inbound")
    assert "refused" in inbound["error"] and inbound["response_flags"] == "CONNECT", inbound
    assert "503" in outbound["error"], outbound
    assert inbound["src.identity"] == pods["client"].identity


def test_a_service_without_endpoints_is_recorded_with_that_reason(mesh, way, pods):
    with mesh.log("node1") as log:
        pods["client"].connect(way("client", "far", 4, service="empty").host, 80, [["recv_all"]]).result()
        (entry,) = logged(log, direction="outbound")
    assert "no healthy upstream" in entry["error"], entry
    assert entry["dst.service"] == "empty.mesh.svc.cluster.local"


def test_a_reset_by_the_app_is_a_record_too_and_the_counts_stand(mesh, way):
    with mesh.log("node2") as log:
        way("client", "far", 4).talk([["text", "12345"], ["recv_all"]], [["recv", 5], ["text", "123"], ["reset"]])
        (entry,) = logged(log, direction="inbound", dst_workload="far")
    assert entry["bytes_recv"] == 5


COUNTERS = ("connections_opened", "connections_closed", "sent_bytes", "received_bytes")


@every_family
@pytest.mark.parametrize(("reporter", "node"), [("source", "node1"), ("destination", "node2")])
def test_the_metrics_of_istios_names_add_up(mesh, way, pods, reporter, node, family):
    labels = {
        "reporter": reporter,
        "source_workload": "client",
        "source_workload_namespace": "mesh",
        "source_principal": pods["client"].identity,
        "destination_workload": "far",
        "destination_workload_namespace": "mesh",
        "destination_principal": pods["far"].identity,
        "destination_service": "far.mesh.svc.cluster.local",
        "destination_service_name": "far",
        "destination_service_namespace": "mesh",
        "request_protocol": "tcp",
        "connection_security_policy": "mutual_tls",
        "response_flags": "-",
    }

    def counts():
        text = mesh.metrics(node)
        return {name: mesh.total(text, f"istio_tcp_{name}_total", labels) for name in COUNTERS}

    before = counts()
    for _ in range(3):
        exchange(way("client", "far", family, service="far"))
    # Istio's meaning of sent: in the response.
    wanted = {"connections_opened": 3, "connections_closed": 3, "sent_bytes": 3 * DOWN, "received_bytes": 3 * UP}
    added = eventually(
        lambda: {name: now - before[name] for name, now in counts().items()},
        lambda found: found["connections_closed"] == 3,
        3.0,
    )
    assert added == wanted


def test_an_open_connection_is_in_the_list_of_connections_with_its_bytes(mesh, cluster, pods, way):
    tunnelled = way("client", "far", 4, service="far")
    with tunnelled.listening([["echo"]]) as server:
        client = tunnelled.connect(server, [["send", 1000, 1], ["recv", 1000], ["gate", "stop"]])
        eventually(client.peek, lambda found: found["received"] == 1000, 2.0)
        for node, direction, uid in (("node1", "outbound", "client"), ("node2", "inbound", "far")):
            listed = cluster.agent_api(node, "/v1/connections")["connections"]
            (found,) = [one for one in listed if one["direction"] == direction]
            assert found["pod_uid"] == cluster.manifest.pod(uid).uid
            assert (found["bytes_sent"], found["bytes_received"]) == (1000, 1000)
            assert found["source_identity"] == pods["client"].identity
            assert found["destination_identity"] == pods["far"].identity
            assert found["source_workload"] == "mesh/client" and found["lane"] == "hbone"
        assert mesh.pod_status("client")["captured_connections"] == 1
        assert mesh.pod_status("far")["inbound_connections"] == 1
        client.stop()
    eventually(lambda: cluster.agent_api("node2", "/v1/connections")["connections"], lambda found: not found, 3.0)
