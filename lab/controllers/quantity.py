"""Kubernetes quantities: 100m, 1.5, 128Mi, 2e3.

https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""

from __future__ import annotations

from fractions import Fraction

_SUFFIXES = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    **{suffix: Fraction(10 ** (3 * power)) for power, suffix in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{suffix: Fraction(2 ** (10 * power)) for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
}


def milli(text: str | int | float) -> int:
    """In thousandths, rounded up. Raises ValueError."""
    plain = str(text)
    for length in (2, 1, 0):
        suffix = plain[len(plain) - length :] if length else ""
        if suffix in _SUFFIXES and len(suffix) == length:
            try:
                number = Fraction(plain[: len(plain) - length])
            except ValueError:
                continue
            exact = number * _SUFFIXES[suffix] * 1000
            return -(-exact.numerator // exact.denominator)
    raise ValueError(f"{plain!r} is no quantity such as 100m, 1.5 or 128Mi")
