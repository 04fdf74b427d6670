"""Lane attested: allowed pairs talk kernel to kernel, and nobody else passes for them.

The tests are the agent and ztunnel: what `AttestedLane.allow` is told stands for what ztunnel decided.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from capture.harness import QUIET_S, Node, Pod, assert_talks, connect, listen, receive, slot_of
from capture.remote import RemoteProcess, RemoteSocket
from capture.topology import V4, V6, Family, both_families, wait_until
from undermesh.agent import netns
from undermesh.agent.attested_lane import Pair
from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import Flow, PairCounts, Verdict, VerdictKey
from undermesh.gen import marks

pytestmark = pytest.mark.root

_IP_FREEBIND_TRANSPARENT = {4: (socket.IPPROTO_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}
_SYN = 0x02


@pytest.fixture(autouse=True)
def lane(node: Node) -> Iterator[None]:
    """On, with no connection of an earlier test: workers keep their sockets."""
    node.lane.open()
    for connection in node.lane.connections():
        node.lane._end(connection)
    assert wait_until(lambda: node.lane.connections() == [])
    yield
    node.lane.close()


@pytest.fixture(scope="module")
def caller(node: Node) -> Pod:
    return node.enrolled_pod()


@pytest.fixture(scope="module")
def callee(node: Node) -> Pod:
    return node.enrolled_pod()


def pair(caller: Pod, callee: Pod, family: Family, port: int) -> Pair:
    source, destination = (ipaddress.ip_address(pod.address(family)) for pod in (caller, callee))
    return Pair(caller.uid, callee.uid, source, destination, port)


def allow(caller: Pod, callee: Pod, family: Family, port: int) -> Pair:
    allowed = pair(caller, callee, family, port)
    assert caller.node.lane.allow(allowed) == ""
    return allowed


def counts(node: Node, of: Pair) -> PairCounts:
    return dict(node.lane.counts())[of]


def assert_direct(client: RemoteSocket, server: RemoteSocket) -> RemoteSocket:
    """The app itself has the connection, and sees who calls."""
    accepted, address = server.accept()
    assert address[:2] == client.getsockname()[:2]
    assert_talks(client, accepted)
    return accepted


def assert_captured(caller: Pod, family: Family, client: RemoteSocket, destination: tuple[str, int]) -> None:
    arrival = caller.accept(slot_of("OUTBOUND", family))
    assert arrival.destination == destination
    assert arrival.client == client.getsockname()[:2]
    arrival.socket.close()


def assert_nothing_accepted(server: RemoteSocket) -> None:
    server.settimeout(QUIET_S)
    with pytest.raises(TimeoutError):
        server.accept()


# === what it is for ===


@both_families
def test_an_allowed_pair_talks_without_a_proxy(node: Node, caller: Pod, callee: Pod, port: int, family: Family) -> None:
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    client = connect(caller.app, family, callee.address(family), port)
    assert client.getpeername()[:2] == (callee.address(family), port)
    accepted = assert_direct(client, server)
    assert [c.flow.destination_port for c in node.lane.connections()] == [port]
    assert caller.arrivals(0.05) == callee.arrivals(0.05) == []
    for sock in (client, accepted, server):
        sock.close()
    assert wait_until(lambda: node.lane.connections() == []), "what was noted of the connection outlives it"


def test_an_ipv4_mapped_socket_is_attested_too(caller: Pod, callee: Pod, port: int) -> None:
    server = listen(callee.app, V4, port)
    allow(caller, callee, V4, port)
    client = connect(caller.app, V6, f"::ffff:{callee.address(V4)}", port)
    accepted, _ = server.accept()
    assert_talks(client, accepted)
    assert caller.arrivals(0.05) == []


@both_families
def test_a_large_backlog_answers_with_cookies(callee: Pod, caller: Pod, port: int, family: Family) -> None:
    """The last ACK of the handshake then finds no request, and asks the program once more."""
    callee.netns.sysctl("ipv4/tcp_syncookies", "2")
    try:
        server = listen(callee.app, family, port)
        allow(caller, callee, family, port)
        assert_direct(connect(caller.app, family, callee.address(family), port), server)
    finally:
        callee.netns.sysctl("ipv4/tcp_syncookies", "1")


@both_families
def test_a_refused_connect_is_the_kernels_own_error(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family
) -> None:
    allowed = allow(caller, callee, family, port)
    with pytest.raises(ConnectionRefusedError):
        connect(caller.app, family, callee.address(family), port)
    assert counts(node, allowed) == PairCounts(failed=1)


@both_families
@pytest.mark.parametrize("first", ["caller", "callee", "half-close"])
def test_counts_are_the_bytes_of_the_apps(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family, first: str
) -> None:
    server = listen(callee.app, family, port)
    allowed = allow(caller, callee, family, port)
    for _ in range(2):
        client = connect(caller.app, family, callee.address(family), port)
        accepted, _ = server.accept()
        client.sendall(b"q" * 70_000)
        assert receive(accepted, 70_000) == b"q" * 70_000
        accepted.sendall(b"a" * 300)
        assert receive(client, 300) == b"a" * 300
        if first == "half-close":
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(1) == b""
            accepted.sendall(b"b" * 50)
            assert receive(client, 50) == b"b" * 50
        early, late = (accepted, client) if first == "callee" else (client, accepted)
        if first == "half-close":
            early, late = late, early
        early.close()
        assert late.recv(1) == b""
        late.close()
    received = 700 if first == "half-close" else 600
    wanted = PairCounts(opened=2, closed=2, failed=0, sent=140_000, received=received)
    assert wait_until(lambda: counts(node, allowed) == wanted), counts(node, allowed)


def test_bpftool_shows_the_maps_as_tables(node: Node, caller: Pod, callee: Pod, port: int) -> None:
    allow(caller, callee, V4, port)
    command = ["bpftool", "map", "dump", "pinned", str(node.pins / "maps" / "verdicts"), "-j"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    found = [row["formatted"] for row in rows]
    assert {(row["key"]["port"], row["value"]["pod"]) for row in found} == {(port, callee.kernel.record.pod_id)}


# === what no verdict covers takes the tunnel ===


@pytest.mark.parametrize(
    ("family", "case"),
    [(V4, case) for case in ("no verdict", "withdrawn", "suspended", "closed", "other port", "device", "stale")]
    + [(V6, case) for case in ("no verdict", "stale")],
)
def test_without_a_verdict_that_holds_the_connection_is_captured(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family, case: str
) -> None:
    server = listen(callee.app, family, port)
    options: list[tuple[int, int, bytes]] = []
    allowed = pair(caller, callee, family, port)
    if case != "no verdict":
        allow(caller, callee, family, port + 20_000 if case == "other port" else port)
    match case:
        case "withdrawn":
            node.lane.withdraw(allowed)
        case "suspended":
            node.lane.suspend()
        case "closed":
            node.lane.close()
        case "device":
            options = [(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")]
        case "stale":
            key = VerdictKey(allowed.destination, caller.kernel.record.pod_id, port).pack()
            old = node.capture.maps["verdicts"].lookup(key)
            assert old is not None
            node.lane.open()
            node.capture.maps["verdicts"].update(key, old)
    client = connect(caller.app, family, callee.address(family), port, options)
    assert_captured(caller, family, client, (callee.address(family), port))
    assert_nothing_accepted(server)
    if case == "suspended":
        node.lane.resume()
        server.settimeout(10)
        assert_direct(connect(caller.app, family, callee.address(family), port), server)


@both_families
def test_a_foreign_source_address_is_not_the_callers(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family
) -> None:
    """With NET_RAW a pod may bind to any address (IP_TRANSPARENT): policy has not judged that one."""
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    client = caller.app.socket(family.number)
    client.settimeout(QUIET_S)
    client.setsockopt(*_IP_FREEBIND_TRANSPARENT[family.version], 1)
    client.bind((family.foreign, 0))
    with pytest.raises(OSError, match=r"timed out|refused|reset"):
        client.connect((callee.address(family), port))
    assert node.lane.connections() == []
    assert_nothing_accepted(server)


def test_our_marks_are_refused_and_others_change_nothing(caller: Pod, callee: Pod, port: int) -> None:
    server = listen(callee.app, V4, port)
    allow(caller, callee, V4, port)
    client = connect(caller.app, V4, callee.address(V4), port, [(socket.SOL_SOCKET, socket.SO_MARK, 77)])
    for mark in marks.ALL.values():
        with pytest.raises(PermissionError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    assert_direct(client, server)


def test_a_socket_that_was_captured_before_is_attested_when_it_connects_again(
    caller: Pod, callee: Pod, port: int
) -> None:
    server = listen(callee.app, V4, port)
    client = connect(caller.app, V4, callee.address(V4), port)
    assert_captured(caller, V4, client, (callee.address(V4), port))
    client.disconnect()
    allow(caller, callee, V4, port)
    client.connect((callee.address(V4), port))
    assert_direct(client, server)
    client.disconnect()
    caller.node.lane.close()
    client.connect((callee.address(V4), port))
    assert_captured(caller, V4, client, (callee.address(V4), port))


def test_a_full_map_evicts_nobody_and_the_tunnel_takes_over(node: Node, caller: Pod, callee: Pod, port: int) -> None:
    """However many connections a pod opens: what others have noted stays."""
    server = listen(callee.app, V4, port)
    allow(caller, callee, V4, port)
    client = connect(caller.app, V4, callee.address(V4), port)
    accepted = assert_direct(client, server)
    (noted,) = node.lane.connections()
    attested, filled = node.capture.maps["attested"], []
    value = noted.attestation.pack()
    try:
        with pytest.raises(Exception, match="attested"):
            for number in range(1 << 17):
                key = Flow(noted.flow.source, noted.flow.destination, 1, number >> 16, number & 0xFFFF).pack()
                attested.update(key, value)
                filled.append(key)
        another = connect(caller.app, V4, callee.address(V4), port)
        assert_captured(caller, V4, another, (callee.address(V4), port))
        assert attested.lookup(noted.flow.pack()) == value
        assert_talks(client, accepted)
    finally:
        for key in filled:
            attested.delete(key)


# === nobody else passes for an attested caller ===


def syn(where: Pod, family: Family, source: tuple[str, int], destination: tuple[str, int]) -> None:
    """A SYN with any source, from a pod with NET_RAW."""
    ends = [ipaddress.ip_address(text) for text, _ in (source, destination)]
    head = struct.pack("!HHIIBBHHH", source[1], destination[1], 1000, 0, 5 << 4, _SYN, 64_000, 0, 0)
    pseudo = ends[0].packed + ends[1].packed + struct.pack("!LL", len(head), socket.IPPROTO_TCP)
    total = sum(struct.unpack(f"!{len(pseudo + head) // 2}H", pseudo + head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]
    raw = where.app.socket(family.number, socket.SOCK_RAW, socket.IPPROTO_TCP)
    raw.setsockopt(*_IP_FREEBIND_TRANSPARENT[family.version], 1)
    raw.bind((source[0], 0))
    raw.sendto(head, (destination[0], 0))
    raw.close()


def captured_or_passed(node: Node) -> tuple[int, int]:
    counters = node.capture.counters()
    return counters["inbound_steered"], counters["attested_passed"]


@both_families
def test_a_spoofed_syn_of_an_allowed_pair_meets_the_plaintext_listener(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family, new_pod: Callable[..., Pod]
) -> None:
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    attacker = attacker_of(callee, family, new_pod)
    steered, passed = captured_or_passed(node)
    syn(attacker, family, (caller.address(family), 55_555), (callee.address(family), port))
    assert wait_until(lambda: captured_or_passed(node)[0] > steered), "the SYN has not arrived"
    assert captured_or_passed(node)[1] == passed
    assert_nothing_accepted(server)


@both_families
def test_a_spoofed_syn_with_the_attested_address_and_port_gets_no_connection(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family, new_pod: Callable[..., Pod]
) -> None:
    """While the caller's own SYN is on its way, and never arrives: the answer goes to the caller, who refuses it."""
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    attacker = attacker_of(callee, family, new_pod)
    client = caller.app.socket(family.number)
    client.settimeout(QUIET_S)
    with unheard(caller, family):
        with pytest.raises(TimeoutError):
            client.connect((callee.address(family), port))
        (noted,) = node.lane.connections()
        _, passed = captured_or_passed(node)
        for _ in range(3):
            source = (caller.address(family), noted.flow.source_port)
            syn(attacker, family, source, (callee.address(family), port))
        assert wait_until(lambda: captured_or_passed(node)[1] > passed), "the SYN has not arrived"
        assert_nothing_accepted(server)
        client.close()


