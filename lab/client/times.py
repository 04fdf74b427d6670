"""Times as the API writes them: RFC 3339 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The present second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_micro() -> str:
    """The present microsecond, as Leases and the eventTime of Events have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds_since(text: str) -> float:
    """How long ago that was; negative when it is to come. Raises ValueError."""
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
