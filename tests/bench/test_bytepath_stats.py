"""Medians and ratios of benchmark samples, and the tables made of them."""

from __future__ import annotations

from bytepath import table
from bytepath.stats import Sample, Samples, Spread, turns


def sample(number: int, variant: str, **metrics: float) -> Sample:
    return Sample(number, "bulk", variant, metrics)


SAMPLES = Samples(
    [
        sample(0, "none", gbps=40.0, cpu=0.0),
        sample(0, "mesh", gbps=10.0, cpu=1.5),
        sample(1, "none", gbps=20.0, cpu=0.0),
        sample(1, "mesh", gbps=8.0, cpu=1.0),
        sample(2, "none", gbps=10.0, cpu=0.0),
        sample(2, "mesh", gbps=9.0, cpu=2.0),
        Sample(0, "idle", "mesh", {"resident": 1234.5}),
    ]
)


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    """Of 0.25, 0.4 and 0.9; the medians' ratio would be 0.45."""
    assert SAMPLES.ratio("bulk", "gbps", "mesh", "none") == Spread(0.4, 0.25, 0.9)
    assert SAMPLES.spread("bulk", "gbps", "mesh") == Spread(9.0, 8.0, 10.0)


def test_what_was_not_measured_on_both_sides_has_no_ratio():
    assert SAMPLES.ratio("bulk", "cpu", "mesh", "none") is None
    assert SAMPLES.ratio("idle", "resident", "mesh", "none") is None
    assert SAMPLES.ratio("bulk", "gbps", "mesh", "unknown") is None
    assert SAMPLES.spread("idle", "resident", "none") is None
    apart = Samples([sample(0, "none", gbps=1.0), sample(1, "mesh", gbps=1.0)])
    assert apart.ratio("bulk", "gbps", "mesh", "none") is None


def test_rows_and_variants_come_in_the_order_of_the_run():
    assert list(SAMPLES.rows()) == [("bulk", "gbps"), ("bulk", "cpu"), ("idle", "resident")]
    assert SAMPLES.variants() == ["none", "mesh"]


def test_every_name_has_every_turn_once():
    orders = [turns(["a", "b", "c"], number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_tables_tell_what_is_missing_by_a_dash():
    units = {"gbps": "Gb/s"}
    assert table.absolute(SAMPLES, units).splitlines() == [
        "| workload | figure   | none | mesh |",
        "| ---      | ---      | ---  | --- |",
        "| bulk     | Gb/s     | 20   | 9 |",
        "| bulk     | cpu      | 0    | 1.5 |",
        "| idle     | resident | -    | 1234 |",
    ]
    assert table.ratios(SAMPLES, units, {"none": [], "mesh": ["none"]}).splitlines() == [
        "| workload | figure | mesh / none |",
        "| ---      | ---    | --- |",
        "| bulk     | Gb/s   | 0.40 (0.25-0.90) |",
    ]
