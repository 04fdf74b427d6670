"""The kubelet's probes go straight to the app, and nothing else does."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from features import NFT_NAT, needs

from capture.harness import QUIET_S, Node, Pod, assert_talks, connect, listen, slot_of
from capture.remote import RemoteProcess
from capture.topology import V4, Family, both_families, wait_until

pytestmark = pytest.mark.root

NODE_PORT = 30080


@pytest.fixture(scope="module")
def kubelet(node: Node) -> RemoteProcess:
    """A process of the node itself: in its namespace and in none of the pods' cgroups."""
    return node.worker(node.network.node)


@pytest.fixture(scope="module")
def host_network_pod(node: Node) -> RemoteProcess:
    """A process of a hostNetwork pod: in the node's namespace, in a pod's cgroup."""
    cgroup = node.root / "kubepods.slice" / "kubepods-podaaaaaaaa_0000_0000_0000_000000000000.slice"
    cgroup.mkdir()
    return node.worker(node.network.node, cgroup)


@both_families
def test_a_probe_to_a_declared_port_meets_the_app(
    node: Node, pod: Pod, kubelet: RemoteProcess, port: int, family: Family
) -> None:
    node.ensure((pod, port))
    server = listen(pod.app, family, port)
    passed = node.capture.counters()["probe_passed"]
    client = connect(kubelet, family, pod.address(family), port)
    accepted, _ = server.accept()
    assert_talks(client, accepted)
    assert pod.arrivals(0) == []
    assert node.capture.counters()["probe_passed"] == passed + 1
    client.close()
    accepted.close()
    server.close()
    assert wait_until(lambda: not list(node.capture.maps["probes"]))


@both_families
def test_a_probe_fails_at_once_when_the_app_is_down(
    node: Node, pod: Pod, kubelet: RemoteProcess, port: int, family: Family
) -> None:
    """A proxy that accepts first would let every tcpSocket probe succeed."""
    node.ensure((pod, port))
    with pytest.raises(ConnectionRefusedError):
        connect(kubelet, family, pod.address(family), port)
    assert pod.arrivals(0) == []
    assert not list(node.capture.maps["probes"])


@both_families
@pytest.mark.parametrize("who", ["kubelet", "host_network_pod", "peer"])
@pytest.mark.parametrize("declared", [pytest.param(True, id="declared"), pytest.param(False, id="undeclared")])
def test_only_the_node_itself_and_only_declared_ports_pass(
    node: Node,
    pod: Pod,
    port: int,
    family: Family,
    who: str,
    declared: bool,
    request: pytest.FixtureRequest,
) -> None:
    node.ensure((pod, port if declared else port + 1000))
    server = listen(pod.app, family, port)
    client = connect(request.getfixturevalue(who), family, pod.address(family), port)
    if who == "kubelet" and declared:
        assert_talks(client, server.accept()[0])
    else:
        assert_talks(client, pod.accept(slot_of("PLAINTEXT", family)).socket)
    client.close()
    server.close()


@both_families
def test_a_port_that_is_no_longer_probed_is_closed_again(
    node: Node, pod: Pod, kubelet: RemoteProcess, port: int, family: Family
) -> None:
    node.ensure((pod, port))
    node.ensure()
    assert_talks(connect(kubelet, family, pod.address(family), port), pod.accept(slot_of("PLAINTEXT", family)).socket)


@both_families
def test_an_open_probe_lends_its_way_to_nobody(
    node: Node, pod: Pod, peer: RemoteProcess, kubelet: RemoteProcess, port: int, family: Family
) -> None:
    node.ensure((pod, port))
    server = listen(pod.app, family, port)
    probe = connect(kubelet, family, pod.address(family), port)
    held = server.accept()[0]
    stranger = connect(peer, family, pod.address(family), port)
    assert_talks(stranger, pod.accept(slot_of("PLAINTEXT", family)).socket)
    assert_talks(probe, held)
    server.close()


@both_families
def test_the_probed_port_of_one_pod_opens_nothing_in_another(
    node: Node, pod: Pod, new_pod: Callable[..., Pod], kubelet: RemoteProcess, port: int, family: Family
) -> None:
    other = new_pod()
    other.enrol()
    node.ensure((other, port))
    listen(pod.app, family, port).setblocking(False)
    client = connect(kubelet, family, pod.address(family), port)
    assert_talks(client, pod.accept(slot_of("PLAINTEXT", family)).socket)
    node.ensure()


@both_families
def test_what_the_node_translates_and_masquerades_is_no_probe(
    node: Node, pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    """NodePort traffic comes from the node's address, but no socket of the node made it."""
    needs(NFT_NAT)
    node.ensure((pod, port))
    server = listen(pod.app, family, port)
    address = pod.address(family) if family is V4 else f"[{pod.address(family)}]"
    table = f"{'ip' if family is V4 else 'ip6'} node_port"
    node.network.node.run(
        "nft",
        "-f",
        "-",
        stdin=f"""
table {table} {{
  chain pre {{
    type nat hook prerouting priority -100
    tcp dport {NODE_PORT} dnat to {address}:{port}
  }}
  chain post {{
    type nat hook postrouting priority 100
    ct status dnat masquerade
  }}
}}
""",
    )
    try:
        client = connect(peer, family, family.node, NODE_PORT)
        arrival = pod.accept(slot_of("PLAINTEXT", family))
        assert arrival.client[0] != family.peer
        assert_talks(client, arrival.socket)
        server.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            server.accept()
    finally:
        node.network.node.run("nft", "delete", "table", *table.split())
        server.close()


def test_udp_of_the_node_is_left_alone(node: Node, pod: Pod, kubelet: RemoteProcess, port: int) -> None:
    server = pod.app.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("", port))
    server.settimeout(5)
    client = kubelet.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.sendto(b"dns", (pod.address(V4), port))
    assert server.recv(10) == b"dns"