def attacker_of(callee: Pod, family: Family, new_pod: Callable[..., Pod]) -> Pod:
    """A pod that reaches the other one (IPv6 has to find the node's address first)."""
    attacker = new_pod()
    connect(attacker.app, family, callee.address(family), 1)
    callee.accept(slot_of("PLAINTEXT", family)).socket.close()
    return attacker


@contextmanager
def unheard(pod: Pod, family: Family) -> Iterator[None]:
    """What the pod sends is lost on the node."""
    device = f"p{pod.address(V4).rsplit('.', 1)[1]}"
    pod.node.network.node.ip_of(family, f"rule add pref 1 iif {device} blackhole")
    try:
        yield
    finally:
        pod.node.network.node.ip_of(family, "rule del pref 1")


@contextmanager
def unreached(pod: Pod, family: Family) -> Iterator[None]:
    """What is sent to the pod is lost on the node."""
    address = f"{pod.address(family)}/{32 if family is V4 else 128}"
    device = f"p{pod.address(V4).rsplit('.', 1)[1]}"
    pod.node.network.node.ip(f"route del {address} dev {device}", f"route add blackhole {address}")
    try:
        yield
    finally:
        pod.node.network.node.ip(f"route del blackhole {address}", f"route add {address} dev {device}")


@both_families
def test_a_pod_outside_the_mesh_meets_the_plaintext_listener(
    caller: Pod, callee: Pod, port: int, family: Family, new_pod: Callable[..., Pod]
) -> None:
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    client = connect(new_pod().app, family, callee.address(family), port)
    assert callee.accept(slot_of("PLAINTEXT", family)).client == client.getsockname()[:2]
    assert_nothing_accepted(server)


