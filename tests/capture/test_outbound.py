"""What an app of an enrolled pod connects to is captured, however it goes about it."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from features import MPTCP, needs

from capture.harness import QUIET_S, Node, Pod, assert_talks, connect, listen, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess, RemoteSocket
from capture.topology import V4, V6, Family, both_families
from undermesh.gen import marks

pytestmark = pytest.mark.root

TCP_FASTOPEN_CONNECT = 30
TCP_FASTOPEN_NO_COOKIE = 34
MSG_FASTOPEN = 0x20000000
IP_UNICAST_IF, IPV6_UNICAST_IF = 50, 76
APP_MARK = 7


# === ways to connect ===


def plainly(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    return connect(app, family, family.peer, port)


def bound_to_device(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    return connect(app, family, family.peer, port, [(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")])


def with_a_mark_of_its_own(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    return connect(app, family, family.peer, port, [(socket.SOL_SOCKET, socket.SO_MARK, APP_MARK)])


def not_routed(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    return connect(app, family, family.peer, port, [(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)])


def by_unicast_interface(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    option = IP_UNICAST_IF if family is V4 else IPV6_UNICAST_IF
    return connect(app, family, family.peer, port, [(family.level, option, struct.pack("!I", 2))])


def with_data_in_the_syn(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    client = app.socket(family.number)
    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
    client.sendto(b"early", MSG_FASTOPEN, (family.peer, port))
    return client


def with_a_syn_at_the_first_write(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    client = app.socket(family.number)
    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    client.connect((family.peer, port))
    client.sendall(b"early")
    return client


def without_waiting(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    client = app.socket(family.number, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    assert client.connect_ex((family.peer, port)) == errno.EINPROGRESS
    client.settimeout(5)
    return client


def by_mptcp(app: RemoteProcess, family: Family, port: int) -> RemoteSocket:
    needs(MPTCP)
    client = app.socket(family.number, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    client.settimeout(5)
    client.connect((family.peer, port))
    return client


WAYS: list[tuple[Callable[[RemoteProcess, Family, int], RemoteSocket], bytes]] = [
    (plainly, b""),
    (bound_to_device, b""),
    (with_a_mark_of_its_own, b""),
    (not_routed, b""),
    (by_unicast_interface, b""),
    (with_data_in_the_syn, b"early"),
    (with_a_syn_at_the_first_write, b"early"),
    (without_waiting, b""),
    (by_mptcp, b""),
]


@both_families
@pytest.mark.parametrize(("way", "early"), [pytest.param(*row, id=row[0].__name__) for row in WAYS])
def test_it_arrives_with_the_original_destination_and_the_pods_own_source(
    pod: Pod, port: int, family: Family, way: Callable[[RemoteProcess, Family, int], RemoteSocket], early: bytes
) -> None:
    with Watch(pod.netns, "eth0") as wire, way(pod.app, family, port) as client:
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.destination == (family.peer, port)
        assert arrival.client[0] == pod.address(family)
        assert arrival.socket.recv(100) == early if early else True
        assert_talks(client, arrival.socket)
        assert client.getpeername()[:2] == (family.peer, port)
        arrival.socket.close()
        assert wire.segments() == []


@pytest.mark.parametrize("bridged", [pytest.param(False, id="routed"), pytest.param(True, id="bridged")])
@both_families
def test_it_does_not_matter_how_the_pod_is_wired_or_what_its_interface_is_called(
    new_pod: Callable[..., Pod], port: int, family: Family, bridged: bool
) -> None:
    pod = new_pod(bridged=bridged, device="net0")
    pod.enrol()
    with Watch(pod.netns, "net0") as wire:
        for target in (family.peer, family.node, family.foreign):
            with connect(pod.app, family, target, port) as client:
                arrival = pod.accept(slot_of("OUTBOUND", family))
                assert arrival.destination == (target, port)
                assert_talks(client, arrival.socket)
                arrival.socket.close()
        assert wire.segments() == []


def test_an_ipv4_mapped_socket_is_captured_as_ipv4(pod: Pod, port: int) -> None:
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(socket.AF_INET6)
        client.connect((f"::ffff:{V4.peer}", port))
        arrival = pod.accept(slot_of("OUTBOUND", V4))
        assert arrival.destination == (V4.peer, port)
        assert_talks(client, arrival.socket)
        client.close()
        assert wire.segments() == []


def test_a_link_local_destination_is_captured(new_pod: Callable[..., Pod], port: int) -> None:
    pod = new_pod()
    pod.enrol()
    scope = pod.netns.interfaces().index("eth0") + 1
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(socket.AF_INET6)
        client.settimeout(5)
        client.connect(("fe80::1", port, 0, scope))
        arrival = pod.accept(slot_of("OUTBOUND", V6))
        assert arrival.destination == ("fe80::1", port)
        assert_talks(client, arrival.socket)
        assert wire.syns() == []


@both_families
def test_the_app_keeps_its_mark_for_what_is_not_captured(pod: Pod, port: int, family: Family) -> None:
    server = listen(pod.app, family, port, family.loopback)
    client = with_a_mark_of_its_own(pod.app, family, port)
    pod.accept(slot_of("OUTBOUND", family)).socket.close()
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == marks.CAPTURE
    client.disconnect()
    client.connect((family.loopback, port))
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == APP_MARK
    assert_talks(client, server.accept()[0])


@both_families
def test_with_a_source_that_is_not_the_pods_nothing_leaves_uncaptured(pod: Pod, port: int, family: Family) -> None:
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(family.number)
        client.setsockopt(family.level, family.transparent, 1)
        client.bind((family.foreign, 0))
        client.settimeout(QUIET_S)
        with pytest.raises(OSError):
            client.connect((family.peer, port))
        assert wire.syns(port) == []
        client.close()


@both_families
def test_udp_is_left_alone(pod: Pod, peer: RemoteProcess, port: int, family: Family) -> None:
    server = peer.socket(family.number, socket.SOCK_DGRAM)
    server.bind((family.any, port))
    server.settimeout(5)
    client = pod.app.socket(family.number, socket.SOCK_DGRAM)
    client.connect((family.peer, port))
    client.send(b"datagram")
    assert server.recvfrom(100)[0] == b"datagram"


# === more than one interface ===


@dataclass(frozen=True)
class Second:
    """A second interface of a pod, with an address in each family or none."""

    pod: Pod

    def add(self, addresses: bool) -> None:
        self.pod.netns.ip("link add net1 type veth peer name net1p", "link set net1p up", "link set net1 up")
        if addresses:
            self.pod.netns.ip("addr add 10.79.0.2/24 dev net1", "addr add fd79::2/64 dev net1 nodad")

    def neighbour(self, family: Family) -> str:
        return "10.79.0.1" if family is V4 else "fd79::1"


DEVICE = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"net1")


@both_families
def test_a_second_interface_that_the_agent_has_seen_is_captured_too(
    new_pod: Callable[..., Pod], port: int, family: Family
) -> None:
    pod = new_pod()
    second = Second(pod)
    pod.enrol()
    second.add(addresses=True)
    assert pod.mend()
    with Watch(pod.netns, "net1") as wire:
        client = connect(pod.app, family, second.neighbour(family), port, [DEVICE])
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.destination == (second.neighbour(family), port)
        assert_talks(client, arrival.socket)
        assert wire.segments() == []


@both_families
def test_through_an_interface_without_an_address_nothing_leaves(
    new_pod: Callable[..., Pod], port: int, family: Family
) -> None:
    pod = new_pod()
    second = Second(pod)
    pod.enrol()
    second.add(addresses=False)
    assert pod.mend()
    with Watch(pod.netns, "net1") as wire:
        client = pod.app.socket(family.number)
        client.setsockopt(*DEVICE)
        client.settimeout(QUIET_S)
        client.connect_ex((second.neighbour(family), port))
        assert wire.segments() == []


@both_families
def test_an_interface_that_was_just_made_refuses_connections_until_the_agent_has_seen_it(
    new_pod: Callable[..., Pod], port: int, family: Family
) -> None:
    pod = new_pod()
    second = Second(pod)
    pod.enrol()
    second.add(addresses=True)
    refused = pod.node.capture.counters()["device_refused"]
    with Watch(pod.netns, "net1") as wire:
        with pytest.raises(PermissionError):
            connect(pod.app, family, second.neighbour(family), port, [DEVICE])
        assert pod.node.capture.counters()["device_refused"] == refused + 1
        assert wire.segments() == []


@both_families
def test_a_device_chosen_between_connect_and_syn_is_not_a_way_out(
    new_pod: Callable[..., Pod], port: int, family: Family
) -> None:
    pod = new_pod()
    second = Second(pod)
    pod.enrol()
    second.add(addresses=True)
    with Watch(pod.netns, "net1") as wire:
        client = pod.app.socket(family.number)
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect((second.neighbour(family), port))
        client.setsockopt(*DEVICE)
        client.sendall(b"early")
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.socket.recv(100) == b"early"
        assert wire.segments() == []


# === where capture has no business ===


@both_families
@pytest.mark.parametrize("outbound", [pytest.param(False, id="inbound only"), pytest.param(True, id="outbound too")])
@pytest.mark.parametrize("target", ["loopback", "any", "own", "any from own"])
def test_a_pod_that_talks_to_itself_meets_its_app(
    new_pod: Callable[..., Pod], port: int, family: Family, outbound: bool, target: str
) -> None:
    pod = new_pod()
    pod.enrol(outbound)
    own = pod.address(family)
    server = listen(pod.app, family, port)
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(family.number)
        client.settimeout(5)
        if target == "any from own":
            client.bind((own, 0))
        client.connect(({"loopback": family.loopback, "own": own}.get(target, family.any), port))
        accepted, _ = server.accept()
        assert_talks(client, accepted, b"x" * 100_000)
        assert pod.arrivals(0.05) == []
        assert wire.segments() == []


@both_families
def test_a_pod_that_is_not_enrolled_is_not_touched(
    new_pod: Callable[..., Pod], peer: RemoteProcess, pod: Pod, port: int, family: Family
) -> None:
    plain = new_pod()
    server = listen(peer, family, port)
    client = connect(plain.app, family, family.peer, port)
    accepted, address = server.accept()
    assert address[0] == plain.address(family)
    assert_talks(client, accepted)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0
    inward = listen(plain.app, family, port)
    assert_talks(connect(peer, family, plain.address(family), port), inward.accept()[0])


@both_families
def test_ztunnels_own_legs_are_never_captured(pod: Pod, peer: RemoteProcess, port: int, family: Family) -> None:
    server = listen(peer, family, port)
    leg = pod.dial(family, family.peer, port)
    accepted, address = server.accept()
    assert address[0] == pod.address(family)
    assert_talks(leg, accepted)
    leg.close()


@both_families
def test_a_connection_that_ends_leaves_no_entry(pod: Pod, node: Node, port: int, family: Family) -> None:
    before = len(list(node.capture.maps["captured"]))
    for closes_first in ("client", "ztunnel"):
        client = connect(pod.app, family, family.peer, port)
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert len(list(node.capture.maps["captured"])) == before + 1
        for side in (client, arrival.socket) if closes_first == "client" else (arrival.socket, client):
            side.close()
        pod.arrivals(0.05)
        assert len(list(node.capture.maps["captured"])) == before


@both_families
def test_a_connect_that_fails_leaves_no_entry(
    new_pod: Callable[..., Pod], node: Node, port: int, family: Family
) -> None:
    pod = new_pod()
    pod.enrol()
    before = len(list(node.capture.maps["captured"]))
    slot = slot_of("OUTBOUND", family)
    pod.kernel.sockets.pop(slot).close()
    client = pod.app.socket(family.number)
    client.settimeout(QUIET_S)
    # IPv4 hangs, IPv6 is refused: the kernel answers a dropped SYN where it may use the foreign source.
    with pytest.raises((TimeoutError, ConnectionRefusedError)):
        client.connect((family.peer, port))
    client.close()
    assert len(list(node.capture.maps["captured"])) == before
