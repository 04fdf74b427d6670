"""Labs that other processes keep: found, started in the background, ended, whatever state they are in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from undermesh.lab.build import Build
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.footprint import Record, clean_up_after_crashes, named_labs
from undermesh.lab.kube import layout
from undermesh.lab.kube.layout import ClusterLayout

DEFAULT_NAME = "lab"
GRACE = 30.0
"""Seconds that a lab has to end by itself."""


def find(name: str | None) -> Record:
    """The lab of that name; without a name, the one called DEFAULT_NAME, or the only one.

    Raises:
        LabError: there is none, or several and no name.
    """
    return choose(named_labs(), name)


def absent(name: str) -> str:
    """Why there is nothing to end of that name; empty if there is."""
    labs = named_labs()
    if any(lab.name == name for lab in labs):
        return ""
    others = f"; there are {', '.join(lab.name for lab in labs)}" if labs else ""
    return f"no lab called {name}: nothing to remove{others}"


def choose(labs: Sequence[Record], name: str | None) -> Record:
    """As `find`, among these; pure."""
    if name is not None:
        for lab in labs:
            if lab.name == name:
                return lab
        known = f"there are {', '.join(lab.name for lab in labs)}" if labs else "there is none"
        raise LabError(f"no lab called {name}: {known}; `undermesh lab up --name {name}` makes it")
    for lab in labs:
        if lab.name == DEFAULT_NAME:
            return lab
    if len(labs) > 1:
        raise LabError(f"several labs are there ({', '.join(lab.name for lab in labs)}): choose one with --name")
    if not labs:
        raise LabError("no lab is up: `undermesh lab up` makes one")
    return labs[0]


def directory(lab: Record) -> Path:
    """Its directory on this machine."""
    return Path("/run") / lab.prefix


def layout_of(lab: Record) -> ClusterLayout:
    """Where everything of a lab is.

    Raises:
        LabError: it has just begun, or its remains are to be cleaned up.
    """
    if not lab.alive:
        raise LabError(f"lab {lab.name} was killed: `undermesh lab down --name {lab.name}` removes what it left")
    return layout.load(directory(lab) / "layout.json")


def start(name: str, nodes: int, *, mesh: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Start a lab in the background, and wait until it is ready; what it says of itself then.

    Ctrl-C ends it again: KeyboardInterrupt comes through when nothing is left of it.

    Raises:
        PreconditionError: this machine cannot run it, or the name is taken.
        LabError: it could not be made.
    """
    argv = [sys.executable, "-m", "undermesh.lab.kube", "serve", "--name", name, "--nodes", str(nodes)]
    process = subprocess.Popen(
        [*argv, *(["--mesh"] if mesh else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Build.of_this_package().root / "py")},
        # Ctrl-C at the terminal is for the command, which asks the lab to end.
        start_new_session=True,
        cwd="/",
    )
    try:
        return _follow(process, name, say)
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _follow(process: subprocess.Popen[bytes], name: str, say: Callable[[str], None]) -> dict[str, Any]:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            said = json.loads(line)
            if "ready" in said:
                ready: dict[str, Any] = said["ready"]
                return ready
            if "error" in said:
                process.wait()
                raise PreconditionError(said["error"], said["code"])
            say(said["say"])
    raise LabError(f"lab {name} ended with code {process.wait()} before it was ready")


def end(lab: Record) -> None:
    """End a lab and remove every trace of it, whether it lives, hangs or was killed.

    Raises:
        LabError: something could not be removed.
    """
    if lab.alive:
        _signal(lab, signal.SIGTERM)
        if not _ended(lab, GRACE):
            _signal(lab, signal.SIGKILL)
            if not _ended(lab, 5.0):
                raise LabError(f"lab {lab.name}: process {lab.owner} does not die: see /proc/{lab.owner}/stack")
    clean_up_after_crashes()


def _signal(lab: Record, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(lab.owner, number)


def _ended(lab: Record, seconds: float) -> bool:
    """Whether nobody keeps the lab any more within that time."""
    deadline = time.monotonic() + seconds
    while any(other.prefix == lab.prefix and other.alive for other in named_labs()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
