"""Times and validity as tables show them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undermesh.cli import tables
from undermesh.cli.answers import Certificate, Check


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (303, "5m03s"),
        (3600, "1h00m"),
        (7800, "2h10m"),
        (86400, "1d0h"),
        (273600, "3d4h"),
    ],
)
def test_a_span_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert tables.span(seconds) == text


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (90, "NOT YET VALID, starts in 10s"),
        (100, "valid, 1m40s left"),
        (199.5, "valid, 0s left"),
        (200, "EXPIRED 0s ago"),
        (4000, "EXPIRED 1h03m ago"),
    ],
)
def test_validity_changes_at_the_bounds_of_the_certificate(now: float, text: str) -> None:
    assert tables.validity(Certificate(identity="x", not_before_unix=100, not_after_unix=200), now) == text


def test_a_certificate_that_was_never_issued_is_missing() -> None:
    assert tables.validity(Certificate(identity="x", error="refused"), 5) == "MISSING"


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_any_number_that_the_wire_can_hold_is_shown_as_a_date_or_as_itself(unix: int) -> None:
    assert tables.date(unix) in ("-", str(unix)) or tables.date(unix).endswith("Z")


@pytest.mark.parametrize(
    ("check", "word"),
    [
        (Check(name="x", ok=True), "ok"),
        (Check(name="x", ok=True, next_step=""), "ok"),
        (Check(name="x", ok=True, next_step="install it"), "WARN"),
        (Check(name="x", ok=False, next_step="install it"), "FAIL"),
    ],
)
def test_a_check_is_ok_a_warning_or_a_failure(check: Check, word: str) -> None:
    assert tables.verdict(check) == word
