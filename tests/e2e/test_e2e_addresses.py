"""Who is seen as whom, and what is none of the mesh's business: localhost, own address, node, un-enrolled pods."""

from __future__ import annotations

import sys

import pytest
from e2e_pods import APP_PORT, REFUSALS, TOOL, assert_clean, assert_works, eventually

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
LOCALHOST = {4: "127.0.0.1", 6: "::1"}

WAYS = {
    "cross node": ("client", "far", None),
    "same node": ("client", "near", None),
    "cross node by service": ("client", "far", "far"),
    "same node by service": ("client", "near", "near"),
    "from an un-enrolled pod of the other node": ("outside1", "far", None),
    "from an un-enrolled pod of the node": ("outside1", "near", None),
    "from an un-enrolled pod by service": ("outside1", "far", "far"),
    "to an un-enrolled pod of the other node": ("client", "outside2", None),
    "to an un-enrolled pod of the node": ("client", "outside1", None),
    "across enrolled namespaces": ("client", "second", None),
    "control": ("outside1", "outside2", None),
}


@every_family
@pytest.mark.parametrize(("client", "server", "service"), WAYS.values(), ids=WAYS)
def test_the_app_sees_the_clients_true_address(way, client, server, service, family):
    report, seen = way(client, server, family, service=service).talk([["text", "?"], ["end"], ["recv_all"]], [["echo"]])
    assert_clean(report, seen)
    assert seen["peer"][0] == way(client, server, family).client.address(family)
    assert seen["local"][0] == way(client, server, family).server.address(family)


@every_family
def test_the_client_sees_the_address_that_it_dialled(way, family):
    by_service = way("client", "far", family, service="far")
    report, _ = by_service.talk([["text", "?"], ["end"], ["recv_all"]], [["echo"]])
    assert report["peer"] == [by_service.host, 80]
    assert report["local"][0] == by_service.client.address(family)


def test_a_v4_mapped_address_reaches_the_v4_server(way, pods):
    with pods["far"].listening([["echo"]]) as server:
        dialled = f"::ffff:{pods['far'].address(4)}"
        report = pods["client"].connect(dialled, server.port, [["text", "?"], ["end"], ["recv_all"]]).result()
        seen = server.result()
    assert_clean(report, seen)
    assert report["head"] == "?"
    assert seen["peer"][0] == pods["client"].address(4)


@every_family
@pytest.mark.parametrize("bound", ["one family", "dual stack"])
def test_a_server_of_one_family_is_reached_as_well_as_a_dual_stack_one(pods, family, bound):
    host = {"one family": pods["far"].address(family), "dual stack": "::"}[bound]
    with pods["far"].listening([["echo"]], host=host) as server:
        steps = [["text", "?"], ["end"], ["recv_all"]]
        report = pods["client"].connect(pods["far"].address(family), server.port, steps).result()
    assert_clean(report)
    assert report["head"] == "?"


@every_family
@pytest.mark.parametrize("target", ["localhost", "own address"])
@pytest.mark.parametrize("pod", ["client", "outside1"], ids=["enrolled", "control"])
def test_a_pod_reaches_itself_without_the_mesh(pods, pod, target, family):
    itself = pods[pod]
    host = LOCALHOST[family] if target == "localhost" else itself.address(family)
    with itself.listening([["echo"]]) as server:
        report = itself.connect(host, server.port, [["send", 1 << 20, 1], ["end"], ["recv_all"]]).result()
        seen = server.result()
    # The echo may fill both buffers only when nobody reads: 1 MiB fits.
    assert_clean(report, seen)
    assert report["received_sha256"] == report["sent_sha256"]
    assert seen["peer"] == report["local"], "something stands between the pod and itself"


@every_family
def test_a_pod_on_localhost_alone_cannot_be_reached_from_outside(pods, family):
    with pods["far"].listening([["text", "secret"]], host=LOCALHOST[family]) as server:
        report = pods["client"].connect(pods["far"].address(family), server.port, [["recv_all"]]).result()
        assert report["error"] in {"ECONNREFUSED", "ECONNRESET"}, report
        assert not server.peek()


@every_family
def test_a_pod_reaches_itself_by_its_own_service(way, mesh, family):
    """Hairpin: the service's only endpoint is its client. The lab's stand-in for kube-proxy cannot do that."""
    report, seen = way("client", "client", family, service="hairpin").talk(
        [["text", "me?"], ["end"], ["recv_all"]], [["echo"]]
    )
    assert_clean(report, seen)
    assert report["head"] == "me?"


