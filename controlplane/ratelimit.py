"""Token buckets, one per key: how often each node may ask the CA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    level: float
    filled: float


class RateLimit:
    """Allows bursts of `burst` and `per_second` in the long run, for each key on its own.

    Keys that are idle long enough to be full again are forgotten, so memory follows the active keys.
    """

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: str) -> bool:
        """True when the call may go ahead; it is counted then."""
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            self._forget_full(now)
            bucket = self._buckets[key] = _Bucket(self._burst, now)
        bucket.level = min(self._burst, bucket.level + (now - bucket.filled) * self._rate)
        bucket.filled = now
        if bucket.level < 1:
            return False
        bucket.level -= 1
        return True

    def _forget_full(self, now: float) -> None:
        full = self._burst / self._rate
        for key in [key for key, bucket in self._buckets.items() if now - bucket.filled > full]:
            del self._buckets[key]
