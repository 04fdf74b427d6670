"""Runs other programs, and says what they said when they fail."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from undermesh.lab.errors import ToolError


def run(argv: Sequence[str], *, stdin: str | None = None, timeout: float = 20.0) -> str:
    """Run `argv` to its end and return its standard output.

    Raises:
        ToolError: it is not installed, returned non-zero, or took longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError as error:
        raise ToolError(f"{argv[0]}: not found; `make build` installs what the lab needs") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{' '.join(argv)}: no end after {timeout:g} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").replace("\n", "; ")
        raise ToolError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")
    return done.stdout


def ip_batch(netns: str, commands: Sequence[str]) -> None:
    """Run `ip` commands (without the leading "ip") inside a netns, in one process; the first failure stops.

    Raises:
        ToolError: one of the commands failed; iproute2 names its line.
    """
    try:
        run(["ip", "-n", netns, "-batch", "-"], stdin="\n".join(commands) + "\n")
    except ToolError as error:
        numbered = "; ".join(f"{number}: {command}" for number, command in enumerate(commands, 1))
        raise ToolError(f"{error} (lines: {numbered})") from error
