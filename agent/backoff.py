"""Waiting times between attempts: doubling, with jitter, up to a limit."""

from __future__ import annotations

import random


class Backoff:
    """Times in seconds. Each `next` lies between half and the whole of a step that doubles."""

    def __init__(self, first: float, limit: float) -> None:
        self._first = first
        self._limit = limit
        self._step = first

    def next(self) -> float:
        """How long to wait before the next attempt."""
        step, self._step = self._step, min(self._step * 2, self._limit)
        # Jitter keeps the nodes of a cluster from coming back all at once.
        return step * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """The attempt was a success."""
        self._step = self._first
