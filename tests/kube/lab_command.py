"""`undermesh lab` as a user calls it, and what the machine shows of labs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from undermesh.lab import cgroups, footprint, snapshot
from undermesh.lab.processes import MARK

COMMAND = (sys.executable, "-m", "undermesh.cli", "lab")


def run(*arguments: str, code: int = 0, seconds: float = 60.0) -> str:
    """Both outputs of a command that must end with that exit code."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, f"lab {' '.join(arguments)}: exit code {done.returncode}\n{said}"
    return said


def record(name: str) -> footprint.Record | None:
    """What the registry knows of a lab."""
    return next((lab for lab in footprint.named_labs() if lab.name == name), None)


def traces(prefix: str) -> list[str]:
    """What a lab has on the machine."""
    found = [f"{kind}: {line}" for kind, line in snapshot.take_host(prefix) if prefix in line or kind == "process"]
    found += [f"mount: {line}" for line in Path("/proc/self/mounts").read_text().splitlines() if prefix in line]
    found += [f"marked process: {pid}" for pid in marked(prefix)]
    return found


def marked(prefix: str) -> list[int]:
    """Processes that carry a lab's mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{MARK}={prefix}".encode() in environment:
                found.append(int(entry.name))
    return found


def prefixes() -> set[str]:
    """Those of all labs on the machine, by any of their names."""
    directories = [Path("/run"), Path("/run/netns"), cgroups.mount_point()]
    names = {name for directory in directories if directory.exists() for name in os.listdir(directory)}
    return {name[:7] for name in names if name.startswith("um-") and len(name) >= 7}
