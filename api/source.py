"""Where objects come from: what the agent and the control plane ask of a source."""

from collections.abc import AsyncIterator
from typing import Protocol

from undermesh.api.objects import Objects
from undermesh.api.problems import Problem


class Source(Protocol):
    """A supplier of object snapshots, such as a directory of files."""

    @property
    def current(self) -> Objects:
        """The last good state; empty before the first one was read."""
        ...

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What is wrong with the input right now; empty when all of it is in `current`."""
        ...

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """Those of `errors` without whose mending a first state must not be acted upon: it lacks policies."""
        ...

    def watch(self) -> AsyncIterator[Objects]:
        """Yield the first complete state, then each state that differs from the one before, without end.

        A slow consumer skips states in between and never misses the last one. Several may watch at a time.
        """
        ...
