"""Steering inside one pod's netns: lookup.bpf.c with its listeners, pinned under pods/<uid>."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.agent.bpf import layout, libbpf
from undermesh.agent.bpf.layout import ListenerSlot


@dataclass
class Steering:
    """One pod's program (an FD), listener slots and link."""

    pins: Path
    pod_id: int
    program: int
    listeners: libbpf.Map
    attached: int = 0  # id of the program that was last found to be ours

    def set_listener(self, slot: ListenerSlot, socket_fd: int) -> None:
        """Puts a listening socket into its slot; it leaves by itself when the socket is closed."""
        self.listeners.update(layout.u32(slot), layout.u64(socket_fd))

    def listener_cookie(self, slot: ListenerSlot) -> int | None:
        """The socket cookie of what is in the slot, None if it is empty."""
        value = self.listeners.lookup(layout.u32(slot))
        return None if value is None else int(struct.unpack("=Q", value)[0])

    def attach(self, netns_fd: int) -> bool:
        """Makes the link exist, in this namespace and with our program; returns whether it had to be made."""
        path = self.pins / "link"
        if path.exists():
            link = libbpf.obj_get(path)
            try:
                info = libbpf.LinkInfo(link)
                if info.target == os.fstat(netns_fd).st_ino:
                    if info.program_id == self.attached:
                        return False
                    if libbpf.program_tag_by_id(info.program_id) == libbpf.program_tag(self.program):
                        self.attached = info.program_id
                        return False
                    libbpf.link_update(link, self.program, f"steering of pod {self.pod_id}")
                    return True
            finally:
                os.close(link)
            path.unlink()
        link = libbpf.link_create(
            self.program, netns_fd, libbpf.AttachType.SK_LOOKUP, f"steering to the netns of pod {self.pod_id}"
        )
        try:
            libbpf.obj_pin(link, path)
        finally:
            os.close(link)
        return True

    def close(self) -> None:
        """Gives up our FDs; the pinned objects stay."""
        self.listeners.close()
        os.close(self.program)


def load(objects: Path, pins: Path, pod_id: int, shared: Mapping[str, libbpf.Map], replace: bool = False) -> Steering:
    """Loads the pod's program over its pinned listener map, if there is one. Attaches nothing yet.

    Args:
        pins: the pod's folder in bpffs.
        pod_id: becomes the program's constant.
        shared: the node-wide maps that it reads.
        replace: start with an empty listener map instead of the pinned one.

    Raises:
        BpfError: the kernel refused the program.
    """
    # Only the program and its map stay open: the object's memory and FDs would be held once for each pod.
    with libbpf.Object(objects / "lookup.bpf.o") as steering:
        pins.mkdir(parents=True, exist_ok=True)
        steering.set_constants(layout.u32(pod_id))
        for name, held in shared.items():
            steering.reuse_map(name, held)
        path = pins / "listeners"
        if replace:
            path.unlink(missing_ok=True)
        if path.exists():
            pinned = libbpf.Map.pinned(path)
            steering.reuse_map("listeners", pinned)
            pinned.close()
        steering.load()
        listeners = steering.map("listeners")
        try:
            if not path.exists():
                listeners.pin(path)
            return Steering(pins, pod_id, os.dup(steering.program_fd("um_lookup")), listeners)
        except BaseException:
            listeners.close()
            raise


def remove(pins: Path) -> None:
    """Detaches and unpins what is under a pod's folder in bpffs; its namespace may be gone already."""
    detach(pins)
    (pins / "listeners").unlink(missing_ok=True)
    if pins.is_dir():
        pins.rmdir()


def detach(pins: Path) -> None:
    """Takes the steering off; the listeners and their map stay."""
    path = pins / "link"
    if not path.exists():
        return
    link = libbpf.obj_get(path)
    try:
        if libbpf.LinkInfo(link).target:
            libbpf.link_detach(link, f"steering under {pins.name}")
    finally:
        os.close(link)
    path.unlink()
