"""Which socket the pod's sk_lookup program picks, as a table: run in the kernel without a packet.

A test run knows no interface (the kernel refuses one): what comes by lo is tested with packets, in tests/capture.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from capture.harness import BPFFS, OBJECTS, mount_bpffs

from undermesh.agent import listeners
from undermesh.agent.bpf import layout, libbpf, pod_steering
from undermesh.agent.bpf.layout import Flow, ListenerSlot, u32, u64

pytestmark = pytest.mark.root

POD = 42
SK_DROP, SK_PASS = 0, 1
# struct bpf_sk_lookup: cookie, family, protocol, remote ip4, ip6, port, pad, local ip4, ip6, port, ifindex.
CONTEXT = struct.Struct("=QII4s16s2s2s4s16sII4x")
ADDRESSES = {4: ("10.1.0.2", "10.2.0.3", "127.0.0.1"), 6: ("fd01::2", "fd02::3", "::1")}


@dataclass(frozen=True)
class Case:
    """One packet and what becomes of it.

    Attributes:
        verdict: the slot that is chosen, None if the app's own listener is, "drop".
    """

    name: str
    verdict: str | None
    port: int = 80
    known_as: tuple[str, ...] = ()  # maps that hold its 4-tuple
    loopback: bool = False
    protocol: int = socket.IPPROTO_TCP
    pod: int = POD  # whose the 4-tuple in the map is
    empty: frozenset[str] = field(default_factory=frozenset)


CASES = [
    Case("new from outside", "PLAINTEXT"),
    Case("new from outside to 15008", "HBONE", port=15008),
    Case("next to 15008", "PLAINTEXT", port=15009),
    Case("captured", "OUTBOUND", known_as=("captured",)),
    Case("captured to somebody's 15008", "OUTBOUND", port=15008, known_as=("captured",)),
    Case("captured by another pod", "PLAINTEXT", known_as=("captured",), pod=POD + 1),
    Case("probe", None, known_as=("probes",)),
    Case("probe of 15008", None, port=15008, known_as=("probes",)),
    Case("probe of another pod", "PLAINTEXT", known_as=("probes",), pod=POD + 1),
    Case("captured wins over probe", "OUTBOUND", known_as=("captured", "probes")),
    Case("loopback", None, loopback=True),
    Case("loopback is never captured", None, loopback=True, known_as=("captured",)),
    Case("loopback from outside", None, loopback=True),
    Case("UDP", None, protocol=socket.IPPROTO_UDP),
    Case("UDP with a captured 4-tuple", None, protocol=socket.IPPROTO_UDP, known_as=("captured",)),
    Case("no plaintext listener", "drop", empty=frozenset({"PLAINTEXT"})),
    Case("no tunnel listener", "drop", port=15008, empty=frozenset({"HBONE"})),
    Case("no outbound listener", "drop", known_as=("captured",), empty=frozenset({"OUTBOUND"})),
    Case("other listeners missing", "PLAINTEXT", empty=frozenset({"OUTBOUND", "HBONE"})),
]


@dataclass
class Bench:
    """A loaded lookup program with listeners, attached nowhere."""

    steering: pod_steering.Steering
    maps: dict[str, libbpf.Map]
    sockets: dict[ListenerSlot, socket.socket]

    def run(self, case: Case, version: int) -> tuple[int, int]:
        """(SK_DROP or SK_PASS, cookie of the chosen socket)."""
        remote, local, loopback = ADDRESSES[version]
        local = loopback if case.loopback else local
        flow = Flow(ipaddress.ip_address(remote), ipaddress.ip_address(local), case.pod, 40000, case.port)
        for name in case.known_as:
            self.maps[name].update(flow.pack(), u64(1))
        for slot, sock in self.sockets.items():
            if slot.name.split("_")[0] in case.empty:
                self.steering.listeners.delete(u32(slot))
            else:
                self.steering.set_listener(slot, sock.fileno())
        try:
            result, after = libbpf.test_run(self.steering.program, context(case, version, remote, local))
        finally:
            for name in case.known_as:
                self.maps[name].delete(flow.pack())
        return result, struct.unpack_from("=Q", after)[0]


def context(case: Case, version: int, remote: str, local: str) -> bytes:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    packed = [socket.inet_pton(family, text) for text in (remote, local)]
    ip4 = packed if version == 4 else [bytes(4)] * 2
    ip6 = packed if version == 6 else [bytes(16)] * 2
    port = struct.pack("!H", 40000)
    return CONTEXT.pack(0, family, case.protocol, ip4[0], ip6[0], port, bytes(2), ip4[1], ip6[1], case.port, 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    mount_bpffs()
    pins = BPFFS / f"um-test-{tmp_path_factory.mktemp('lookup').parent.name}-lookup"
    with libbpf.Object(OBJECTS / "capture.bpf.o") as capture:
        capture.load()
        shared = {name: capture.map(name) for name in ("captured", "probes", "counters")}
        steering = pod_steering.load(OBJECTS, pins, POD, shared)
        sockets = listeners.make(ListenerSlot)
        try:
            yield Bench(steering, shared, sockets)
        finally:
            for sock in sockets.values():
                sock.close()
            steering.close()
            pod_steering.remove(pins)
            for held in shared.values():
                held.close()


@pytest.mark.parametrize("version", [pytest.param(4, id="IPv4"), pytest.param(6, id="IPv6")])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_program_picks(bench: Bench, case: Case, version: int) -> None:
    result, cookie = bench.run(case, version)
    by_cookie = {listeners.socket_cookie(sock): slot.name for slot, sock in bench.sockets.items()}
    if case.verdict == "drop":
        assert (result, cookie) == (SK_DROP, 0)
    elif case.verdict is None:
        assert (result, cookie) == (SK_PASS, 0)
    else:
        assert (result, by_cookie.get(cookie)) == (SK_PASS, f"{case.verdict}_V{version}")


@pytest.mark.parametrize(
    ("case", "counter"),
    [
        pytest.param(CASES[0], "INBOUND_STEERED", id="inbound"),
        pytest.param(CASES[6], "PROBE_PASSED", id="probe"),
        pytest.param(CASES[15], "LISTENER_MISSING", id="missing"),
    ],
)
def test_what_it_did_is_counted(bench: Bench, case: Case, counter: str) -> None:
    def value() -> int:
        per_cpu = bench.maps["counters"].lookup_per_cpu(u32(layout.Counter[counter]))
        return sum(int.from_bytes(part, "little") for part in per_cpu)

    before = value()
    bench.run(case, 4)
    assert value() == before + 1


def test_a_listener_that_closes_leaves_its_slot(bench: Bench) -> None:
    made = listeners.make([ListenerSlot.HBONE_V4])
    sock = made[ListenerSlot.HBONE_V4]
    bench.steering.set_listener(ListenerSlot.HBONE_V4, sock.fileno())
    assert bench.steering.listener_cookie(ListenerSlot.HBONE_V4) == listeners.socket_cookie(sock)
    sock.close()
    assert bench.steering.listener_cookie(ListenerSlot.HBONE_V4) is None


def test_every_case_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_context_is_as_long_as_the_kernels(bench: Bench, tmp_path: Path) -> None:
    """A longer one is taken only if the rest is zero: so CONTEXT must not be shorter than struct bpf_sk_lookup."""
    program = bench.steering.program
    whole = context(CASES[0], 4, *ADDRESSES[4][:2])
    assert CONTEXT.size == 72
    assert libbpf.test_run(program, whole + bytes(8))[0] == libbpf.test_run(program, whole)[0]
    with pytest.raises(libbpf.BpfError, match="test run"):
        libbpf.test_run(program, whole + b"\1" * 8)
