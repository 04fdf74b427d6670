"""No port of the pod is taken from its apps, whatever connections of ours use the same number."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from capture.harness import HBONE_PORT, Pod, assert_talks, connect, listen, slot_of
from capture.remote import RemoteProcess
from capture.topology import Family, both_families

pytestmark = pytest.mark.root

reuse = pytest.mark.parametrize("reuse", [pytest.param(True, id="SO_REUSEADDR"), pytest.param(False, id="without")])


def bind(app: RemoteProcess, family: Family, address: str, port: int, reuse: bool):  # type: ignore[no-untyped-def]
    server = app.socket(family.number)
    if reuse:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen(8)
    server.settimeout(5)
    return server


@both_families
@reuse
@pytest.mark.parametrize("port", [15001, 15006, 15008, 15021, 15090])
def test_ports_that_other_meshes_take_are_free(pod: Pod, family: Family, port: int, reuse: bool) -> None:
    bind(pod.app, family, family.any, port, reuse).close()


@both_families
@reuse
@pytest.mark.parametrize("address", ["any", "own"])
@pytest.mark.parametrize("kind", ["outbound", "inbound", "tunnel", "delivery"])
def test_an_app_binds_and_binds_again_a_port_that_connections_use(
    pod: Pod, peer: RemoteProcess, port: int, family: Family, reuse: bool, address: str, kind: str
) -> None:
    number = HBONE_PORT if kind == "tunnel" else port
    held = []
    if kind == "outbound":
        held += [connect(pod.app, family, family.peer, number), pod.accept(slot_of("OUTBOUND", family)).socket]
    elif kind == "delivery":
        server = listen(pod.app, family, number)
        held += [pod.deliver(family, family.peer, number), server.accept()[0]]
        server.close()
    else:
        slot = slot_of("HBONE" if kind == "tunnel" else "PLAINTEXT", family)
        held += [connect(peer, family, pod.address(family), number), pod.accept(slot).socket]
    for _ in range(2):
        server = bind(pod.app, family, family.any if address == "any" else pod.address(family), number, reuse)
        leg = pod.deliver(family, family.foreign, number)
        accepted, _ = server.accept()
        assert_talks(leg, accepted)
        # The app's side closes first: its socket stays in TIME_WAIT for the next round.
        accepted.close()
        assert leg.recv(1) == b""
        leg.close()
        server.close()
    assert_talks(held[0], held[1])
    for sock in held:
        sock.close()


@both_families
def test_an_app_in_time_wait_restarts_at_once(pod: Pod, port: int, family: Family) -> None:
    for _ in range(3):
        server = bind(pod.app, family, pod.address(family), port, reuse=False)
        client = connect(pod.app, family, pod.address(family), port)
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""
        client.close()
        server.close()


@both_families
def test_an_ephemeral_port_is_left_to_the_kernel(pod: Pod, family: Family) -> None:
    server = pod.app.socket(family.number)
    server.bind((family.any, 0))
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    server.close()


@both_families
def test_two_listeners_never_share_a_port(pod: Pod, port: int, family: Family) -> None:
    """What the forced SO_REUSEADDR must not bring about; a second bind alone does succeed (documented)."""
    first = bind(pod.app, family, family.any, port, reuse=False)
    second = pod.app.socket(family.number)
    with pytest.raises(OSError, match="in use"):
        second.bind((family.any, port))
        second.listen(8)
    first.close()


@both_families
def test_apps_outside_of_the_mesh_keep_their_options(new_pod: Callable[..., Pod], port: int, family: Family) -> None:
    pod = new_pod()
    server = bind(pod.app, family, family.any, port, reuse=False)
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0


@both_families
@reuse
def test_a_client_may_connect_from_a_port_of_its_choice(pod: Pod, port: int, family: Family, reuse: bool) -> None:
    """As bindresvport() does; the same port serves several destinations, in TIME_WAIT too."""
    for target in (family.peer, family.foreign, family.node):
        client = pod.app.socket(family.number)
        if reuse:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((family.any, 30_000 + port))
        client.settimeout(5)
        client.connect((target, port))
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.client[1] == 30_000 + port
        assert_talks(client, arrival.socket)
        client.close()
        arrival.socket.close()
