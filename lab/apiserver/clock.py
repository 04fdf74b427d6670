"""Times as the API writes them."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> str:
    """The present second, RFC 3339 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def after(seconds: float) -> str:
    """The time in so many seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


def seconds_since(text: str) -> float:
    """How long ago that was; negative when it is to come. Raises ValueError."""
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
