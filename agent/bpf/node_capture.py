"""The node-wide programs of capture.bpf.c: loaded, attached to the cgroup root, pinned, adopted and kept."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undermesh.agent.bpf import layout, libbpf
from undermesh.agent.bpf.libbpf import AttachType

log = logging.getLogger(__name__)

PROGRAMS: Final = {
    "um_connect4": AttachType.CGROUP_INET4_CONNECT,
    "um_connect6": AttachType.CGROUP_INET6_CONNECT,
    "um_bind4": AttachType.CGROUP_INET4_BIND,
    "um_bind6": AttachType.CGROUP_INET6_BIND,
    "um_setsockopt": AttachType.CGROUP_SETSOCKOPT,
    "um_sockops": AttachType.CGROUP_SOCK_OPS,
}
MAPS: Final = (
    "enrolled",
    "pods",
    "pod_devices",
    "captured",
    "probes",
    "probe_ports",
    "trusted",
    "pod_cgroups",
    "node",
    "counters",
    "sockets",
    "verdicts",
    "lane",
    "attested",
    "attested_pairs",
    "attested_sockets",
)


@dataclass
class Capture:
    """The maps and links of one node; everything is pinned and outlives the agent."""

    pins: Path
    cgroup_root: Path
    object: libbpf.Object
    maps: dict[str, libbpf.Map]

    @property
    def shared_maps(self) -> dict[str, libbpf.Map]:
        """The maps that the pods' sk_lookup programs share."""
        return {name: self.maps[name] for name in ("captured", "attested", "probes", "counters")}

    def attach(self) -> list[str]:
        """Makes every link exist, point to our program and hang on our cgroup; returns what had to be mended."""
        mended = []
        cgroup = os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for program, attach_type in PROGRAMS.items():
                if self._attach_one(program, attach_type, cgroup):
                    mended.append(program)
        finally:
            os.close(cgroup)
        return mended

    def _attach_one(self, program: str, attach_type: AttachType, cgroup: int) -> bool:
        path = self.pins / "links" / program
        program_fd = self.object.program_fd(program)
        if path.exists():
            link = libbpf.obj_get(path)
            try:
                info = libbpf.LinkInfo(link)
                if info.target == os.fstat(cgroup).st_ino and info.attach_type == attach_type:
                    if libbpf.program_tag_by_id(info.program_id) == libbpf.program_tag(program_fd):
                        return False
                    libbpf.link_update(link, program_fd, program)
                    return True
            finally:
                os.close(link)
            path.unlink()
        link = libbpf.link_create(program_fd, cgroup, attach_type, f"{program} to {self.cgroup_root}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            libbpf.obj_pin(link, path)
        finally:
            os.close(link)
        return True

    def counters(self) -> dict[str, int]:
        """Sums over the CPUs, by the counter's name."""
        values = {}
        for counter in layout.Counter:
            per_cpu = self.maps["counters"].lookup_per_cpu(layout.u32(counter))
            values[counter.name.lower()] = sum(int.from_bytes(value, "little") for value in per_cpu)
        return values

    def remove(self) -> None:
        """Detaches everything and unpins it: the node is as before."""
        remove(self.pins)
        self.close()

    def close(self) -> None:
        """Gives up our FDs; the pinned objects stay."""
        for held in self.maps.values():
            held.close()
        self.maps.clear()
        self.object.close()


def load(objects: Path, pins: Path, cgroup_root: Path) -> Capture:
    """Loads capture.bpf.o over the maps that are pinned already, and pins the others. Attaches nothing yet.

    Raises:
        BpfError: the kernel refused the programs, or a pinned map does not fit them.
    """
    capture = libbpf.Object(objects / "capture.bpf.o")
    try:
        (pins / "maps").mkdir(parents=True, exist_ok=True)
        (pins / "pods").mkdir(exist_ok=True)
        for name in MAPS:
            path = pins / "maps" / name
            if path.exists():
                pinned = libbpf.Map.pinned(path)
                capture.reuse_map(name, pinned)
                pinned.close()
        capture.load()
        maps = {name: capture.map(name) for name in MAPS}
        for name, held in maps.items():
            if not (pins / "maps" / name).exists():
                held.pin(pins / "maps" / name)
    except BaseException:
        capture.close()
        raise
    return Capture(pins, cgroup_root, capture, maps)


def enrolled_pods(pins: Path) -> int:
    """How many pods are steered right now, by what is pinned."""
    path = pins / "maps" / "enrolled"
    if not path.exists():
        return 0
    enrolled = libbpf.Map.pinned(path)
    try:
        return sum(1 for _ in enrolled)
    finally:
        enrolled.close()


def remove(pins: Path) -> None:
    """Detaches and unpins everything under a node's pins.

    Raises:
        OSError: something that is not ours lies there.
    """
    for path in sorted((pins / "links").glob("*")):
        link = libbpf.obj_get(path)
        try:
            if libbpf.LinkInfo(link).target:
                libbpf.link_detach(link, path.name)
        finally:
            os.close(link)
        path.unlink()
    for name in MAPS:
        (pins / "maps" / name).unlink(missing_ok=True)
    for folder in (pins / "links", pins / "maps", pins / "pods", pins):
        if folder.is_dir():
            folder.rmdir()
