"""What a node holds of undermesh in the kernel: programs, links and maps, found by their pins; needs no bpftool."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undermesh.agent.bpf import layout, libbpf

_STATS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
_MAP_TYPES: Final = {
    1: "hash",
    2: "array",
    5: "percpu_hash",
    6: "percpu_array",
    9: "lru_hash",
    10: "lru_percpu_hash",
    15: "sockmap",
    18: "sockhash",
    24: "sk_storage",
}
"""enum bpf_map_type, as far as it is used."""
_HASHES: Final = ("hash", "lru_hash")
_ARRAYS: Final = ("array", "percpu_array")
# struct bpf_prog_info: the name ends a head of 80 bytes.
_PROGRAM_NAME_END: Final = 80
_NAME_SIZE: Final = 16


@dataclass(frozen=True)
class MapEntry:
    """One pinned map; `entries` is None where the kernel does not let them be counted. Memory in bytes."""

    name: str
    id: int
    type: str
    entries: int | None
    max_entries: int
    memory: int


@dataclass(frozen=True)
class LinkEntry:
    """One pinned link; `target` is a cgroup's id or a netns' inode, 0: it was detached."""

    name: str
    id: int
    program_id: int
    kind: str
    target: int


@dataclass(frozen=True)
class ProgramEntry:
    """One program that a link runs. Runs and time count only while the kernel counts (kernel.bpf_stats_enabled)."""

    name: str
    id: int
    links: int
    runs: int
    run_time_ns: int
    memory: int


@dataclass(frozen=True)
class Inventory:
    """Everything below a node's pins."""

    pins: str
    stats_enabled: bool
    programs: list[ProgramEntry]
    links: list[LinkEntry]
    maps: list[MapEntry]


def read(pins: Path) -> Inventory:
    """Looks at every pin; what goes away meanwhile is left out. Blocks.

    Raises:
        BpfError: the kernel does not show what is pinned.
    """
    links: list[LinkEntry] = []
    maps: list[MapEntry] = []
    for path in sorted(path for path in pins.rglob("*") if not path.is_dir()):
        try:
            fd = libbpf.obj_get(path)
        except libbpf.BpfError:
            if path.exists():
                raise
            continue
        name = str(path.relative_to(pins))
        facts = _facts(fd)
        if "map_id" in facts:
            held = libbpf.Map.from_fd(fd, name)
            maps.append(_map(held, facts))
            held.close()
            continue
        try:
            if "link_id" in facts:
                links.append(_link(fd, name))
        finally:
            os.close(fd)
    return Inventory(str(pins), _stats_enabled(), _programs(links), links, maps)


def _facts(fd: int) -> dict[str, str]:
    """The lines of an FD's fdinfo."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _map(held: libbpf.Map, facts: dict[str, str]) -> MapEntry:
    kind = _MAP_TYPES.get(int(facts["map_type"]), facts["map_type"])
    size = int(facts["max_entries"])
    return MapEntry(held.name, int(facts["map_id"]), kind, _entries(held, kind, size), size, int(facts["memlock"]))


def _entries(held: libbpf.Map, kind: str, size: int) -> int | None:
    if kind in _HASHES:
        return len(held.entries())
    if kind in _ARRAYS:
        return size
    if kind == "sockmap":
        return sum(held.lookup(layout.u32(slot)) is not None for slot in range(size))
    return None


def _link(fd: int, name: str) -> LinkEntry:
    info = libbpf.LinkInfo(fd)
    return LinkEntry(name, info.id, info.program_id, "netns" if name.startswith("pods/") else "cgroup", info.target)


def _programs(links: list[LinkEntry]) -> list[ProgramEntry]:
    found = []
    for number in sorted({link.program_id for link in links}):
        try:
            fd = libbpf.program_by_id(number)
        except libbpf.BpfError:
            continue  # replaced meanwhile
        try:
            facts = _facts(fd)
            head = libbpf.program_info(fd, _PROGRAM_NAME_END)
        finally:
            os.close(fd)
        (raw,) = struct.unpack_from(f"{_NAME_SIZE}s", head, _PROGRAM_NAME_END - _NAME_SIZE)
        found.append(
            ProgramEntry(
                name=raw.rstrip(b"\0").decode(errors="replace"),
                id=number,
                links=sum(link.program_id == number for link in links),
                runs=int(facts.get("run_cnt", "0")),
                run_time_ns=int(facts.get("run_time_ns", "0")),
                memory=int(facts["memlock"]),
            )
        )
    return found


def _stats_enabled() -> bool:
    try:
        return _STATS.read_text().strip() == "1"
    except OSError:
        return False
