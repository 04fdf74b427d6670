"""Bars of the medians, with their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bytepath.stats import Samples


def plot(samples: Samples, units: Mapping[str, str], target: Path) -> None:
    """One panel per metric, in `target` as PNG.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: build/venv/bin/pip install -r requirements-bench.txt") from error
    rows = list(samples.rows())
    metrics = list(dict.fromkeys(metric for _, metric in rows))
    figure = Figure(figsize=(14, 3.2 * len(metrics)), layout="constrained")
    for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics, strict=True):
        names = [workload for workload, other in rows if other == metric]
        variants = samples.variants()
        for index, variant in enumerate(variants):
            found = [(i, samples.spread(name, metric, variant)) for i, name in enumerate(names)]
            there = [(i, spread) for i, spread in found if spread is not None]
            axes.bar(
                [i + index / (len(variants) + 1) for i, _ in there],
                [spread.median for _, spread in there],
                1 / (len(variants) + 1),
                yerr=[
                    [spread.median - spread.low for _, spread in there],
                    [spread.high - spread.median for _, spread in there],
                ],
                label=variant,
            )
        axes.set_xticks([i + 0.4 for i in range(len(names))], names, fontsize=7)
        axes.set_ylabel(units.get(metric, metric))
    figure.axes[0].legend(fontsize=7)
    figure.savefig(target, dpi=110)
