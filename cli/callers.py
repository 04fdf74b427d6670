"""Explanations for many callers of one destination, gathered into rows; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

from undermesh.cli import answers

NOTHING_TO_EXPLAIN: Final = 404
"""The agent's status for a question that has no answer."""
STRANGERS: Final = ("192.0.2.1", "2001:db8::1")
"""Addresses for documentation: nobody has them."""


@dataclass(frozen=True)
class Caller:
    """Those who fare the same way: `identity` is empty for plaintext, `by` names the policy that decides, if one."""

    identity: str
    result: str
    by: str
    lane: str
    sources: tuple[str, ...]


def gather(found: Iterable[answers.Explanation]) -> list[Caller]:
    """One row for each identity and outcome; those who are refused come first."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for answer in found:
        for key in sorted({_outcome(answer, way) for way in answer.ways}):
            rows.setdefault(key, []).append(answer.source_workload or f"anyone ({answer.source_address})")
    return [
        Caller(identity, result, by, lane, tuple(sorted(set(sources))))
        for (identity, result, by, lane), sources in sorted(rows.items(), key=lambda row: (row[0][1], row[0]))
    ]


def plain(caller: Caller) -> dict[str, object]:
    """For programs."""
    return {**asdict(caller), "sources": list(caller.sources)}


def _outcome(answer: answers.Explanation, way: answers.Way) -> tuple[str, str, str, str]:
    by = way.policy or way.reason or ("" if way.judged else "nobody asks policy")
    return answer.source_identity, "allowed" if way.allowed else "REFUSED", by, way.lane
