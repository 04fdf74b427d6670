"""Quantities of the Kubernetes API: 100m, 1.5Gi, 2e3."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    **{f"{letter}i": Decimal(1024 ** (power + 1)) for power, letter in enumerate("KMGTPE")},
}


def parse(text: str | float) -> Decimal:
    """The number that a quantity means.

    Raises:
        ValueError: it is none.
    """
    text = str(text)
    number = text.rstrip("numkMGTPEi")
    try:
        return Decimal(number) * _SUFFIXES[text[len(number) :]]
    except (InvalidOperation, KeyError) as error:
        raise ValueError(f"{text!r} is no quantity such as 100m or 1.5Gi") from error


def up(text: str | float, unit: str | float = "1") -> int:
    """How many units a quantity is, rounded up, as the API rounds everywhere. Raises ValueError."""
    return math.ceil(parse(text) / parse(unit))