@both_families
def test_a_caller_whose_note_is_lost_is_reset_before_it_sends_a_byte(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family
) -> None:
    server = listen(callee.app, family, port)
    allow(caller, callee, family, port)
    client = caller.app.socket(family.number)
    client.settimeout(10)
    with unreached(callee, family):
        connecting = client.later.connect((callee.address(family), port))
        assert wait_until(lambda: len(node.lane.connections()) == 1)
        node.capture.maps["attested"].delete(node.lane.connections()[0].flow.pack())
    assert connecting.exception(20) is None or isinstance(connecting.exception(), ConnectionResetError)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.sendall(b"secret")
        client.recv(1)
    # Its last SYN was nobody's: what the plaintext listener got of it is empty.
    for arrival in callee.arrivals(0.05):
        assert arrival.slot is slot_of("PLAINTEXT", family)
    assert_nothing_accepted(server)


# === pods come and go ===


def replace(node: Node, old: Pod) -> Pod:
    """A pod with the addresses of one that is gone; the agent has not noticed either."""
    index = int(old.address(V4).rsplit(".", 1)[1])
    old.app.end()
    old.netns.close()
    for sock in old.kernel.sockets.values():
        sock.close()
    old.kernel.sockets.clear()
    assert wait_until(lambda: f"p{index}" not in node.network.node.interfaces())
    kept, node.network._pods = node.network._pods, index
    try:
        return node.pod()
    finally:
        node.network._pods = kept


