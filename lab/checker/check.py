"""`undermesh lab check`: a run of the checker per event, on a lab that is up or on one of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from undermesh.lab.checker.events import EVENTS
from undermesh.lab.checker.expectations import Kind, Violation
from undermesh.lab.checker.incidents import ENROL, UN_ENROL
from undermesh.lab.checker.kubeground import KubeGround, LabCluster
from undermesh.lab.checker.matrix import CALM, Matrix
from undermesh.lab.checker.run import Finding, Outcome, Settings, run
from undermesh.lab.errors import LabError
from undermesh.lab.footprint import named_labs
from undermesh.lab.kube import remote
from undermesh.lab.kube.attached import AttachedCluster
from undermesh.lab.kube.cluster import KubeCluster

DEFAULT_NAME = "check"
"""Of a lab of its own."""
PLAIN_WIDTH = 200
"""Columns of the table where there is no terminal to ask."""
_SETTLE = 15.0

Say = Callable[[str], None]


def command(
    name: str | None, events: Sequence[str], settings: Settings, *, mesh: bool, file: Path | None, logs: Path | None
) -> int:
    """What the verb does; returns its exit status.

    Raises:
        PreconditionError: this machine cannot run a lab.
        LabError: the lab or the checker itself failed.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    matrix = Matrix(mesh)
    try:
        with cluster_for(name, mesh=mesh, say=say, logs=logs) as cluster:
            check(cluster, events, settings, matrix, say)
    finally:
        # What was seen is shown, whatever came after it.
        if matrix.rows:
            matrix.show(console)
        if file is not None:
            file.write_text("".join(f"{line}\n" for line in matrix.lines()))
    return os.EX_OK if matrix.ok else 1


@contextlib.contextmanager
def cluster_for(name: str | None, *, mesh: bool, say: Say, logs: Path | None = None) -> Iterator[LabCluster]:
    """The lab of that name, or one of its own that ends with the block."""
    wanted = name or DEFAULT_NAME
    if any(lab.name == wanted for lab in named_labs()):
        yield AttachedCluster(remote.find(wanted))
        return
    with KubeCluster(wanted, nodes=2, report=say, logs=logs and logs.absolute()) as cluster:
        if mesh:
            cluster.install_mesh()
        yield cluster


def check(cluster: LabCluster, events: Sequence[str], settings: Settings, matrix: Matrix, say: Say) -> None:
    """Fill a table: a run without an event, and one for each of these; none: for each that there is.

    Raises:
        LabError: an event is not known here, or the checker's pods cannot be made or do not come back.
    """
    ground = KubeGround(cluster, mesh=matrix.mesh)
    unknown = sorted(set(events) - set(ground.events))
    if unknown:
        known = ", ".join(sorted(ground.events))
        raise LabError(f"events {', '.join(unknown)}: not known here; known are {known}")
    with ground:
        for event in (CALM, *(events or ground.events)):
            lacks = EVENTS[event].lacks(ground) if event in EVENTS else ""
            if lacks:
                matrix.refused[event] = lacks
                continue
            say(f"=== {event}")
            for broken in matrix.add(event, _row(ground, event, settings, say)):
                say(f"broken: {broken}")


def begins_enrolled(events: Sequence[str]) -> bool:
    """Whether the namespace that changes begins in the mesh: if it is not to be enrolled first."""
    return next((event for event in events if event in (ENROL, UN_ENROL)), UN_ENROL) == UN_ENROL


def observed(ground: KubeGround, settings: Settings, say: Say) -> Outcome:
    """One run, and what it left behind."""
    ground.arrange(flip_enrolled=begins_enrolled(settings.events))
    before = ground.inventory()
    outcome = run(ground, settings, say)
    # What is in the mesh now has more there than before it was.
    if ENROL not in settings.events:
        left = ground.left_over(before, _SETTLE)
        outcome.findings += [Finding(Violation(Kind.LEFT, time.monotonic(), text), None) for text in left]
    return outcome


def _row(ground: KubeGround, event: str, settings: Settings, say: Say) -> list[Outcome]:
    events = () if event == CALM else (event,)
    try:
        outcomes = [observed(ground, dataclasses.replace(settings, events=events), say)]
        if events and EVENTS[event].moves:
            outcomes.append(observed(ground, dataclasses.replace(settings, events=()), say))
    except LabError as error:
        now = time.monotonic()
        say(f"{event}: {error}")
        ground.mend()
        return [Outcome(now, findings=[Finding(Violation(Kind.UNFINISHED, now, str(error)), None)])]
    return outcomes
