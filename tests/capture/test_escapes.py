"""Ways by which an app with CAP_NET_RAW, or a program of others, could leave the pod past ztunnel; none works."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from capture.compiler import compile_bpf, compile_library
from capture.harness import Node, Pod, assert_talks, connect, listen, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess, RemoteSocket
from capture.topology import V4, Family, both_families
from undermesh.agent.bpf import libbpf
from undermesh.agent.bpf.layout import u32
from undermesh.agent.bpf.libbpf import AttachType
from undermesh.gen import marks

pytestmark = pytest.mark.root

TCP_FASTOPEN_CONNECT = 30
TCP_FASTOPEN_NO_COOKIE = 34
MARK = (socket.SOL_SOCKET, socket.SO_MARK)
every_mark = pytest.mark.parametrize("mark", [pytest.param(value, id=name) for name, value in marks.ALL.items()])


def mark_of(sock: RemoteSocket) -> int:
    return int(sock.getsockopt(*MARK))


# === marks ===


@every_mark
@both_families
def test_an_app_cannot_take_one_of_our_marks(pod: Pod, family: Family, mark: int) -> None:
    refused = pod.node.capture.counters()["mark_refused"]
    sock = pod.app.socket(family.number)
    with pytest.raises(PermissionError):
        sock.setsockopt(*MARK, mark)
    assert mark_of(sock) == 0
    assert pod.node.capture.counters()["mark_refused"] == refused + 1


@pytest.mark.parametrize("length", [5, 8, 64, 4096, 4097, 65536])
def test_a_mark_in_a_longer_buffer_is_seen_too(pod: Pod, length: int) -> None:
    sock = pod.app.socket(socket.AF_INET)
    with pytest.raises(PermissionError):
        sock.set_option_long(*MARK, struct.pack("=I", marks.BYPASS), length)
    sock.set_option_long(*MARK, struct.pack("=I", 7), length)
    assert mark_of(sock) == 7


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(Path(__file__).with_name("race.c"), tmp_path_factory.mktemp("race"))


@pytest.mark.parametrize("length", [4, 8, 4096, 65536])
def test_a_thread_that_rewrites_the_buffer_meanwhile_gets_no_mark_of_ours(pod: Pod, race: Path, length: int) -> None:
    sock = pod.app.socket(socket.AF_INET)
    assert sock.race_mark(str(race), length, marks.BYPASS, 7, 300_000) == 0


def test_other_long_options_still_work(pod: Pod) -> None:
    """The hook must not truncate what is longer than the kernel copies for it."""
    sock = pod.app.socket(socket.AF_INET)
    sock.set_option_long(socket.SOL_SOCKET, socket.SO_KEEPALIVE, struct.pack("=I", 1), 8192)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@both_families
def test_a_captured_socket_keeps_its_mark_and_stays_captured(pod: Pod, port: int, family: Family) -> None:
    with Watch(pod.netns, "eth0") as wire:
        client = connect(pod.app, family, family.peer, port)
        arrival = pod.accept(slot_of("OUTBOUND", family))
        for mark in (0, 7, marks.BYPASS):
            with pytest.raises(PermissionError):
                client.setsockopt(*MARK, mark)
        assert_talks(client, arrival.socket)
        assert wire.segments() == []


@both_families
def test_the_answers_to_a_delivery_cannot_be_marked_away(pod: Pod, port: int, family: Family) -> None:
    """They would leave the pod in plaintext, towards the client."""
    server = listen(pod.app, family, port)
    leg = pod.deliver(family, family.peer, port)
    accepted, _ = server.accept()
    with Watch(pod.netns, "eth0") as wire:
        for mark in (0, 7, marks.BYPASS):
            with pytest.raises(PermissionError):
                accepted.setsockopt(*MARK, mark)
        assert_talks(leg, accepted)
        assert wire.segments() == []
    leg.close()
    server.close()


@both_families
def test_a_deferred_syn_cannot_be_marked_away(pod: Pod, port: int, family: Family) -> None:
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(family.number)
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect((family.peer, port))
        with pytest.raises(PermissionError):
            client.setsockopt(*MARK, 7)
        client.sendall(b"early")
        assert pod.accept(slot_of("OUTBOUND", family)).socket.recv(100) == b"early"
        assert wire.segments() == []


@both_families
@every_mark
def test_a_mark_from_before_enrolment_is_worth_nothing_after_it(
    new_pod: Callable[..., Pod], port: int, family: Family, mark: int
) -> None:
    pod = new_pod()
    client = pod.app.socket(family.number)
    client.setsockopt(*MARK, mark)
    client.settimeout(5)
    pod.enrol()
    with Watch(pod.netns, "eth0") as wire:
        client.connect((family.peer, port))
        assert_talks(client, pod.accept(slot_of("OUTBOUND", family)).socket)
        assert wire.segments() == []


@both_families
@pytest.mark.parametrize("outbound", [pytest.param(True, id="captured"), pytest.param(False, id="inbound only")])
def test_an_accepted_socket_that_is_used_again_takes_no_delivery_mark_outside(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family, outbound: bool
) -> None:
    pod = new_pod()
    pod.enrol(outbound)
    server = listen(pod.app, family, port)
    leg = pod.deliver(family, family.peer, port)
    accepted, _ = server.accept()
    assert mark_of(accepted) == marks.DELIVERY
    server.close()
    accepted.disconnect()
    accepted.settimeout(5)
    outside = listen(peer, family, port)
    accepted.connect((family.peer, port))
    if outbound:
        assert_talks(accepted, pod.accept(slot_of("OUTBOUND", family)).socket)
    else:
        assert_talks(accepted, outside.accept()[0])
        assert mark_of(accepted) == 0
    leg.close()


# === a socket that is connected again ===

PLACES = ("outside", "loopback", "own")


@both_families
@pytest.mark.parametrize("second", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_each_connect_of_a_socket_is_decided_afresh(
    pod: Pod, port: int, family: Family, first: str, second: str
) -> None:
    addresses = {"outside": family.peer, "loopback": family.loopback, "own": pod.address(family)}
    server = listen(pod.app, family, port)
    client = pod.app.socket(family.number)
    client.settimeout(5)
    with Watch(pod.netns, "eth0") as wire:
        for place in (first, second):
            client.connect((addresses[place], port))
            if place == "outside":
                arrival = pod.accept(slot_of("OUTBOUND", family))
                assert arrival.destination == (family.peer, port)
                assert_talks(client, arrival.socket)
            else:
                assert_talks(client, server.accept()[0])
                assert pod.arrivals(0) == []
            client.disconnect()
        assert wire.segments() == []
    server.close()
    client.close()


@both_families
@pytest.mark.parametrize("outbound_only", [pytest.param(True, id="inbound still on"), pytest.param(False, id="gone")])
def test_a_captured_socket_that_is_used_again_after_unenrolment_goes_out_directly(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family, outbound_only: bool
) -> None:
    pod = new_pod()
    pod.enrol()
    client = connect(pod.app, family, family.peer, port, [(*MARK, 7)])
    pod.accept(slot_of("OUTBOUND", family)).socket.close()
    if outbound_only:
        pod.kernel.ensure_outbound(False)
    else:
        pod.unenrol()
    server = listen(peer, family, port)
    client.disconnect()
    client.connect((family.peer, port))
    assert_talks(client, server.accept()[0])
    assert mark_of(client) == 7


# === programs of others in the same hooks ===


@dataclass
class Foreign:
    """Another project's connect programs, attached before or after ours."""

    map: libbpf.Map

    def rewrite(self, family: Family, service: tuple[str, int], backend: tuple[str, int]) -> None:
        def words(address: str) -> bytes:
            return socket.inet_pton(family.number, address).rjust(16, b"\0")

        value = words(service[0]) + words(backend[0]) + struct.pack("=II", service[1], backend[1])
        self.map.update(u32(0 if family is V4 else 1), value)


