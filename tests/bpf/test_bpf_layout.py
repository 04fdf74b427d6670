"""agent/bpf/layout.py, the generated marks and proto/node.proto say what the compiled objects say."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from capture.compiler import compile_bpf
from capture.harness import OBJECTS

from undermesh.agent.bpf import layout, libbpf, node_capture
from undermesh.gen import marks
from undermesh.proto import node_pb2

# Every struct with the offsets that its Python twin packs: (name, class, {member: offset}, size).
STRUCTS = [
    ("flow", layout.Flow, {"source": 0, "destination": 16, "pod": 32, "source_port": 36, "destination_port": 38}),
    ("enrolment", layout.Enrolment, {"pod": 0, "flags": 4}),
    ("pod", layout.Pod, {"uid": 0, "netns_cookie": 40, "netns_inode": 48}),
    ("pod_device", layout.PodDevice, {"pod": 0, "ifindex": 4}),
    ("probe_port", layout.ProbePort, {"address": 0, "port": 16}),
    ("node", layout.Node, {"netns_cookie": 0, "reserved": 8}),
    ("verdict_key", layout.VerdictKey, {"destination": 0, "pod": 16, "port": 20}),
    ("verdict", layout.Verdict, {"source": 0, "generation": 16, "pod": 24, "reserved": 28}),
    ("lane", layout.Lane, {"generation": 0}),
    ("attestation", layout.Attestation, {"cookie": 0, "pod": 8, "passed": 12}),
    ("pair_counts", layout.PairCounts, {"opened": 0, "closed": 8, "failed": 16, "sent": 24, "received": 32}),
]
ENUMS: list[tuple[str, type[IntEnum] | type[layout.EnrolmentFlags], str]] = [
    ("enrolment_flags", layout.EnrolmentFlags, "ENROL_"),
    ("listener_slot", layout.ListenerSlot, ""),
    ("counter", layout.Counter, "COUNT_"),
]


def btf(path: Path) -> list[dict[str, Any]]:
    command = ["bpftool", "btf", "dump", "file", str(path), "-j"]
    types: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["types"]
    return types


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return btf(OBJECTS / "capture.bpf.o") + btf(OBJECTS / "lookup.bpf.o")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The header alone: enums that no program's type mentions leave no trace in the objects."""
    folder = tmp_path_factory.mktemp("header")
    source = folder / "header.bpf.c"
    variables = "\n".join(f"enum {name} use_{name};" for name, _, _ in ENUMS)
    variables += "\n" + "\n".join(f"struct {name} use_struct_{name};" for name, _, _ in STRUCTS)
    source.write_text(f'#include <linux/types.h>\n#include "undermesh.h"\n{variables}\n')
    return btf(compile_bpf(source, folder))


@pytest.mark.parametrize(("name", "twin", "offsets"), [pytest.param(*row, id=row[0]) for row in STRUCTS])
def test_a_struct_has_the_size_and_the_offsets_of_its_twin(
    compiled: list[dict[str, Any]], header: list[dict[str, Any]], name: str, twin: Any, offsets: dict[str, int]
) -> None:
    found = [t for t in compiled + header if t["kind"] == "STRUCT" and t["name"] == name]
    assert len(found) >= 2, f"struct {name} is in no object"
    for struct in found:
        assert {member["name"]: member["bits_offset"] // 8 for member in struct["members"]} == offsets
        assert struct["size"] == twin.FORMAT.size
    assert [f.name for f in fields(twin)] == [member for member in offsets if member != "reserved"]


def test_every_struct_of_the_header_is_checked(header: list[dict[str, Any]]) -> None:
    text = (Path(__file__).parents[2] / "bpf" / "include" / "undermesh.h").read_text()
    declared = {line.split()[1] for line in text.splitlines() if line.startswith("struct ") and line.endswith("{")}
    assert declared == {name for name, _, _ in STRUCTS} | {"address"}
    enums = {line.split()[1] for line in text.splitlines() if line.startswith("enum ") and line.endswith("{")}
    assert enums == {name for name, _, _ in ENUMS}


@pytest.mark.parametrize(("name", "twin", "prefix"), [pytest.param(*row, id=row[0]) for row in ENUMS])
def test_an_enum_has_the_values_of_its_twin(header: list[dict[str, Any]], name: str, twin: Any, prefix: str) -> None:
    enum = next(t for t in header if t["kind"] == "ENUM" and t["name"] == name)
    values = {value["name"]: value["val"] for value in enum["values"]}
    count = {"listener_slot": "LISTENER_SLOTS", "counter": "COUNTERS"}.get(name)
    if count is not None:
        assert values.pop(count) == len(twin)
    assert {key.removeprefix(prefix): value for key, value in values.items()} == {m.name: m.value for m in twin}


def test_the_wire_numbers_the_listeners_like_the_slots() -> None:
    assert dict(node_pb2.Listener.items()) == {slot.name: slot.value for slot in layout.ListenerSlot}


def test_the_marks_are_one_range_without_gaps() -> None:
    """capture.bpf.c takes every mark from BYPASS to ANSWER for ours."""
    values = sorted(marks.ALL.values())
    assert values == list(range(marks.BYPASS, marks.ANSWER + 1))


@pytest.mark.parametrize(
    ("object_name", "programs", "maps"),
    [
        pytest.param("capture", set(node_capture.PROGRAMS), set(node_capture.MAPS), id="capture"),
        pytest.param(
            "lookup", {"um_lookup"}, {"captured", "attested", "probes", "counters", "listeners", ".rodata"}, id="lookup"
        ),
    ],
)
def test_the_object_holds_exactly_the_programs_and_maps_that_the_agent_names(
    compiled: list[dict[str, Any]], object_name: str, programs: set[str], maps: set[str]
) -> None:
    types = btf(OBJECTS / f"{object_name}.bpf.o")
    functions = {t["name"] for t in types if t["kind"] == "FUNC" and t["name"].startswith("um_")}
    assert functions == programs
    sections = {t["name"]: t for t in types if t["kind"] == "DATASEC"}
    by_id = {t["id"]: t["name"] for t in types}
    found = {by_id[variable["type_id"]] for variable in sections[".maps"]["vars"]}
    assert found == maps - {".rodata"}
    assert (".rodata" in sections) == (".rodata" in maps)


@pytest.mark.root
def test_a_map_refuses_keys_of_another_size() -> None:
    with libbpf.Object(OBJECTS / "capture.bpf.o") as capture:
        capture.load()
        enrolled = capture.map("enrolled")
        with pytest.raises(ValueError, match="4 bytes where 8 belong"):
            enrolled.update(layout.u32(1), bytes(8))
        enrolled.close()
