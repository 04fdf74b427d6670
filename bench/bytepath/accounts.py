"""What the kernel has counted of cgroups and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab import cgroups

_KIB = 1024.0


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU, user and system."""

    proxies: float
    """Of the proxies on the way."""
    whole: float
    """Of everything in the topology, apps and load generator too, but nothing else of the machine."""

    def since(self, before: Cpu) -> Cpu:
        """What was used after `before`."""
        return Cpu(self.proxies - before.proxies, self.whole - before.whole)


@dataclass(frozen=True)
class Memory:
    """KiB that processes hold."""

    resident: float
    anonymous: float
    """Of these, what is no file: heap and stacks."""


def cpu(proxies: Iterable[Path], whole: Path) -> Cpu:
    """What was used so far, by cgroup."""
    return Cpu(sum(map(_cpu_seconds, proxies)), _cpu_seconds(whole))


def memory(proxies: Iterable[Path]) -> Memory:
    """What the processes of cgroups hold now, together."""
    pids = [pid for group in proxies for pid in cgroups.processes(group)]
    return Memory(sum(_status(pid, "VmRSS") for pid in pids), sum(_status(pid, "RssAnon") for pid in pids))


def _cpu_seconds(group: Path) -> float:
    return _field((group / "cpu.stat").read_text(), "usage_usec") / 1e6


def _status(pid: int, name: str) -> float:
    try:
        return _field(Path(f"/proc/{pid}/status").read_text(), f"{name}:")
    except FileNotFoundError:
        return 0.0


def _field(text: str, name: str) -> float:
    for line in text.splitlines():
        if line.startswith(name):
            return float(line.split()[1])
    raise ValueError(f"no field {name} in {text!r}")


def per_connection(now: Memory, before: Memory, count: int) -> Memory:
    """How much more is held, for each of `count` connections; bytes.

    The unit differs from that of `Memory` elsewhere: a connection has few KiB.
    """
    return Memory(
        (now.resident - before.resident) * _KIB / count,
        (now.anonymous - before.anonymous) * _KIB / count,
    )
