"""ztunnel's listeners: what they are bound to, and which ports deliveries may use."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
from capture.topology import Netns
from hypothesis import given
from hypothesis import strategies as st

from undermesh.agent import listeners, netns
from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.gen import marks


@pytest.mark.parametrize(
    ("ephemeral", "ranges"),
    [
        ((32768, 60999), [(61000, 65535), (1024, 32767)]),
        ((1024, 60999), [(61000, 65535)]),
        ((1024, 65535), [(61000, 65535)]),
        ((1, 65535), [(61000, 65535)]),
        ((2000, 65535), [(1024, 1999)]),
        ((10000, 20000), [(20001, 65535), (1024, 9999)]),
    ],
)
def test_deliveries_use_ports_from_which_the_pod_does_not_draw(
    ephemeral: listeners.PortRange, ranges: list[listeners.PortRange]
) -> None:
    assert listeners.delivery_ports(ephemeral) == ranges


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_there_are_always_delivery_ports_and_they_avoid_the_range_where_any_others_exist(a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    ranges = listeners.delivery_ports((low, high))
    assert ranges
    for first, last in ranges:
        assert 1024 <= first <= last <= 65535
        if (low, high) != (1, 65535) and not (low <= 1024 and high == 65535):
            assert last < low or first > high


def test_slots_follow_the_families_of_the_namespace() -> None:
    assert listeners.wanted_slots(ipv6=True) == list(ListenerSlot)
    assert [slot.name for slot in listeners.wanted_slots(ipv6=False)] == ["OUTBOUND_V4", "PLAINTEXT_V4", "HBONE_V4"]


@pytest.fixture
def namespace() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


def close(made: dict[ListenerSlot, socket.socket]) -> None:
    for sock in made.values():
        sock.close()


@pytest.mark.root
def test_they_are_marked_transparent_reusable_and_share_one_port_on_loopback(namespace: Netns) -> None:
    made = netns.run_in(namespace.fd, lambda: listeners.make(ListenerSlot))
    assert list(made) == list(ListenerSlot)
    assert len({sock.getsockname()[1] for sock in made.values()}) == 1
    assert len({sock.getsockname()[0] for sock in made.values()}) == 6
    low, high = map(int, namespace.sysctl("ipv4/ip_local_port_range").split())
    for slot, sock in made.items():
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == marks.BYPASS
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert not sock.getblocking()
        level, option = (socket.IPPROTO_IPV6, 75) if slot.is_v6 else (socket.IPPROTO_IP, 19)
        assert sock.getsockopt(level, option) == 1
        assert not low <= sock.getsockname()[1] <= high
    close(made)


@pytest.mark.root
def test_ports_that_are_taken_or_declared_are_left_alone(namespace: Netns) -> None:
    namespace.sysctl("ipv4/ip_local_port_range", "1024 65532")
    taken = netns.run_in(namespace.fd, lambda: socket.create_server(("127.0.0.2", 65533)))
    for _ in range(20):
        made = netns.run_in(namespace.fd, lambda: listeners.make(ListenerSlot, avoid=[65534]))
        assert made[ListenerSlot.HBONE_V6].getsockname()[1] == 65535
        close(made)
    taken.close()


@pytest.mark.root
def test_when_no_port_is_free_the_error_is_the_kernels_and_nothing_is_left_open(namespace: Netns) -> None:
    namespace.sysctl("ipv4/ip_local_port_range", "1024 65534")
    taken = netns.run_in(namespace.fd, lambda: socket.create_server(("127.0.0.3", 65535)))
    with pytest.raises(OSError) as caught:
        netns.run_in(namespace.fd, lambda: listeners.make(ListenerSlot))
    assert caught.value.errno == errno.EADDRINUSE
    taken.close()
    made = netns.run_in(namespace.fd, lambda: listeners.make(ListenerSlot))
    assert len(made) == 6
    close(made)


@pytest.mark.root
def test_a_duplicate_is_the_same_socket_and_another_one_is_not(namespace: Netns) -> None:
    made = netns.run_in(namespace.fd, lambda: listeners.make([ListenerSlot.OUTBOUND_V4, ListenerSlot.HBONE_V4]))
    first, second = made.values()
    with first.dup() as duplicate:
        assert listeners.socket_cookie(duplicate) == listeners.socket_cookie(first)
    assert listeners.socket_cookie(first) != listeners.socket_cookie(second)
    close(made)


@pytest.mark.root
@pytest.mark.parametrize("slot", [slot for slot in ListenerSlot if not slot.is_v6])
def test_a_connection_towards_an_app_that_is_lost_right_after_its_accept_is_reset(
    namespace: Netns, slot: ListenerSlot
) -> None:
    def accept_and_lose() -> bytes:
        made = listeners.make([slot])
        try:
            made[slot].setblocking(True)
            with socket.create_connection(made[slot].getsockname(), timeout=5) as client:
                made[slot].accept()[0].close()
                return client.recv(1)
        finally:
            close(made)

    if slot.is_hbone:
        assert netns.run_in(namespace.fd, accept_and_lose) == b""
    else:
        with pytest.raises(ConnectionResetError):
            netns.run_in(namespace.fd, accept_and_lose)
