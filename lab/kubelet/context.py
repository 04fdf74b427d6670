"""What the parts of one kubelet share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from undermesh.lab.client import Client, Object, Recorder
from undermesh.lab.kubelet.backoff import Backoff
from undermesh.lab.kubelet.fields import NodeFacts
from undermesh.lab.kubelet.objects import Objects
from undermesh.lab.runtime.types import Runtime


@dataclass(frozen=True)
class Machine:
    """The node as the kubelet finds it; memory and disk in bytes."""

    name: str
    addresses: tuple[str, ...]
    cpus: int
    memory: int
    disk: int

    def facts(self, pod_addresses: tuple[str, ...] = ()) -> NodeFacts:
        """For a pod with these addresses."""
        return NodeFacts(self.name, self.addresses, pod_addresses, self.cpus, self.memory, self.disk)


def machine(name: str, addresses: tuple[str, ...]) -> Machine:
    """Look at the machine. Raises OSError."""
    words = Path("/proc/meminfo").read_text().split()
    memory = int(words[words.index("MemTotal:") + 1]) * 1024
    disk = os.statvfs("/var")
    return Machine(name, addresses, os.cpu_count() or 1, memory, disk.f_blocks * disk.f_frsize)


@dataclass(frozen=True)
class Cluster:
    """What pods need to know of the cluster."""

    dns_address: str
    domain: str


@dataclass
class Context:
    """Handed to every pod's worker."""

    machine: Machine
    cluster: Cluster
    client: Client
    runtime: Runtime
    recorder: Recorder
    objects: Objects
    backoff: Backoff = field(default_factory=Backoff)
    owners: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Container id -> what to call when it has ended."""
    starting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    """How many sandboxes may be made at a time: more only compete for the machine's cores."""

    def normal(self, pod: Object, reason: str, message: str, container: str = "") -> None:
        """Record an event."""
        self.recorder.event(pod, "Normal", reason, message, field_path=_path(pod, container))

    def warning(self, pod: Object, reason: str, message: str, container: str = "") -> None:
        """Record an event."""
        self.recorder.event(pod, "Warning", reason, message, field_path=_path(pod, container))


def _path(pod: Object, container: str) -> str:
    if not container:
        return ""
    is_init = any(found["name"] == container for found in pod["spec"].get("initContainers") or ())
    return f"spec.{'initContainers' if is_init else 'containers'}{{{container}}}"
