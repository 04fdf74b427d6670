"""Waiting longer after each failure: restarts of a container, pulls of an image. Pure: the time is given.

Source: client-go util/flowcontrol/backoff.go as the kubelet uses it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

FIRST, LONGEST = 10.0, 300.0
"""Seconds."""


@dataclass
class _Entry:
    seconds: float
    at: float


class Backoff:
    """Delays by key, in seconds: doubled from FIRST to LONGEST, forgotten after twice LONGEST without failure."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def until(self, key: Hashable, failed_at: float) -> float:
        """When to try again what failed at that time; not later than `failed_at` if at once."""
        entry = self._entries.get(key)
        if entry is None or failed_at - entry.at > 2 * LONGEST:
            return failed_at
        return failed_at + entry.seconds

    def seconds(self, key: Hashable) -> float:
        """The delay in force; 0 without one."""
        entry = self._entries.get(key)
        return 0.0 if entry is None else entry.seconds

    def tried(self, key: Hashable, failed_at: float) -> None:
        """It is tried again after the failure at that time: the next delay is longer."""
        entry = self._entries.get(key)
        if entry is None or failed_at - entry.at > 2 * LONGEST:
            self._entries[key] = _Entry(FIRST, failed_at)
        else:
            self._entries[key] = _Entry(min(2 * entry.seconds, LONGEST), failed_at)

    def forget(self, owner: str) -> None:
        """Drop the keys (tuples) that begin with `owner`."""
        self._entries = {key: entry for key, entry in self._entries.items() if not _begins(key, owner)}


def _begins(key: Hashable, owner: str) -> bool:
    return isinstance(key, tuple) and key[0] == owner
