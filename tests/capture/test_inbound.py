"""What reaches an enrolled pod from outside meets ztunnel, and ztunnel's delivery meets the app as the client."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from features import MPTCP, needs

from capture.harness import HBONE_PORT, QUIET_S, Node, Pod, assert_talks, connect, listen, receive, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess
from capture.topology import V4, Family, both_families
from undermesh.agent import netns
from undermesh.gen import marks

pytestmark = pytest.mark.root

MARK = (socket.SOL_SOCKET, socket.SO_MARK)
LARGE = 3_000_000


@both_families
@pytest.mark.parametrize("app_listens", [pytest.param(True, id="app listens"), pytest.param(False, id="no app")])
def test_any_port_meets_the_plaintext_listener(
    pod: Pod, peer: RemoteProcess, port: int, family: Family, app_listens: bool
) -> None:
    server = listen(pod.app, family, port) if app_listens else None
    client = connect(peer, family, pod.address(family), port)
    arrival = pod.accept(slot_of("PLAINTEXT", family))
    assert arrival.destination == (pod.address(family), port)
    assert arrival.client == client.getsockname()[:2]
    assert_talks(client, arrival.socket)
    if server is not None:
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        server.close()


@both_families
@pytest.mark.parametrize("bridged", [pytest.param(False, id="routed"), pytest.param(True, id="bridged")])
def test_port_15008_meets_the_tunnel_listener(
    new_pod: Callable[..., Pod], peer: RemoteProcess, family: Family, bridged: bool
) -> None:
    pod = new_pod(bridged=bridged)
    pod.enrol()
    client = connect(peer, family, pod.address(family), HBONE_PORT)
    arrival = pod.accept(slot_of("HBONE", family))
    assert arrival.destination == (pod.address(family), HBONE_PORT)
    assert_talks(client, arrival.socket, b"x" * 200_000)


@both_families
def test_a_second_address_of_the_pod_is_inbound_like_the_first(
    new_pod: Callable[..., Pod], node: Node, peer: RemoteProcess, port: int, family: Family
) -> None:
    """Taken for outbound, it would lend the pod's identity to strangers."""
    pod = new_pod(bridged=True)
    second = "10.77.0.200" if family is V4 else "fd77::200"
    pod.netns.ip(f"addr add {second}/{24 if family is V4 else 64} dev eth0{'' if family is V4 else ' nodad'}")
    pod.enrol()
    for number, slot in ((port, "PLAINTEXT"), (HBONE_PORT, "HBONE")):
        client = connect(peer, family, second, number)
        arrival = pod.accept(slot_of(slot, family))
        assert arrival.destination == (second, number)
        assert_talks(client, arrival.socket)
    assert pod.arrivals(0.05) == []


@both_families
def test_what_ztunnel_dials_of_the_pods_own_addresses_is_inbound_and_no_loop(
    pod: Pod, port: int, family: Family
) -> None:
    leg = pod.dial(family, pod.address(family), port)
    assert pod.accept(slot_of("PLAINTEXT", family)).destination == (pod.address(family), port)
    leg.close()
    assert pod.arrivals(0.05) == []


# === delivery ===


@both_families
@pytest.mark.parametrize("client", ["peer", "foreign", "node"])
def test_the_app_sees_the_clients_own_address(pod: Pod, port: int, family: Family, client: str) -> None:
    address = getattr(family, client)
    server = listen(pod.app, family, port)
    with Watch(pod.netns, "eth0") as wire:
        leg = pod.deliver(family, address, port)
        accepted, seen = server.accept()
        assert seen[:2] == (address, leg.getsockname()[1])
        assert accepted.getsockname()[:2] == (pod.address(family), port)
        assert_talks(leg, accepted)
        assert wire.segments() == []
        assert pod.arrivals(0) == []
    leg.close()
    server.close()


@both_families
def test_a_large_answer_takes_the_way_back_too(pod: Pod, port: int, family: Family) -> None:
    server = listen(pod.app, family, port)
    with Watch(pod.netns, "eth0") as wire:
        leg = pod.deliver(family, family.peer, port)
        accepted, _ = server.accept()
        sent = accepted.later.sendall(b"x" * LARGE)
        assert len(receive(leg, LARGE)) == LARGE
        sent.result(5)
        accepted.close()
        assert leg.recv(1) == b""
        assert wire.segments() == []
    leg.close()
    server.close()


@both_families
def test_where_no_app_listens_the_delivery_is_refused_at_once(pod: Pod, port: int, family: Family) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        pod.deliver(family, family.peer, port)
    assert time.monotonic() - started < 1