@pytest.mark.parametrize(
    ("family", "enrolled", "noticed"),
    [
        pytest.param(V4, False, True, id="IPv4-plain-noticed"),
        pytest.param(V6, True, True, id="IPv6-enrolled-noticed"),
        pytest.param(V4, True, False, id="IPv4-enrolled-agent away"),
        pytest.param(V6, False, False, id="IPv6-plain-agent away"),
        pytest.param(V4, False, False, id="IPv4-plain-agent away"),
    ],
)
def test_an_address_that_was_reused_inherits_nothing(
    node: Node, caller: Pod, port: int, family: Family, enrolled: bool, noticed: bool
) -> None:
    """Even with the verdict still there: the new pod's program does not know the old one's id, so nothing is sent."""
    old = node.enrolled_pod()
    server = listen(old.app, family, port)
    allow(caller, old, family, port)
    assert_direct(connect(caller.app, family, old.address(family), port), server)
    verdicts = node.capture.maps["verdicts"].entries()
    os_fd = old.kernel.netns_fd
    old.kernel.remove(namespace_lives=False)
    assert old.kernel.netns_fd != os_fd
    assert node.capture.maps["verdicts"].entries() == {}
    if not noticed:
        for key, value in verdicts.items():
            node.capture.maps["verdicts"].update(key, value)
    new = replace(node, old)
    if enrolled:
        new.enrol()
    server = listen(new.app, family, port)
    client = caller.app.socket(family.number)
    client.settimeout(10)
    if noticed:
        client.connect((new.address(family), port))
        assert_captured(caller, family, client, (new.address(family), port))
        assert_nothing_accepted(server)
    else:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.connect((new.address(family), port))
            client.sendall(b"secret")
            client.recv(1)
        if not enrolled:
            server.settimeout(QUIET_S)
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                pass
            else:
                accepted.settimeout(QUIET_S)
                with suppress(ConnectionResetError, TimeoutError):
                    assert accepted.recv(10) == b"", "the other pod got what was meant for its predecessor"
    new.app.end()
    new.close()


