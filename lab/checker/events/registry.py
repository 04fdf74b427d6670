"""The registry of events, one function each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from undermesh.lab.checker.incidents import Incident

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

HOLD = 2.0
"""Seconds that a condition lasts."""

Cause = Callable[["KubeGround"], Incident]


def _nothing(_: KubeGround) -> str:
    return ""


def _nobody(_: KubeGround) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True)
class Event:
    """One thing that can be made happen."""

    text: str
    cause: Cause
    needs_mesh: bool
    lacks: Callable[[KubeGround], str]
    """Why it cannot be made happen here, by the name of what is missing; empty: it can."""
    ends: Callable[[KubeGround], frozenset[str]]
    """The names of the pods whose peers end by it."""
    moves: bool
    """Whether the pods that it ends come back elsewhere: they are not called after it in the same run."""


EVENTS: dict[str, Event] = {}


def event(
    name: str,
    text: str,
    *,
    needs_mesh: bool = True,
    lacks: Callable[[KubeGround], str] = _nothing,
    ends: Callable[[KubeGround], frozenset[str]] = _nobody,
    moves: bool = False,
) -> Callable[[Cause], Cause]:
    """Register a function as the cause of the event `name`."""

    def register(cause: Cause) -> Cause:
        EVENTS[name] = Event(text, cause, needs_mesh, lacks, ends, moves)
        return cause

    return register