@both_families
def test_from_client_to_app_and_back_through_ztunnels_place(
    pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    server = listen(pod.app, family, port)
    client = connect(peer, family, pod.address(family), port)
    arrival = pod.accept(slot_of("PLAINTEXT", family))
    leg = pod.deliver(family, arrival.client[0], port)
    accepted, seen = server.accept()
    assert seen[0] == family.peer
    client.sendall(b"request")
    leg.sendall(receive(arrival.socket, 7))
    assert receive(accepted, 7) == b"request"
    accepted.sendall(b"answer")
    arrival.socket.sendall(receive(leg, 6))
    assert receive(client, 6) == b"answer"
    server.close()


@pytest.fixture
def strict(new_pod: Callable[..., Pod]) -> Iterator[Pod]:
    pod = new_pod()
    for conf in ("all", "lo", "eth0"):
        pod.netns.sysctl(f"ipv4/conf/{conf}/rp_filter", "1")
    pod.netns.sysctl("ipv4/conf/all/src_valid_mark", "1")
    pod.enrol()
    yield pod


@pytest.mark.parametrize("client", ["peer", "foreign"])
def test_a_strict_reverse_path_filter_hinders_nothing(strict: Pod, peer: RemoteProcess, port: int, client: str) -> None:
    server = listen(strict.app, V4, port)
    leg = strict.deliver(V4, getattr(V4, client), port)
    assert_talks(leg, server.accept()[0])
    outward = connect(strict.app, V4, V4.peer, port)
    assert_talks(outward, strict.accept(slot_of("OUTBOUND", V4)).socket)
    inward = connect(peer, V4, strict.address(V4), port)
    assert_talks(inward, strict.accept(slot_of("PLAINTEXT", V4)).socket)


@both_families
@pytest.mark.parametrize("when", ["before listen", "after listen"])
def test_a_mark_on_the_apps_listener_does_not_lead_its_answers_astray(
    pod: Pod, port: int, family: Family, when: str
) -> None:
    server = pod.app.socket(family.number)
    if when == "before listen":
        server.setsockopt(*MARK, 7)
    server.bind((family.any, port))
    server.listen(8)
    if when == "after listen":
        server.setsockopt(*MARK, 7)
    leg = pod.deliver(family, family.peer, port)
    accepted, _ = server.accept()
    assert accepted.getsockopt(*MARK) == marks.DELIVERY
    assert_talks(leg, accepted)
    server.close()


@both_families
def test_an_mptcp_listener_gets_its_deliveries(pod: Pod, port: int, family: Family) -> None:
    """Go's servers are MPTCP listeners since 1.24, and set options on what they accept."""
    needs(MPTCP)
    server = listen(pod.app, family, port, protocol=socket.IPPROTO_MPTCP)
    leg = pod.deliver(family, family.peer, port)
    accepted, seen = server.accept()
    assert seen[0] == family.peer
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
    assert_talks(leg, accepted)
    sent = accepted.later.sendall(b"x" * LARGE)
    assert len(receive(leg, LARGE)) == LARGE
    sent.result(5)
    server.close()


@both_families
def test_an_mptcp_client_from_outside_is_steered_like_any_other(
    pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    needs(MPTCP)
    client = peer.socket(family.number, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
    client.settimeout(5)
    client.connect((pod.address(family), port))
    assert_talks(client, pod.accept(slot_of("PLAINTEXT", family)).socket)


@both_families
def test_delivery_ports_meet_neither_tunnels_nor_ephemeral_ports(pod: Pod, port: int, family: Family) -> None:
    low, high = map(int, pod.netns.sysctl("ipv4/ip_local_port_range").split())
    for first, last in pod.kernel.delivery_ports:
        assert first <= last <= 65535
        assert last < low or first > high
        assert not first <= HBONE_PORT <= last or last < low
    server = listen(pod.app, family, port)
    leg = pod.deliver(family, family.peer, port)
    assert not low <= leg.getsockname()[1] <= high
    server.close()


@both_families
def test_a_delivery_and_the_clients_own_connection_from_one_port_get_in_each_others_way(
    pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    """Why ztunnel must never deliver from a port of an open connection of the client to the same pod and port."""
    server = listen(pod.app, family, port)
    client = peer.socket(family.number)
    client.settimeout(5)
    client.bind((family.any, 30_000 + port))
    client.connect((pod.address(family), port))
    arrival = pod.accept(slot_of("PLAINTEXT", family))
    with pytest.raises(OSError):
        pod.deliver(family, family.peer, port, source_port=30_000 + port, patience=QUIET_S)
    assert_talks(client, arrival.socket)
    assert_talks(pod.deliver(family, family.peer, port), server.accept()[0])
    server.close()


# === the kernel's corners ===


@both_families
def test_syn_cookies_change_nothing(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family
) -> None:
    pod = new_pod()
    pod.enrol()
    pod.netns.sysctl("ipv4/tcp_syncookies", "2")
    outward = connect(pod.app, family, family.peer, port)
    arrival = pod.accept(slot_of("OUTBOUND", family))
    assert arrival.destination == (family.peer, port)
    assert_talks(outward, arrival.socket)
    for number, slot in ((port, "PLAINTEXT"), (HBONE_PORT, "HBONE")):
        inward = connect(peer, family, pod.address(family), number)
        assert_talks(inward, pod.accept(slot_of(slot, family)).socket)
    server = listen(pod.app, family, port)
    assert_talks(pod.deliver(family, family.peer, port), server.accept()[0])


@both_families
def test_a_stray_ack_is_answered_by_a_reset_and_reaches_nobody(pod: Pod, node: Node, port: int, family: Family) -> None:
    with node.watch_peer() as wire:
        netns.run_in(node.network.peer.fd, lambda: _send_ack(family, pod.address(family), 45001, port))
        answers = [s for s in wire.segments(0.2) if s.source_port == port]
    assert answers and all(segment.is_reset for segment in answers)
    assert pod.arrivals(0) == []


def _send_ack(family: Family, destination: str, source_port: int, port: int) -> None:
    source, target = (socket.inet_pton(family.number, text) for text in (family.peer, destination))
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1000, 2000, 5 << 4, 0x10, 1024, 0, 0)
    pseudo = source + target + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
    checksum = sum(struct.unpack(f"!{len(pseudo + segment) // 2}H", pseudo + segment))
    while checksum >> 16:
        checksum = (checksum & 0xFFFF) + (checksum >> 16)
    segment = segment[:16] + struct.pack("!H", ~checksum & 0xFFFF) + segment[18:]
    with socket.socket(family.number, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(segment, (destination, 0))


@both_families
def test_a_client_that_uses_its_port_again_at_once_meets_the_listener_again(
    pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    """The second SYN hits a TIME_WAIT socket of ours."""
    for _ in range(3):
        client = peer.socket(family.number)
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((family.any, 30_000 + port))
        client.connect((pod.address(family), port))
        arrival = pod.accept(slot_of("PLAINTEXT", family))
        assert_talks(client, arrival.socket)
        # As ztunnel does at a clean end: what it accepts for an app is reset when it is lost.
        arrival.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        arrival.socket.close()
        assert client.recv(1) == b""
        client.close()


# === no listener ===


@both_families
@pytest.mark.parametrize("way", ["PLAINTEXT", "HBONE"])
def test_with_an_empty_slot_nothing_reaches_the_app(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family, way: str
) -> None:
    pod = new_pod()
    pod.enrol()
    number = HBONE_PORT if way == "HBONE" else port
    server = listen(pod.app, family, number)
    pod.kernel.sockets.pop(slot_of(way, family)).close()
    missing = pod.node.capture.counters()["listener_missing"]
    client = peer.socket(family.number)
    client.settimeout(QUIET_S)
    with pytest.raises((TimeoutError, ConnectionRefusedError)):
        client.connect((pod.address(family), number))
    assert pod.node.capture.counters()["listener_missing"] > missing
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


@both_families
def test_with_an_empty_slot_nothing_leaves_the_pod(new_pod: Callable[..., Pod], port: int, family: Family) -> None:
    pod = new_pod()
    pod.enrol()
    pod.kernel.sockets.pop(slot_of("OUTBOUND", family)).close()
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(family.number)
        client.settimeout(1.5)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            client.connect((family.peer, port))
        assert wire.segments() == []


@both_families
@pytest.mark.parametrize("way", ["OUTBOUND", "PLAINTEXT"])
def test_who_waits_in_the_backlog_is_served_by_the_next_holder_of_the_listener(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family, way: str
) -> None:
    pod = new_pod()
    pod.enrol()
    slot = slot_of(way, family)
    first = pod.kernel.sockets[slot]
    successor = first.dup()
    app, target = (pod.app, family.peer) if way == "OUTBOUND" else (peer, pod.address(family))
    clients = [connect(app, family, target, port) for _ in range(5)]
    first.close()
    pod.kernel.sockets[slot] = successor
    clients.append(connect(app, family, target, port))
    for client in clients:
        client.sendall(b"early")
    for _ in clients:
        arrival = pod.accept(slot)
        assert arrival.destination == (target, port)
        assert arrival.socket.recv(100) == b"early"
        arrival.socket.close()
