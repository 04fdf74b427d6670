"""What is measured, and which figures that gives. Each is one order to the load generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bytepath.accounts import Cpu
from bytepath.stats import Metrics

UNITS = {
    "gbps": "Gb/s",
    "p50": "p50, us",
    "p99": "p99, us",
    "p999": "p99.9, us",
    "per_second": "per second",
    "proxies_per_gb": "CPU s/GB, proxies",
    "whole_per_gb": "CPU s/GB, everything",
    "proxies_per_1000": "CPU ms/1000, proxies",
    "whole_per_1000": "CPU ms/1000, everything",
    "resident": "RSS B/connection, proxies",
    "anonymous": "heap B/connection, proxies",
}
"""How each metric is written; the keys are those of Metrics."""

Judge = Callable[[dict[str, Any], Cpu], Metrics]


@dataclass(frozen=True)
class Workload:
    """A name, the words of an order without the address, and how its answer becomes figures."""

    name: str
    verb: str
    words: tuple[object, ...]
    judge: Judge = field(repr=False)


def all_of(scale: float) -> list[Workload]:
    """Every workload; `scale` multiplies how much each one does."""

    def size(count: float) -> int:
        return max(1, round(count * scale))

    mib = max(32, size(256))
    bulk = [
        Workload(f"bulk {way}, {count} stream{'s' * (count > 1)}", "bulk", (mib, count, way), _of_bytes)
        for count, way in ((1, "up"), (2, "up"), (8, "up"), (32, "up"), (1, "down"), (8, "both"))
    ]
    return [
        *bulk,
        Workload("64 B round trips", "rtt", (64, size(2500), 0), _of_requests),
        Workload("1 KiB round trips", "rtt", (1024, size(2500), 0), _of_requests),
        Workload("64 B at 2000/s", "rtt", (64, size(1500), 2000), _of_requests),
        Workload("64 B at 500/s beside 4 uploads", "mixed", (64, size(400), 500, 4), _of_both),
        Workload("connections, 1 at a time", "conns", (size(400), 1), _of_connections),
        Workload("connections, 16 at a time", "conns", (size(1600), 16), _of_connections),
    ]


def _of_bytes(answer: dict[str, Any], used: Cpu) -> Metrics:
    gigabytes = answer["bytes"] / 1e9
    return {
        "gbps": answer["gbps"],
        "proxies_per_gb": used.proxies / gigabytes,
        "whole_per_gb": used.whole / gigabytes,
    }


def _of_requests(answer: dict[str, Any], used: Cpu) -> Metrics:
    return {key: answer[key] for key in ("p50", "p99", "p999")} | _per_1000(answer["count"], used)


def _of_connections(answer: dict[str, Any], used: Cpu) -> Metrics:
    return {key: answer[key] for key in ("per_second", "p99")} | _per_1000(answer["count"], used)


def _of_both(answer: dict[str, Any], used: Cpu) -> Metrics:
    return {key: answer[key] for key in ("p50", "p99", "gbps")}


def _per_1000(count: int, used: Cpu) -> Metrics:
    """CPU milliseconds per thousand, which is microseconds each."""
    return {"proxies_per_1000": used.proxies * 1e6 / count, "whole_per_1000": used.whole * 1e6 / count}