@pytest.fixture(params=["before ours", "after ours"])
def foreign(request: pytest.FixtureRequest, node: Node, tmp_path: Path) -> Iterator[Foreign]:
    """A child's programs run before its parent's, and those of one cgroup in the order of attachment."""
    group = os.open(node.root / "kubepods.slice" if request.param == "before ours" else node.root, os.O_RDONLY)
    hooks = {"foreign_connect4": AttachType.CGROUP_INET4_CONNECT, "foreign_connect6": AttachType.CGROUP_INET6_CONNECT}
    with libbpf.Object(compile_bpf(Path(__file__).with_name("foreign.bpf.c"), tmp_path)) as programs:
        programs.load()
        links = [libbpf.link_create(programs.program_fd(name), group, hook, name) for name, hook in hooks.items()]
        rewrites = programs.map("rewrites")
        yield Foreign(rewrites)
        rewrites.close()
        for link in links:
            os.close(link)
    os.close(group)


@both_families
@pytest.mark.parametrize("service", ["a service address", "loopback"])
def test_what_others_rewrite_to_the_outside_is_captured_with_the_address_that_counts(
    foreign: Foreign, pod: Pod, port: int, family: Family, service: str
) -> None:
    dialled = (family.loopback if service == "loopback" else family.foreign, port)
    foreign.rewrite(family, dialled, (family.peer, port + 1000))
    with Watch(pod.netns, "eth0") as wire:
        client = connect(pod.app, family, *dialled)
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.destination == (family.peer, port + 1000)
        assert_talks(client, arrival.socket)
        assert wire.segments() == []


@both_families
@pytest.mark.parametrize("backend", ["loopback", "own"])
def test_what_others_rewrite_into_the_pod_meets_the_app(
    foreign: Foreign, pod: Pod, port: int, family: Family, backend: str
) -> None:
    server = listen(pod.app, family, port)
    foreign.rewrite(
        family, (family.foreign, port), (family.loopback if backend == "loopback" else pod.address(family), port)
    )
    client = connect(pod.app, family, family.foreign, port)
    assert_talks(client, server.accept()[0])
    assert pod.arrivals(0.05) == []
    assert mark_of(client) == (0 if backend == "loopback" else marks.CAPTURE)
    server.close()
