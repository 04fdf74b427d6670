"""Pods join and leave the mesh while they work: nothing breaks, and nothing stays behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from features import NFT_NAT, needs

from capture.harness import QUIET_S, Node, Pod, assert_talks, connect, listen, receive, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess
from capture.topology import V4, V6, Family, both_families, wait_until
from undermesh.agent.bpf import node_capture
from undermesh.agent.bpf.layout import EnrolmentFlags
from undermesh.agent.routing import RoutingError
from undermesh.gen import marks

pytestmark = pytest.mark.root


class Chatter:
    """Sends and receives on a connection without pause, until it is told to stop."""

    def __init__(self, one: object, other: object) -> None:
        self.rounds = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, args=(one, other))
        self._thread.start()

    def _talk(self, one: object, other: object) -> None:
        try:
            while not self._stop.is_set():
                assert_talks(one, other, b"x" * 20_000)
                self.rounds += 1
        except BaseException as e:  # noqa: BLE001 - raised by finish()
            self._failure = e

    def go_on(self) -> None:
        """Waits for whole rounds that began after this call."""
        seen = self.rounds
        assert wait_until(lambda: self._failure is not None or self.rounds >= seen + 2), "data stands still"
        self._check()

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


@both_families
def test_connections_from_before_live_through_enrolment_and_its_end(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family
) -> None:
    pod = new_pod()
    inward, outward = listen(pod.app, family, port), listen(peer, family, port)
    old = [
        Chatter(connect(peer, family, pod.address(family), port), inward.accept()[0]),
        Chatter(connect(pod.app, family, family.peer, port), outward.accept()[0]),
    ]
    steps: list[Callable[[], object]] = [
        pod.prepare,
        pod.kernel.ensure_inbound,
        lambda: pod.kernel.ensure_outbound(True),
        lambda: pod.kernel.ensure_outbound(False),
        pod.kernel.stop_inbound,
        lambda: pod.kernel.remove(namespace_lives=True),
    ]
    try:
        for step in steps:
            step()
            for chatter in old:
                chatter.go_on()
        assert pod.netns.sysctl("ipv4/tcp_fwmark_accept") == "0"
    finally:
        for chatter in old:
            chatter.finish()


@both_families
def test_connections_in_the_mesh_live_on_until_the_last_step_of_unenrolment(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family
) -> None:
    pod = new_pod()
    pod.enrol()
    server = listen(pod.app, family, port)
    client = connect(pod.app, family, family.peer, port)
    outward = pod.accept(slot_of("OUTBOUND", family)).socket
    stranger = connect(peer, family, pod.address(family), port)
    inward = pod.accept(slot_of("PLAINTEXT", family)).socket
    leg = pod.deliver(family, family.peer, port)
    app = server.accept()[0]
    chatters = [Chatter(client, outward), Chatter(stranger, inward), Chatter(leg, app)]
    try:
        for step in (lambda: pod.kernel.ensure_outbound(False), pod.kernel.stop_inbound):
            step()
            for chatter in chatters:
                chatter.go_on()
    finally:
        for chatter in chatters:
            chatter.finish()
    # New ones go directly meanwhile.
    direct = connect(peer, family, pod.address(family), port)
    assert_talks(direct, server.accept()[0])
    outside = listen(peer, family, port)
    assert_talks(connect(pod.app, family, family.peer, port), outside.accept()[0])


@pytest.fixture
def one_way(node: Node) -> Iterator[Callable[[Family, str], None]]:
    """Lets the node drop what comes from an address, until the end of the test or the next call."""
    needs(NFT_NAT)

    def drop(family: Family, source: str) -> None:
        kind = "ip" if family is V4 else "ip6"
        hook = "type filter hook forward priority 0"
        rules = f"table inet one_way {{\n chain f {{\n {hook}\n {kind} saddr {source} drop\n }}\n}}\n"
        node.network.node.run("nft", "-f", "-", stdin=rules)

    drop.lift = lambda: node.network.node.run("nft", "flush", "ruleset")  # type: ignore[attr-defined]
    yield drop
    node.network.node.run("nft", "flush", "ruleset")


@both_families
def test_a_handshake_under_way_is_finished_by_whom_it_began_with(
    new_pod: Callable[..., Pod],
    peer: RemoteProcess,
    port: int,
    family: Family,
    one_way: Callable[[Family, str], None],
) -> None:
    pod = new_pod()
    inward, outward = listen(pod.app, family, port), listen(peer, family, port)
    one_way(family, pod.address(family))
    one_way(family, family.peer)
    clients = [peer.socket(family.number), pod.app.socket(family.number)]
    for client in clients:
        client.settimeout(10)
    with Watch(pod.netns, "eth0") as wire:
        waiting = [clients[1].later.connect((family.peer, port))]
        assert wait_until(lambda: wire.syns(port, settle=0.01))
    one_way.lift()  # type: ignore[attr-defined]
    one_way(family, pod.address(family))
    with Watch(pod.netns, "eth0") as wire:
        waiting.append(clients[0].later.connect((pod.address(family), port)))
        assert wait_until(lambda: wire.syns(port, settle=0.01))
    pod.enrol()
    one_way.lift()  # type: ignore[attr-defined]
    for done in waiting:
        done.result(15)
    assert_talks(clients[0], inward.accept()[0])
    assert_talks(clients[1], outward.accept()[0])
    assert pod.arrivals(0) == []


def _network_state(pod: Pod) -> dict[str, str]:
    state = {f"rules of {f.name}": pod.netns.ip_of(f, "rule") for f in (V4, V6)}
    state |= {f"routes of {f.name}": pod.netns.ip_of(f, "route show table all") for f in (V4, V6)}
    names = ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "ipv4/ip_local_port_range")
    return state | {name: pod.netns.sysctl(name) for name in names}


@pytest.mark.parametrize("accept", ["0", "1"])
@pytest.mark.parametrize("wiring", ["routed", "bridged", "with rules of others", "without IPv6"])
def test_unenrolment_restores_the_namespace_to_the_byte(
    new_pod: Callable[..., Pod], node: Node, wiring: str, accept: str
) -> None:
    pod = new_pod(bridged=wiring == "bridged", ipv6=wiring != "without IPv6")
    pod.netns.sysctl("ipv4/tcp_fwmark_accept", accept)
    if wiring == "with rules of others":
        for family in (V4, V6):
            pod.netns.ip_of(family, "rule add pref 100 fwmark 0x1 lookup 1338")
            pod.netns.ip_of(family, "route add default dev eth0 table 1338")
    entries = {name: node.capture.maps[name].entries() for name in ("enrolled", "pods", "pod_devices")}
    # Neighbour discovery settles first: it adds routes of its own.
    before = _network_state(pod)
    assert wait_until(lambda: "tentative" not in pod.netns.run("ip", "addr"))
    before = _network_state(pod)
    pod.enrol()
    assert _network_state(pod) != before
    pod.unenrol()
    assert _network_state(pod) == before
    assert not (node.pins / "pods" / pod.uid).exists()
    assert not pod.kernel.sockets
    for name, held in entries.items():
        assert node.capture.maps[name].entries() == held


@both_families
def test_a_pod_can_come_back(new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family) -> None:
    pod = new_pod()
    for _ in range(2):
        pod.enrol()
        client = connect(pod.app, family, family.peer, port)
        assert_talks(client, pod.accept(slot_of("OUTBOUND", family)).socket)
        pod.kernel.ensure_outbound(False)
        pod.kernel.stop_inbound()
        server = listen(pod.app, family, port)
        assert_talks(connect(peer, family, pod.address(family), port), server.accept()[0])
        server.close()


@pytest.mark.parametrize("preference", [1, 5, 8])
@both_families
def test_a_rule_of_others_ahead_of_ours_is_a_clear_error_and_nothing_is_captured(
    new_pod: Callable[..., Pod], family: Family, preference: int
) -> None:
    pod = new_pod()
    pod.netns.ip_of(family, f"rule add pref {preference} fwmark 0x1 lookup 77")
    with pytest.raises(RoutingError, match=f"preference {preference}, ahead of"):
        pod.enrol()
    assert pod.kernel.present_flags == EnrolmentFlags(0)


@both_families
def test_rules_of_others_behind_ours_are_no_hindrance(new_pod: Callable[..., Pod], port: int, family: Family) -> None:
    pod = new_pod()
    pod.netns.ip_of(family, "rule add pref 100 lookup 100")
    pod.netns.ip_of(family, "route add default dev eth0 table 100")
    pod.enrol()
    client = connect(pod.app, family, family.peer, port)
    assert_talks(client, pod.accept(slot_of("OUTBOUND", family)).socket)


# === IPv6 off and on ===


def test_a_pod_without_ipv6_is_enrolled_for_ipv4(new_pod: Callable[..., Pod], peer: RemoteProcess, port: int) -> None:
    pod = new_pod(ipv6=False)
    pod.enrol()
    assert [slot.is_v6 for slot in pod.kernel.sockets] == [False] * 3
    assert_talks(connect(pod.app, V4, V4.peer, port), pod.accept(slot_of("OUTBOUND", V4)).socket)
    assert_talks(connect(peer, V4, pod.address(V4), port), pod.accept(slot_of("PLAINTEXT", V4)).socket)
    assert pod.mend() == []


def test_ipv6_that_is_switched_on_later_leaks_nothing_and_is_captured_when_the_agent_has_seen_it(
    new_pod: Callable[..., Pod], node: Node, peer: RemoteProcess, port: int
) -> None:
    pod = new_pod(ipv6=False)
    pod.enrol()
    for conf in ("all", "default", "lo", "eth0"):
        pod.netns.sysctl(f"ipv6/conf/{conf}/disable_ipv6", "0")
    address = V6.pod(250)
    pod.netns.ip(f"addr add {address}/128 dev eth0 nodad", "route add default via fe80::1 dev eth0")
    gateway = next(name for name in node.network.node.interfaces() if name == f"p{pod.addresses[4].split('.')[-1]}")
    node.network.node.ip(f"route add {address}/128 dev {gateway}")
    server = listen(pod.app, V6, port)
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(socket.AF_INET6)
        client.settimeout(QUIET_S)
        with pytest.raises(OSError):
            client.connect((V6.peer, port))
        assert wire.syns() == []
        client.close()
    stranger = peer.socket(socket.AF_INET6)
    stranger.settimeout(QUIET_S)
    with pytest.raises(OSError):
        stranger.connect((address, port))
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()

    pod.addresses[6] = address
    assert pod.mend()
    assert_talks(connect(pod.app, V6, V6.peer, port), pod.accept(slot_of("OUTBOUND", V6)).socket)
    assert_talks(connect(peer, V6, address, port), pod.accept(slot_of("PLAINTEXT", V6)).socket)
    assert pod.mend() == []


# === the namespace goes ===


def test_a_namespace_lives_only_as_long_as_we_keep_its_fds(new_pod: Callable[..., Pod], node: Node) -> None:
    pod = new_pod()
    pod.enrol()
    veth = f"p{pod.addresses[4].split('.')[-1]}"
    os.close(pod.netns.fd)
    pod.netns.fd = -1
    assert veth in node.network.node.interfaces()
    pod.kernel.remove(namespace_lives=False)
    assert wait_until(lambda: veth not in node.network.node.interfaces())
    assert not (node.pins / "pods" / pod.uid).exists()


def test_enrolment_is_idempotent(new_pod: Callable[..., Pod], port: int) -> None:
    pod = new_pod()
    pod.enrol()
    state = _network_state(pod)
    assert pod.mend() == []
    assert _network_state(pod) == state


@both_families
def test_capture_holds_while_the_programs_are_replaced(pod: Pod, node: Node, port: int, family: Family) -> None:
    """An agent that starts anew loads its own programs over the pinned maps and adopts the links."""
    client = connect(pod.app, family, family.peer, port)
    held = pod.accept(slot_of("OUTBOUND", family)).socket
    successor = node_capture.load(node.context.objects, node.pins, node.root)
    assert successor.attach() == []
    assert_talks(client, held)
    assert_talks(connect(pod.app, family, family.peer, port), pod.accept(slot_of("OUTBOUND", family)).socket)
    successor.close()


def test_deliveries_are_told_from_captured_connections_by_their_mark(pod: Pod, port: int) -> None:
    server = listen(pod.app, V4, port)
    leg = pod.deliver(V4, V4.peer, port)
    assert server.accept()[0].getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == marks.DELIVERY
    client = connect(pod.app, V4, V4.peer, port)
    outward = pod.accept(slot_of("OUTBOUND", V4)).socket
    assert outward.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == marks.ANSWER
    client.sendall(b"x")
    assert receive(outward, 1) == b"x"
    leg.close()
    server.close()
