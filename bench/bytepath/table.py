"""The result as Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bytepath.stats import Samples


def absolute(samples: Samples, units: Mapping[str, str]) -> str:
    """Medians of the values. `units` says how each metric is written."""
    variants = samples.variants()
    rows = []
    for workload, metric in samples.rows():
        found = [samples.spread(workload, metric, variant) for variant in variants]
        rows.append([workload, units.get(metric, metric), *(number(one.median) if one else "-" for one in found)])
    return markdown(["workload", "figure", *variants], rows)


def ratios(samples: Samples, units: Mapping[str, str], bases: Mapping[str, Sequence[str]]) -> str:
    """Medians of the ratios, and their range. `bases`: variant -> what it is compared with."""
    pairs = [(variant, base) for variant, all_ in bases.items() for base in all_]
    rows = []
    for workload, metric in samples.rows():
        found = [samples.ratio(workload, metric, *pair) for pair in pairs]
        if any(found):
            cells = [f"{one.median:.2f} ({one.low:.2f}-{one.high:.2f})" if one else "-" for one in found]
            rows.append([workload, units.get(metric, metric), *cells])
    return markdown(["workload", "figure", *(f"{variant} / {base}" for variant, base in pairs)], rows)


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their widest cell."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + " |"
        for line in lines
    )
