"""Loading, attaching, pinning and taking out again; and errors that a person can act on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from capture.compiler import compile_bpf
from capture.harness import OBJECTS, Node, Pod
from capture.topology import Netns

from undermesh.agent.bpf import layout, libbpf, node_capture, pod_steering
from undermesh.agent.bpf.libbpf import AttachType, BpfError
from undermesh.agent.bpf.node_capture import PROGRAMS, Capture

pytestmark = pytest.mark.root


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pod(node: Node) -> Pod:
    return node.enrolled_pod()


def link_of(path: Path) -> libbpf.LinkInfo:
    link = libbpf.obj_get(path)
    try:
        return libbpf.LinkInfo(link)
    finally:
        os.close(link)


def detach(path: Path) -> None:
    link = libbpf.obj_get(path)
    libbpf.link_detach(link, path.name)
    os.close(link)


# === errors ===

BROKEN = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("cgroup/connect4")
int reads_past_the_end(struct bpf_sock_addr *ctx)
{
	volatile int *stack = (int *)ctx;
	return *(int *)(long)ctx->user_port + stack[0];
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


@pytest.fixture
def compile_text(tmp_path: Path) -> Callable[[str], Path]:
    def compiled(text: str) -> Path:
        source = tmp_path / "broken.bpf.c"
        source.write_text(text)
        return compile_bpf(source, tmp_path)

    return compiled


def test_a_refused_program_is_named_with_the_cause_and_the_verifiers_last_lines(
    compile_text: Callable[[str], Path],
) -> None:
    with libbpf.Object(compile_text(BROKEN)) as broken, pytest.raises(BpfError) as caught:
        broken.load()
    message = str(caught.value)
    assert "broken.bpf.o: the kernel refused it" in message
    assert "reads_past_the_end" in message
    assert "Permission denied" in message
    assert "R1 invalid mem access" in message or "invalid mem access 'scalar'" in message
    assert len(message.splitlines()) <= 9
    assert len(caught.value.log.splitlines()) > len(message.splitlines()) - 2
    assert caught.value.errno == errno.EACCES


def test_a_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.bpf.o"
    wrong.write_bytes(b"not an object")
    with pytest.raises(BpfError, match=r"wrong\.bpf\.o: cannot be opened as a BPF object"):
        libbpf.Object(wrong)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BpfError, match=r"absent.bpf.o: cannot be opened as a BPF object: No such file"):
        libbpf.Object(tmp_path / "absent.bpf.o")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(lambda o: o.program_fd("absent"), "capture.bpf.o: no program absent", id="program"),
        pytest.param(lambda o: o.map("absent"), "capture.bpf.o: no map absent", id="map"),
        pytest.param(lambda o: o.set_constants(b"1234"), "capture.bpf.o: no map .rodata", id="constants"),
    ],
)
def test_a_missing_part_is_named(act: Callable[[libbpf.Object], object], message: str) -> None:
    with libbpf.Object(OBJECTS / "capture.bpf.o") as loaded, pytest.raises(BpfError, match=message):
        act(loaded)


def test_constants_of_the_wrong_size_are_refused() -> None:
    with libbpf.Object(OBJECTS / "lookup.bpf.o") as loaded, pytest.raises(BpfError, match=r"constants \(8 bytes\)"):
        loaded.set_constants(bytes(8))


def test_attaching_to_the_wrong_kind_of_thing_names_both() -> None:
    namespace = Netns()
    with libbpf.Object(OBJECTS / "capture.bpf.o") as loaded:
        loaded.load()
        with pytest.raises(BpfError, match="cannot attach um_connect4 to the wrong thing: "):
            libbpf.link_create(
                loaded.program_fd("um_connect4"),
                namespace.fd,
                AttachType.CGROUP_INET4_CONNECT,
                "um_connect4 to the wrong thing",
            )
    namespace.close()


def test_a_pin_outside_of_bpffs_is_a_clear_error(tmp_path: Path) -> None:
    with libbpf.Object(OBJECTS / "capture.bpf.o") as loaded:
        loaded.load()
        held = loaded.map("enrolled")
        with pytest.raises(BpfError, match="is bpffs mounted there"):
            held.pin(tmp_path / "pin")
        held.close()
    with pytest.raises(BpfError, match="nothing usable is pinned at"):
        libbpf.obj_get(tmp_path / "pin")


def test_a_pinned_map_that_does_not_fit_is_named(node: Node, compile_text: Callable[[str], Path]) -> None:
    text = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u16);
	__type(value, __u16);
} enrolled SEC(".maps");
char _license[] SEC("license") = "Dual BSD/GPL";
"""
    with libbpf.Object(compile_text(text)) as other:
        other.load()
        wrong = other.map("enrolled")
        (node.pins / "maps" / "enrolled").unlink()
        wrong.pin(node.pins / "maps" / "enrolled")
        wrong.close()
    with pytest.raises(BpfError, match=r"enrolled|capture\.bpf\.o: the kernel refused it"):
        node_capture.load(OBJECTS, node.pins, node.root).close()


# === the node's links ===


def successor(node: Node) -> Capture:
    return node_capture.load(OBJECTS, node.pins, node.root)