@every_family
def test_a_pod_that_reaches_itself_by_its_service_meets_no_policy(steady, way, family):
    """As without a mesh: it never left the pod."""
    nobody = {"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/none/sa/none"]}}]}], "action": "ALLOW"}
    with steady.policy("nobody", nobody):
        report, seen = way("client", "client", family, service="hairpin").talk(
            [["text", "me?"], ["end"], ["recv_all"]], [["echo"]]
        )
    assert_clean(report, seen)
    assert report["head"] == "me?"


@every_family
@pytest.mark.parametrize("pod", ["client", "outside1"], ids=["enrolled", "control"])
@pytest.mark.parametrize("node", ["node1", "node2"], ids=["own node", "other node"])
def test_a_pod_reaches_a_node(cluster, pods, pod, node, family):
    """Something on the node's own network: a plain destination that is no pod."""
    number = 18000 + family
    place = cluster.nodes[node].system("e2e-server")
    addresses = next(found.addresses for found in cluster.manifest.nodes if found.name == node)
    address = next(found for found in addresses if (":" in found) == (family == 6))
    script = (
        "import socket, sys\n"
        f"s = socket.create_server(({address!r}, {number}), family=socket.{'AF_INET6' if family == 6 else 'AF_INET'})\n"
        "print('listening', flush=True)\n"
        "c, a = s.accept()\nc.sendall(a[0].encode())\nc.close()\n"
    )
    process = place.start([sys.executable, "-I", "-c", script])
    try:
        report = eventually(
            lambda: pods[pod].connect(address, number, [["recv_all"]]).result(),
            lambda found: found["error"] not in REFUSALS,
            5.0,
        )
        assert_clean(report)
        assert report["head"] == pods[pod].address(family)
    finally:
        process.kill()
        process.wait()


@every_family
def test_a_node_reaches_an_enrolled_pod(cluster, pods, family):
    with pods["far"].listening([["text", "hello node"], ["recv_all"]]) as server:
        script = (
            "import socket, sys\n"
            f"s = socket.create_connection(({pods['far'].address(family)!r}, {server.port}), timeout=5)\n"
            "print(s.recv(100).decode())\n"
        )
        for node in cluster.nodes:
            done = cluster.node_exec(node, [sys.executable, "-I", "-c", script])
            assert done.stdout.strip() == "hello node", (node, done)


@every_family
@pytest.mark.parametrize("port", [15001, 15006, 15008, 15020, APP_PORT])
def test_an_app_may_bind_the_ports_that_other_meshes_take(pods, way, port, family):
    """15008 can be bound and reached by the app itself; what comes from outside to it are tunnels."""
    itself = pods["far"]
    with itself.listening([["echo"]], port, reuse=False) as server:
        steps = [["text", "mine"], ["end"], ["recv_all"]]
        own = itself.connect(itself.address(family), server.port, steps).result()
        assert_clean(own)
        assert own["head"] == "mine"
        if port != 15008:
            other = pods["client"].connect(itself.address(family), port, steps).result()
            assert_clean(other)
            assert other["head"] == "mine"
    assert_works(way("client", "far", family))


@every_family
@pytest.mark.parametrize("client", ["client", "outside1"], ids=["enrolled", "un-enrolled"])
def test_an_app_can_bind_its_port_again_while_old_connections_of_that_port_are_open(pods, client, family):
    """A server that restarts, with and without SO_REUSEADDR on its new socket."""
    far, caller = pods["far"], pods[client]
    port = 18100 + family
    with far.listening([["echo"]], port) as first:
        held = caller.connect(far.address(family), first.port, [["ping", 0.02], ["end"], ["recv_all"]])
        eventually(held.peek, lambda found: found["exchanges"] > 0, 2.0)
    answer = far.order("listen", steps=[["echo"]], port=port, reuse=True)
    assert "error" not in answer, answer
    far.order("unlisten", handle=answer["handle"])
    report = held.stop()
    assert_clean(report)
    assert report["exchanges"] > 0


def test_the_tool_needs_nothing_but_the_standard_library(cluster):
    script = f"import runpy; runpy.run_path({str(TOOL)!r}, run_name='tool')"
    done = cluster.exec("client", [sys.executable, "-I", "-S", "-c", script])
    assert done.returncode == 0, done.stderr
