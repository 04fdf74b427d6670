"""Medians of what was measured, and of the ratios between what was measured in the same round. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

Metrics = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """What one measurement gave."""

    round: int
    workload: str
    variant: str
    metrics: Metrics
    """By name; units are part of the names (see workloads.METRICS)."""

    def as_json(self) -> dict[str, object]:
        """As a line of a report."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Several values of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


class Samples:
    """All of one run."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        for sample in samples:
            for metric, value in sample.metrics.items():
                self._values.setdefault((sample.workload, metric, sample.variant), {})[sample.round] = value

    def rows(self) -> Iterator[tuple[str, str]]:
        """Each (workload, metric), in the order in which they came."""
        yield from dict.fromkeys((workload, metric) for workload, metric, _ in self._values)

    def variants(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(variant for *_, variant in self._values))

    def spread(self, workload: str, metric: str, variant: str) -> Spread | None:
        """Of the values themselves; None: it was not measured."""
        values = self._values.get((workload, metric, variant))
        return Spread.of(list(values.values())) if values else None

    def ratio(self, workload: str, metric: str, variant: str, base: str) -> Spread | None:
        """Of a variant's value to the base's in the same round; None: no round has both, or the base is 0."""
        values = self._values.get((workload, metric, variant), {})
        bases = self._values.get((workload, metric, base), {})
        ratios = [value / bases[number] for number, value in values.items() if bases.get(number)]
        return Spread.of(ratios) if ratios else None


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each one begins with another name, so that none always follows the same one's leftovers."""
    start = number % len(names)
    return [*names[start:], *names[:start]]