@both_families
def test_connections_to_a_pod_that_is_gone_are_ended(node: Node, caller: Pod, port: int, family: Family) -> None:
    """Or they would go on into whatever gets the address."""
    gone = node.enrolled_pod()
    server = listen(gone.app, family, port)
    allow(caller, gone, family, port)
    client = connect(caller.app, family, gone.address(family), port)
    assert_direct(client, server)
    gone.kernel.remove(namespace_lives=False)
    with pytest.raises(OSError, match=r"abort"):
        client.recv(1)
    assert wait_until(lambda: node.lane.connections() == [])
    gone.close()


@both_families
def test_leaving_the_mesh_cuts_nothing(
    node: Node, caller: Pod, port: int, family: Family, new_pod: Callable[..., Pod]
) -> None:
    callee = new_pod()
    callee.enrol()
    server = listen(callee.app, family, port)
    allowed = allow(caller, callee, family, port)
    client = connect(caller.app, family, callee.address(family), port)
    accepted = assert_direct(client, server)
    callee.kernel.ensure_outbound(False)
    assert node.lane.allow(allowed) != ""
    other = connect(caller.app, family, callee.address(family), port)
    assert_captured(caller, family, other, (callee.address(family), port))
    callee.unenrol()
    assert_talks(client, accepted)


# === revocation ===


@both_families
def test_what_is_forbidden_is_reset_on_both_sides(
    node: Node, caller: Pod, callee: Pod, port: int, family: Family
) -> None:
    server, other = listen(callee.app, family, port), listen(callee.app, family, port + 20_000)
    allowed = allow(caller, callee, family, port)
    allow(caller, callee, family, port + 20_000)
    client = connect(caller.app, family, callee.address(family), port)
    accepted = assert_direct(client, server)
    bystander = connect(caller.app, family, callee.address(family), port + 20_000)
    unharmed = assert_direct(bystander, other)
    assert set(node.lane.pairs()) == {allowed, pair(caller, callee, family, port + 20_000)}
    assert node.lane.forbid(allowed) == 1
    with pytest.raises(OSError) as error:
        client.recv(1)
    assert error.value.errno == errno.ECONNABORTED
    with pytest.raises(ConnectionResetError):
        accepted.recv(1)
    assert_talks(bystander, unharmed)


def test_a_mapped_socket_is_ended_too(node: Node, caller: Pod, callee: Pod, port: int) -> None:
    server = listen(callee.app, V4, port)
    allowed = allow(caller, callee, V4, port)
    client = connect(caller.app, V6, f"::ffff:{callee.address(V4)}", port)
    server.accept()
    assert node.lane.forbid(allowed) == 1
    with pytest.raises(OSError, match=r"abort"):
        client.recv(1)


def test_no_connect_slips_past_a_change_of_policy(node: Node, caller: Pod, callee: Pod, port: int) -> None:
    """Connects race against the verdict's end: what went out before it is ended, what comes later is captured."""
    server = listen(callee.app, V4, port)
    stop = threading.Event()
    outbound = caller.kernel.sockets[slot_of("OUTBOUND", V4)]
    outbound.settimeout(0.05)

    def take_captured() -> None:
        while not stop.is_set():
            try:
                outbound.accept()[0].close()
            except TimeoutError:
                continue

    thread = threading.Thread(target=take_captured)
    thread.start()
    ended = 0
    try:
        for _ in range(25):
            allowed = allow(caller, callee, V4, port)
            clients = [caller.app.socket(V4.number) for _ in range(4)]
            racing = [client.later.connect((callee.address(V4), port)) for client in clients]
            ended += node.lane.forbid(allowed)
            for race in racing:
                race.exception(20)
            assert node.lane.connections() == [], "a connection outlived the policy that allowed it"
            for client in clients:
                client.close()
    finally:
        stop.set()
        thread.join()
        outbound.settimeout(None)
    server.close()


# === where the lane may be used ===


