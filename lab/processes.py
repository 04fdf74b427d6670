"""Starts processes inside a cgroup and a netns of the lab."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from undermesh.lab import netns

# Every process of a lab carries its prefix in the environment, so that what is left can be recognised.
MARK = "UNDERMESH_LAB"

# The shell moves itself into the cgroup and becomes nsenter, which becomes the program: one pid throughout.
_ENTER_CGROUP = 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"'


@dataclass(frozen=True)
class Place:
    """Where a process of the lab lives."""

    prefix: str
    cgroup: Path
    netns: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` there."""
        return ["sh", "-c", _ENTER_CGROUP, "sh", str(self.cgroup), *netns.enter(self.netns, list(argv))]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a process there."""
        return {**os.environ, MARK: self.prefix, **(extra or {})}

    def start(
        self, argv: Sequence[str], *, log: IO[bytes] | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `argv` there, in a session of its own, with both outputs in `log` (None: nowhere)."""
        self.cgroup.mkdir(parents=True, exist_ok=True)
        output = log if log is not None else subprocess.DEVNULL
        return subprocess.Popen(
            self.command(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self.environment(env),
            start_new_session=True,
        )

    def run(self, argv: Sequence[str], *, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run `argv` there to its end; the caller judges the exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds and was killed.
        """
        self.cgroup.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            self.command(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment(),
        )


def stop(process: subprocess.Popen[bytes], *, grace: float = 5.0) -> bool:
    """SIGTERM, then SIGKILL after `grace` seconds; returns whether it went by itself."""
    if process.poll() is not None:
        return True
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True
