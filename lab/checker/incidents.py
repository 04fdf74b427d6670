"""What happened to the mesh during a run, and which namespaces were enrolled when."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

ENROL = "enrol"
UN_ENROL = "un-enrol"
DENY = "policy"
CLOSE = "policy-invalid"
FULL = "tmpfs-full"
DENIALS = (DENY, CLOSE, FULL)
"""During these a policy denies."""


@dataclass(frozen=True)
class Incident:
    """One event that was caused. Times are of CLOCK_MONOTONIC."""

    event: str
    began: float
    ended: float
    """When the cause and what it is known to entail were over; infinity: not within the run."""
    node: str | None = None
    """The only node that it concerns."""
    struck: float | None = None
    """When what was open had felt it for certain; None: `began`."""
    namespace: str | None = None
    """The only namespace that it concerns."""
    lost: tuple[str, ...] = ()
    """The pods that ended, and their peers with them."""
    account: str | None = None
    """The service account that a policy denies; None: it denies all."""
    target: str | None = None
    """The only pod for which a policy denies; None: all of the namespace."""
    governs: float | None = None
    """When every ztunnel had the policy."""
    lifted: float | None = None
    """When the policy was taken away."""

    def __str__(self) -> str:
        where = " ".join(one for one in (self.node, self.namespace, self.account, self.target, *self.lost) if one)
        return f"{self.event}{f' ({where})' if where else ''}"


class State(StrEnum):
    """Whether a namespace was in the mesh during an interval."""

    IN = "in"
    OUT = "out"
    CHANGING = "changing"


class Enrolments:
    """The state of each namespace over time."""

    def __init__(self, enrolled: Iterable[str], incidents: Iterable[Incident]) -> None:
        self._enrolled = frozenset(enrolled)
        self._changes = sorted(
            (one for one in incidents if one.event in (ENROL, UN_ENROL)), key=lambda change: change.began
        )

    def during(self, namespace: str, began: float, ended: float) -> State:
        """The state from `began` to `ended`; a change that touches the interval makes it CHANGING."""
        state = State.IN if namespace in self._enrolled else State.OUT
        changes = list(self._of(namespace))
        for change, following in itertools.zip_longest(changes, changes[1:]):
            if change.began > ended:
                break
            # What did not come to its end goes over into the next.
            over = change.ended if following is None else min(change.ended, following.began)
            if over >= began:
                return State.CHANGING
            state = State.IN if change.event == ENROL else State.OUT
        return state

    def ever(self, namespace: str) -> bool:
        """Whether it is in the mesh at any time of the run."""
        return namespace in self._enrolled or any(self._of(namespace))

    def _of(self, namespace: str) -> Iterator[Incident]:
        return (change for change in self._changes if change.namespace == namespace)