@pytest.mark.parametrize("bridged", ["caller", "callee"])
def test_on_an_open_bridge_no_verdict_is_given(
    node: Node, caller: Pod, callee: Pod, port: int, new_pod: Callable[..., Pod], bridged: str
) -> None:
    """There a pod could answer for its neighbour's address (ARP), and go on in its name."""
    pod = new_pod(bridged=True)
    pod.enrol()
    ends = (pod, callee) if bridged == "caller" else (caller, pod)
    server = listen(ends[1].app, V4, port)
    assert "is in br0" in node.lane.allow(pair(*ends, V4, port))
    client = connect(ends[0].app, V4, ends[1].address(V4), port)
    assert_captured(ends[0], V4, client, (ends[1].address(V4), port))
    assert_nothing_accepted(server)


def test_a_pod_with_another_interface_takes_no_part(
    node: Node, callee: Pod, port: int, new_pod: Callable[..., Pod]
) -> None:
    """Its routes may lead elsewhere than to the node."""
    pod = new_pod()
    pod.netns.ip("link add other type veth peer name far", "link set other up")
    pod.enrol()
    assert "3 network interfaces" in node.lane.allow(pair(pod, callee, V4, port))


def test_a_pod_that_is_wired_otherwise_later_loses_its_verdicts(
    node: Node, caller: Pod, callee: Pod, port: int, new_pod: Callable[..., Pod]
) -> None:
    pod = new_pod()
    pod.enrol()
    allow(pod, callee, V4, port)
    allow(caller, callee, V4, port)
    pod.netns.ip("link add other type veth peer name far", "link set other up")
    node.lane.recheck()
    (key,) = node.capture.maps["verdicts"].entries()
    assert VerdictKey.unpack(key).pod == caller.kernel.record.pod_id


def test_a_route_that_leads_elsewhere_is_seen(node: Node, callee: Pod, port: int, new_pod: Callable[..., Pod]) -> None:
    pod = new_pod()
    pod.enrol()
    node.network.node.ip(f"route replace {pod.address(V4)}/32 via 10.78.0.2")
    with_fault = netns.run_in(node.network.node.fd, lambda: _fresh_fault(pod))
    assert "no route" in with_fault


def _fresh_fault(pod: Pod) -> str:
    from undermesh.agent.pod_wiring import Wiring

    return Wiring().fault(pod.netns.fd, [ipaddress.ip_address(pod.address(V4))])


@pytest.mark.parametrize("wrong", ["port", "source", "destination", "unknown pod", "itself"])
def test_a_verdict_that_cannot_be_is_refused(node: Node, caller: Pod, callee: Pod, wrong: str) -> None:
    given = pair(caller, callee, V4, 80)
    match wrong:
        case "port":
            given = pair(caller, callee, V4, 15008)
        case "source":
            given = Pair(given.caller, given.pod, given.destination, given.destination, 80)
        case "destination":
            given = Pair(given.caller, given.pod, given.source, given.source, 80)
        case "unknown pod":
            given = Pair(given.caller, "nobody", given.source, given.destination, 80)
        case "itself":
            given = Pair(given.caller, given.caller, given.source, given.source, 80)
    assert node.lane.allow(given) != ""
    assert node.capture.maps["verdicts"].entries() == {}


def test_a_verdict_names_pod_source_and_generation(node: Node, caller: Pod, callee: Pod, port: int) -> None:
    allowed = allow(caller, callee, V4, port)
    ((key, value),) = node.capture.maps["verdicts"].entries().items()
    assert VerdictKey.unpack(key) == VerdictKey(allowed.destination, caller.kernel.record.pod_id, port)
    verdict, lane = Verdict.unpack(value), node.capture.maps["lane"].lookup(layout.u32(0))
    assert lane is not None
    assert (verdict.source, verdict.pod) == (allowed.source, callee.kernel.record.pod_id)
    assert layout.Lane.unpack(lane).generation == verdict.generation > 0


def test_the_kernel_ends_sockets_on_request() -> None:
    from undermesh.agent import sock_diag

    assert sock_diag.destroys()


def test_the_peer_is_outside(peer: RemoteProcess, callee: Pod, port: int) -> None:
    """Another node's SYN never has a note here."""
    connect(peer, V4, callee.address(V4), port)
    assert callee.accept(slot_of("PLAINTEXT", V4)).destination == (callee.address(V4), port)