def test_a_successor_adopts_what_is_pinned(node: Node) -> None:
    before = {name: link_of(node.pins / "links" / name) for name in PROGRAMS}
    node.capture.maps["enrolled"].update(layout.u64(1), layout.Enrolment(7, layout.EnrolmentFlags.INBOUND).pack())
    later = successor(node)
    assert later.attach() == []
    assert {name: link_of(node.pins / "links" / name).id for name in PROGRAMS} == {n: i.id for n, i in before.items()}
    assert later.maps["enrolled"].lookup(layout.u64(1)) is not None
    later.close()


def test_a_link_with_an_older_program_is_updated_in_place(node: Node, compile_text: Callable[[str], Path]) -> None:
    """No connect may see a moment without a program: the link stays the same one."""
    text = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("cgroup/connect4")
int um_connect4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "Dual BSD/GPL";
"""
    path = node.pins / "links" / "um_connect4"
    link = libbpf.obj_get(path)
    with libbpf.Object(compile_text(text)) as older:
        older.load()
        libbpf.link_update(link, older.program_fd("um_connect4"), "um_connect4")
    os.close(link)
    before = link_of(path)
    assert node.capture.attach() == ["um_connect4"]
    after = link_of(path)
    assert after.id == before.id
    assert after.program_id != before.program_id
    assert node.capture.attach() == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_detached_link_is_made_anew(node: Node, program: str) -> None:
    path = node.pins / "links" / program
    detach(path)
    assert link_of(path).target == 0
    assert node.capture.attach() == [program]
    info = link_of(path)
    assert (info.target, info.attach_type) == (node.root.stat().st_ino, PROGRAMS[program])


def test_a_link_to_another_cgroup_is_made_anew(node: Node) -> None:
    node.capture.cgroup_root = node.root / "kubepods.slice"
    assert node.capture.attach() == list(PROGRAMS)
    assert link_of(node.pins / "links" / "um_sockops").target == (node.root / "kubepods.slice").stat().st_ino
    node.capture.cgroup_root = node.root
    assert node.capture.attach() == list(PROGRAMS)


def test_removal_leaves_no_pin_and_no_program(node: Node) -> None:
    node.capture.remove()
    assert not node.pins.exists()
    node.capture = node_capture.load(OBJECTS, node.pins, node.root)
    node._undo.callback(node.capture.remove)
    assert node.capture.attach() == list(PROGRAMS)


# === a pod's link ===


def test_a_pods_steering_is_adopted_with_its_listeners(node: Node, pod: Pod) -> None:
    before = link_of(pod.kernel.pins / "link")
    held = {s: pod_slot(pod, s) for s in layout.ListenerSlot}
    later = pod_steering.load(OBJECTS, pod.kernel.pins, pod.kernel.record.pod_id, node.capture.shared_maps)
    assert not later.attach(pod.kernel.netns_fd)
    assert link_of(pod.kernel.pins / "link").id == before.id
    assert {s: later.listener_cookie(s) for s in layout.ListenerSlot} == held
    later.close()


def pod_slot(pod: Pod, slot: layout.ListenerSlot) -> int:
    held = libbpf.Map.pinned(pod.kernel.pins / "listeners")
    value = held.lookup(layout.u32(slot))
    held.close()
    assert value is not None
    return int.from_bytes(value, "little")


def test_a_steering_link_that_was_detached_is_made_anew(node: Node, pod: Pod) -> None:
    detach(pod.kernel.pins / "link")
    assert pod.kernel.ensure_inbound() == ["steering link"]
    assert link_of(pod.kernel.pins / "link").target == pod.netns.inode


def test_a_steering_link_of_another_namespace_is_made_anew(node: Node, pod: Pod) -> None:
    other = Netns()
    steering = pod_steering.load(OBJECTS, pod.kernel.pins, 1, node.capture.shared_maps)
    assert steering.attach(other.fd)
    assert link_of(pod.kernel.pins / "link").target == other.inode
    steering.close()
    assert pod.kernel.ensure_inbound() == ["steering link"]
    assert link_of(pod.kernel.pins / "link").target == pod.netns.inode
    other.close()


def test_replacing_starts_with_empty_slots(node: Node, pod: Pod) -> None:
    fresh = pod_steering.load(
        OBJECTS, pod.kernel.pins, pod.kernel.record.pod_id, node.capture.shared_maps, replace=True
    )
    assert [fresh.listener_cookie(slot) for slot in layout.ListenerSlot] == [None] * len(layout.ListenerSlot)
    fresh.close()


def test_the_steering_of_a_dead_namespace_can_be_removed(node: Node, pod: Pod) -> None:
    pins = pod.kernel.pins
    pod.netns.close()
    for sock in pod.kernel.sockets.values():
        sock.close()
    os.close(pod.kernel.netns_fd)
    pod.kernel.netns_fd = -1
    pod_steering.remove(pins)
    assert not pins.exists()
    pod_steering.remove(pins)


# === reading maps ===


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_a_hash_map_is_read_whole_whatever_the_size_of_a_batch(
    node: Node, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """A batch of one is too small for a bucket with two keys: it grows."""
    monkeypatch.setattr(libbpf, "_BATCH", batch)
    held = node.capture.maps["pods"]
    assert held.entries() == {}
    wanted = {layout.u32(i): layout.Pod(f"uid-{i}", i, i).pack() for i in range(600)}
    for key, value in wanted.items():
        held.update(key, value)
    assert held.entries() == wanted
