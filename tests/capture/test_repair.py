"""Whatever is damaged, one iteration of the agent mends it; meanwhile nothing passes in plaintext that should not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from capture.harness import HBONE_PORT, Node, Pod, assert_talks, connect, listen, slot_of
from capture.packets import Watch
from capture.remote import RemoteProcess, RemoteSocket
from capture.topology import Family, both_families
from undermesh.agent import routing
from undermesh.agent.bpf import layout, libbpf
from undermesh.agent.bpf.layout import ListenerSlot, u32, u64
from undermesh.agent.bpf.node_capture import PROGRAMS

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Damage:
    """What is broken in one pod, and what `mend` says of it.

    Attributes:
        closed: the damage alone lets nothing out or in that is not captured.
    """

    name: str
    act: Callable[[Pod, Family], object]
    mended: str
    closed: bool = True


def _delete_rule(preference: int) -> Callable[[Pod, Family], object]:
    return lambda pod, family: pod.netns.ip_of(family, f"rule del pref {preference}")


def _delete_route(device: str) -> Callable[[Pod, Family], object]:
    def act(pod: Pod, family: Family) -> None:
        table = pod.kernel.record.tables[family.number]
        pod.netns.ip_of(family, f"route del local default dev {device} table {table}")

    return act


def _flush_table(pod: Pod, family: Family) -> None:
    pod.netns.ip_of(family, f"route flush table {pod.kernel.record.tables[family.number]}")


def _detach(pod: Pod, _: Family) -> None:
    link = libbpf.obj_get(pod.kernel.pins / "link")
    libbpf.link_detach(link, "steering")
    os.close(link)


def _empty(kind: str) -> Callable[[Pod, Family], object]:
    def act(pod: Pod, family: Family) -> None:
        held = libbpf.Map.pinned(pod.kernel.pins / "listeners")
        assert held.delete(u32(slot_of(kind, family)))
        held.close()

    return act


def _steal(pod: Pod, family: Family) -> None:
    """Some other socket sits in the slot."""
    held = libbpf.Map.pinned(pod.kernel.pins / "listeners")
    wrong = pod.kernel.sockets[slot_of("PLAINTEXT", family)]
    held.update(u32(slot_of("OUTBOUND", family)), u64(wrong.fileno()))
    held.close()


def _delete_entry(name: str, key: Callable[[Pod], bytes]) -> Callable[[Pod, Family], object]:
    def act(pod: Pod, _: Family) -> None:
        assert pod.node.capture.maps[name].delete(key(pod))

    return act


def _delete_devices(pod: Pod, _: Family) -> None:
    devices = pod.node.capture.maps["pod_devices"]
    for key in list(devices):
        if layout.PodDevice.unpack(key).pod == pod.kernel.record.pod_id:
            devices.delete(key)


def _flip(name: str) -> Callable[[Pod, Family], object]:
    return lambda pod, _: pod.netns.sysctl(name, "0")


ROUTING = "rules and routes"
DAMAGES = [
    Damage("capture rule", _delete_rule(routing.CAPTURE_PREFERENCE), ROUTING),
    Damage("barrier rule", _delete_rule(routing.CAPTURE_BARRIER_PREFERENCE), ROUTING),
    Damage("delivery rule", _delete_rule(routing.DELIVERY_PREFERENCE), ROUTING),
    Damage("delivery barrier rule", _delete_rule(routing.DELIVERY_BARRIER_PREFERENCE), ROUTING),
    Damage("local answer rule", _delete_rule(routing.ANSWER_LOCAL_PREFERENCE), ROUTING),
    Damage("answer rule", _delete_rule(routing.ANSWER_PREFERENCE), ROUTING),
    Damage("answer barrier rule", _delete_rule(routing.ANSWER_BARRIER_PREFERENCE), ROUTING),
    Damage("local rule", _delete_rule(routing.LOCAL_PREFERENCE), ROUTING),
    Damage("local rule back in front", lambda p, f: p.netns.ip_of(f, "rule add pref 0 lookup local"), ROUTING),
    Damage("route by lo", _delete_route("lo"), ROUTING),
    Damage("route by eth0", _delete_route("eth0"), ROUTING),
    Damage("whole table", _flush_table, ROUTING),
    Damage("tcp_fwmark_accept", _flip("ipv4/tcp_fwmark_accept"), "ipv4/tcp_fwmark_accept"),
    Damage("fwmark_reflect", _flip("ipv4/fwmark_reflect"), "ipv4/fwmark_reflect"),
    Damage("fwmark_reflect of IPv6", _flip("ipv6/fwmark_reflect"), "ipv6/fwmark_reflect"),
    Damage("steering link detached", _detach, "steering link", closed=False),
    Damage("steering link unpinned", lambda p, _: (p.kernel.pins / "link").unlink(), "steering link", closed=False),
    Damage("outbound slot", _empty("OUTBOUND"), "listener slot OUTBOUND"),
    Damage("plaintext slot", _empty("PLAINTEXT"), "listener slot PLAINTEXT"),
    Damage("tunnel slot", _empty("HBONE"), "listener slot HBONE"),
    Damage("wrong socket in a slot", _steal, "listener slot OUTBOUND"),
    Damage("enrolled entry", _delete_entry("enrolled", lambda p: u64(p.kernel.cookie)), "enrolled entry", closed=False),
    Damage("pods entry", _delete_entry("pods", lambda p: u32(p.kernel.record.pod_id)), "pods entry"),
    Damage("pod_devices entries", _delete_devices, ""),
]


def _works(pod: Pod, peer: RemoteProcess, family: Family, port: int) -> None:
    """Capture as a whole: out plain and by device, in by both listeners, and delivery."""
    for options in ([], [(1, 25, b"eth0")]):
        client = connect(pod.app, family, family.peer, port, options)
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.destination == (family.peer, port)
        assert_talks(client, arrival.socket)
        client.close()
    for number, slot in ((port, "PLAINTEXT"), (HBONE_PORT, "HBONE")):
        assert_talks(connect(peer, family, pod.address(family), number), pod.accept(slot_of(slot, family)).socket)
    server = listen(pod.app, family, port)
    leg = pod.deliver(family, family.peer, port)
    assert_talks(leg, server.accept()[0])
    leg.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        pod.deliver(family, family.peer, port)


@both_families
@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.name) for damage in DAMAGES])
def test_one_iteration_mends_a_pod(
    new_pod: Callable[..., Pod], peer: RemoteProcess, port: int, family: Family, damage: Damage
) -> None:
    pod = new_pod()
    pod.enrol()
    assert pod.mend() == []
    server = listen(pod.app, family, port)
    outside = listen(peer, family, port)
    damage.act(pod, family)
    if damage.closed:
        _assert_nothing_leaks(pod, peer, server, family, port)
    for sock in (server, outside):
        sock.close()
    pod.arrivals(0.05)
    said = ", ".join(pod.mend())
    assert damage.mended in said
    assert pod.mend() == []
    _works(pod, peer, family, port)


def _assert_nothing_leaks(pod: Pod, peer: RemoteProcess, server: RemoteSocket, family: Family, port: int) -> None:
    with Watch(pod.netns, "eth0") as wire:
        out = pod.app.socket(family.number)
        out.settimeout(0.2)
        with contextlib.suppress(OSError):
            out.connect((family.peer, port))
        out.close()
        assert [s for s in wire.syns(port) if s.destination == family.peer] == []
        inward = peer.socket(family.number)
        inward.settimeout(0.2)
        with contextlib.suppress(OSError):
            inward.connect((pod.address(family), port))
        inward.close()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@both_families
@pytest.mark.parametrize("preferences", [(routing.CAPTURE_PREFERENCE,), (1, 3), (1, 3, 8)])
def test_missing_rules_close_the_way_out(
    new_pod: Callable[..., Pod], port: int, family: Family, preferences: tuple[int, ...]
) -> None:
    pod = new_pod()
    pod.enrol()
    for preference in preferences:
        pod.netns.ip_of(family, f"rule del pref {preference}")
    with Watch(pod.netns, "eth0") as wire:
        client = pod.app.socket(family.number)
        client.settimeout(0.3)
        with pytest.raises(OSError):
            client.connect((family.peer, port))
        assert wire.syns() == []
    pod.mend()
    assert_talks(connect(pod.app, family, family.peer, port), pod.accept(slot_of("OUTBOUND", family)).socket)


# === what is shared by the pods of a node ===


@dataclass(frozen=True)
class NodeDamage:
    name: str
    act: Callable[[Node], object]
    whole: Callable[[Node], bool]


def _clear(name: str) -> Callable[[Node], object]:
    def act(node: Node) -> None:
        held = node.capture.maps[name]
        for key in list(held):
            assert held.delete(key)

    return act


def _unlink(program: str) -> Callable[[Node], object]:
    return lambda node: (node.pins / "links" / program).unlink()


def _detach_program(program: str) -> Callable[[Node], object]:
    def act(node: Node) -> None:
        link = libbpf.obj_get(node.pins / "links" / program)
        libbpf.link_detach(link, program)
        os.close(link)

    return act


def _attached(program: str) -> Callable[[Node], bool]:
    def whole(node: Node) -> bool:
        link = libbpf.obj_get(node.pins / "links" / program)
        try:
            info = libbpf.LinkInfo(link)
            return info.target == node.root.stat().st_ino and info.attach_type == PROGRAMS[program]
        finally:
            os.close(link)

    return whole


def _holds(name: str) -> Callable[[Node], bool]:
    return lambda node: bool(list(node.capture.maps[name]))


def _knows_its_namespace(node: Node) -> bool:
    return node.capture.maps["node"].lookup(u32(0)) != bytes(16)


NODE_DAMAGES = [
    *(NodeDamage(f"{program} detached", _detach_program(program), _attached(program)) for program in PROGRAMS),
    *(NodeDamage(f"{program} unpinned", _unlink(program), _attached(program)) for program in PROGRAMS),
    *(NodeDamage(name, _clear(name), _holds(name)) for name in ("trusted", "pod_cgroups", "probe_ports")),
    NodeDamage("node", lambda node: node.capture.maps["node"].update(u32(0), bytes(16)), _knows_its_namespace),
]


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.name) for damage in NODE_DAMAGES])
def test_one_iteration_mends_the_node(node: Node, pod: Pod, damage: NodeDamage, port: int) -> None:
    node.ensure((pod, port))
    assert damage.whole(node)
    damage.act(node)
    node.ensure((pod, port))
    assert damage.whole(node)


@both_families
def test_after_all_repairs_capture_works_as_before(
    node: Node, pod: Pod, peer: RemoteProcess, port: int, family: Family
) -> None:
    for damage in NODE_DAMAGES:
        damage.act(node)
        node.ensure((pod, port + 1))
    _works(pod, peer, family, port)


def test_a_foreign_entry_in_the_map_of_the_trusted_goes(node: Node) -> None:
    node.kernel.trust_ztunnel(os.getpid())
    stranger = u64((node.root / "system").stat().st_ino)
    node.capture.maps["trusted"].update(stranger, u32(1))
    node.ensure()
    assert node.capture.maps["trusted"].lookup(stranger) is None


def test_every_listener_slot_is_filled(pod: Pod) -> None:
    held = libbpf.Map.pinned(pod.kernel.pins / "listeners")
    assert [slot for slot in ListenerSlot if held.lookup(u32(slot)) is None] == []
    held.close()
