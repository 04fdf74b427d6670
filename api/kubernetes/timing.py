"""Every waiting time of the source in one place."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Times in seconds."""

    connect: float = 10.0
    answer: float = 60.0
    """Between two parts of an answer that is no watch. Slow lists are ordinary on a busy server."""
    silence: float = 130.0
    """After which an open watch is taken for dead. Servers send a bookmark about once a minute."""
    watch: tuple[int, int] = (240, 480)
    """How long a watch is asked to last, drawn at random: not all of a cluster's agents come back at once."""
    first_retry: float = 0.25
    last_retry: float = 30.0
    absent: float = 5.0
    """Between two looks for a kind that is not installed: its policies should not wait for long once it is."""
    longest_wait: float = 120.0
    """The most that a server's Retry-After is believed."""
    coalesce: float = 0.05
    """From the first change to the snapshot that holds it and whatever came meanwhile."""
    short_watch: float = 1.0
    """A watch that ended sooner than this, again and again, is slowed down."""

    def retry(self, failures: int, asked: float | None = None) -> float:
        """How long to wait after this many failures in a row: doubling, with jitter; at least what was asked."""
        step = min(self.last_retry, self.first_retry * float(1 << min(failures - 1, 16)))
        wait = step * random.uniform(0.5, 1.0)
        return wait if asked is None else max(wait, min(asked, self.longest_wait) * random.uniform(1.0, 1.1))
