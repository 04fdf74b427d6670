"""A 4-tuple serves again at once, however its last connection ended: nothing of that is in the way of the new SYN.

Both ends of a captured connection, and of a delivery, live in the pod's netns. What the kernel answers for an end that
is gone (the last ACK, resets) must reach the other one there; else that stays in LAST_ACK or CLOSE_WAIT, and answers
the next SYN in a way that the client cannot use.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from capture.harness import HBONE_PORT, Pod, assert_talks, listen, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess
from capture.topology import Family, both_families

pytestmark = pytest.mark.root

SETTLE_S: Final = 0.02
# Above the kernel's first two tries of a SYN, far below TIME_WAIT and the time that LAST_ACK takes to give up.
RECONNECT_S: Final = 5.0
TCP_REPAIR: Final = 19
LINGER: Final = (socket.SOL_SOCKET, socket.SO_LINGER)
RESET, CLEAN = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
DEVICE: Final = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")


# === how a connection ends; what is left open is returned ===


def client_first(client: Any, server: Any) -> list[Any]:
    client.close()
    assert server.recv(1) == b""
    time.sleep(SETTLE_S)  # the client has only its FIN_WAIT2 left
    server.close()
    return []


def server_first(client: Any, server: Any) -> list[Any]:
    server.close()
    assert client.recv(1) == b""
    time.sleep(SETTLE_S)
    client.close()
    return []


def client_resets(client: Any, server: Any) -> list[Any]:
    client.setsockopt(*LINGER, RESET)
    client.close()
    return [server]


def server_resets(client: Any, server: Any) -> list[Any]:
    server.setsockopt(*LINGER, RESET)
    server.close()
    time.sleep(SETTLE_S)
    client.close()
    return []


def client_leaves_data_unread(client: Any, server: Any) -> list[Any]:
    server.sendall(b"unread")
    time.sleep(SETTLE_S)
    client.close()
    return [server]


def server_goes_on_sending(client: Any, server: Any) -> list[Any]:
    client.close()
    time.sleep(SETTLE_S)
    server.sendall(b"to nobody")
    return [server]


def server_sends_and_closes_when_the_client_is_gone(client: Any, server: Any) -> list[Any]:
    client.close()
    time.sleep(SETTLE_S)
    server.sendall(b"to nobody")
    server.close()
    return []


def client_vanishes(client: Any, server: Any) -> list[Any]:
    """As after FIN_WAIT2 has run out, or user timeouts: the server's end knows of nothing."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.close()
    return [server]


def server_sends_to_a_client_that_vanished(client: Any, server: Any) -> list[Any]:
    client_vanishes(client, server)
    server.sendall(b"to nobody")
    return [server]


ENDS: Final[list[Callable[[Any, Any], list[Any]]]] = [
    client_first,
    server_first,
    client_resets,
    server_resets,
    client_leaves_data_unread,
    server_goes_on_sending,
    server_sends_and_closes_when_the_client_is_gone,
    client_vanishes,
    server_sends_to_a_client_that_vanished,
]


# === what kind of connection it is ===


@dataclass(frozen=True)
class Setting:
    pod: Pod
    peer: RemoteProcess
    family: Family
    port: int

    @property
    def source_port(self) -> int:
        return 30_000 + self.port

    def dial(self, client: Any, source: str, target: str, port: int) -> Any:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((source, self.source_port))
        client.settimeout(RECONNECT_S)
        client.connect((target, port))
        return client


def outbound(its: Setting) -> tuple[Any, Any]:
    client = its.pod.app.socket(its.family.number)
    its.dial(client, its.pod.address(its.family), its.family.peer, its.port)
    return client, its.pod.accept(slot_of("OUTBOUND", its.family)).socket


def outbound_by_a_device(its: Setting) -> tuple[Any, Any]:
    client = its.pod.app.socket(its.family.number)
    client.setsockopt(*DEVICE)
    its.dial(client, its.pod.address(its.family), its.family.peer, its.port)
    return client, its.pod.accept(slot_of("OUTBOUND", its.family)).socket


def delivery(its: Setting) -> tuple[Any, Any]:
    server = listen(its.pod.app, its.family, its.port)
    try:
        leg = its.pod.deliver(its.family, its.family.peer, its.port, its.source_port, RECONNECT_S)
        return leg, server.accept()[0]
    finally:
        server.close()


def tunnel(its: Setting) -> tuple[Any, Any]:
    client = its.peer.socket(its.family.number)
    its.dial(client, its.family.peer, its.pod.address(its.family), HBONE_PORT)
    return client, its.pod.accept(slot_of("HBONE", its.family)).socket


CASES: Final = [
    pytest.param(kind, end, id=f"{kind.__name__}-{end.__name__}")
    for kind in (outbound, outbound_by_a_device, delivery, tunnel)
    for end in ENDS
    # The server's TIME_WAIT answers by way of lo, where a client that is bound to another device hears nothing.
    if (kind, end) != (outbound_by_a_device, server_first)
]


def reuse(its: Setting, kind: Callable[[Setting], tuple[Any, Any]], end: Callable[[Any, Any], list[Any]]) -> None:
    with Watch(its.pod.netns, "eth0") as wire:
        client, server = kind(its)
        assert_talks(client, server)
        server.setsockopt(*LINGER, CLEAN)  # ztunnel's ends reset by default
        client.setsockopt(*LINGER, CLEAN)
        left = end(client, server)
        time.sleep(SETTLE_S)
        again, its_server = kind(its)
        assert_talks(again, its_server)
        if kind is not tunnel:
            assert [s for s in wire.segments(SETTLE_S) if its.port in (s.source_port, s.destination_port)] == []
    for sock in (again, its_server, *left):
        sock.setsockopt(*LINGER, RESET)
        sock.close()


@both_families
@pytest.mark.parametrize(("kind", "end"), CASES)
def test_the_same_4_tuple_connects_again_at_once(
    pod: Pod,
    peer: RemoteProcess,
    port: int,
    family: Family,
    kind: Callable[[Setting], tuple[Any, Any]],
    end: Callable[[Any, Any], list[Any]],
) -> None:
    reuse(Setting(pod, peer, family, port), kind, end)


@pytest.fixture
def without_timestamps(pod: Pod) -> Iterator[None]:
    pod.netns.sysctl("ipv4/tcp_timestamps", "0")
    yield
    pod.netns.sysctl("ipv4/tcp_timestamps", "1")


@both_families
@pytest.mark.usefixtures("without_timestamps")
@pytest.mark.parametrize("end", ENDS[1:], ids=lambda end: end.__name__)  # a client in TIME_WAIT keeps its 4-tuple
def test_it_takes_no_timestamps(
    pod: Pod, peer: RemoteProcess, port: int, family: Family, end: Callable[[Any, Any], list[Any]]
) -> None:
    reuse(Setting(pod, peer, family, port), outbound, end)
