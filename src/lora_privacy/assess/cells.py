"""Numbers as a table's cells show them: bounds rounded to the safe side, rates with limits."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING

from lora_privacy import _digits
from lora_privacy.audit._binomial import upper_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.assess.training import Score
    from lora_privacy.audit import RateEstimate

__all__ = [
    "NONE",
    "accuracy_interval",
    "at_least",
    "at_most",
    "interval",
    "median",
    "number",
    "rate_cell",
    "score_cell",
    "target_of",
]

NONE = "–"
"""A cell of what does not apply."""

_MISS = 0.05  # probability that an interval of accuracy misses


def number(value: float, digits: int = 3) -> str:
    """A number to ``digits`` significant digits, with ``∞`` for infinity.

    >>> number(12345.678), number(0.000123), number(float("inf")), number(1.0)
    ('12,300', '1.23e-04', '∞', '1.00')
    """
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"  # rounds first, so that 0.9996 counts as 1.00
    power = int(scientific.split("e")[1])
    if power < -3:
        return scientific
    return f"{float(scientific):,.{max(0, digits - 1 - power)}f}"


def at_most(value: float, digits: int = 3) -> str:
    """An upper bound to ``digits`` significant digits, never below ``value``.

    >>> at_most(7.99988), at_most(0.12341), at_most(1.1), at_most(float("inf"))
    ('8.00', '0.124', '1.10', '∞')
    """
    return number(_directed(value, digits, ROUND_CEILING), digits)


def at_least(value: float, digits: int = 3) -> str:
    """A lower bound to ``digits`` significant digits, never above ``value``.

    >>> at_least(0.99999), at_least(0.12349), at_least(0.0)
    ('0.999', '0.123', '0')
    """
    return number(_directed(value, digits, ROUND_FLOOR), digits)


def interval(value: float, low: float, high: float, *, scale: float = 1.0, places: int = 3) -> str:
    """A value with its limits, which are rounded outwards, after all are multiplied by ``scale``.

    >>> interval(0.53411, 0.48149, 0.58701)
    '0.534 [0.481, 0.588]'
    """
    step = Decimal(1).scaleb(-places)
    ends = [
        (Decimal(end) * Decimal(scale)).quantize(step, rounding)
        for end, rounding in ((low, ROUND_FLOOR), (high, ROUND_CEILING))
    ]
    return f"{value * scale:.{places}f} [{ends[0]}, {ends[1]}]"


def rate_cell(rate: RateEstimate | str) -> str:
    """An attack's rate with its limits; ``none`` where a reason stands in its place."""
    return "none" if isinstance(rate, str) else interval(rate.value, rate.low, rate.high)


def accuracy_interval(score: Score) -> tuple[float, float]:
    """Clopper–Pearson limits of an accuracy: the right level at every size, and at 0 and 1.

    Raises:
        ValueError: The score has no accuracy.
    """
    if score.accuracy is None:
        raise ValueError("a language model's score has no accuracy to give limits of.")
    right = round(score.accuracy * score.examples)
    low = 1 - float(upper_limit(score.examples - right, score.examples, _MISS / 2))
    return max(0.0, low), float(upper_limit(right, score.examples, _MISS / 2))


def score_cell(score: Score) -> str:
    """Accuracy in per cent with its limits, or a language model's loss in nats."""
    if score.accuracy is None:
        return f"{score.loss:.4f}"
    return interval(score.accuracy, *accuracy_interval(score), scale=100.0, places=1)


def target_of(epsilon: float) -> str:
    """What a price is for: a target met at ``epsilon`` is met at what is shown.

    >>> target_of(8.0), target_of(1.2345644)
    ('ε ≤ 8', 'ε ≤ 1.23457')
    """
    return f"ε ≤ {_digits.at_most(epsilon)}"


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of both; ValueError for none."""
    if not values:
        raise ValueError("values must hold at least one number.")
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def _directed(value: float, digits: int, rounding: str) -> float:
    exact = Decimal(value)
    if exact == 0 or not exact.is_finite() or float(f"{value:.{digits - 1}e}") == value:
        return value  # 1.1 is a little more than 11/10, and still shown as 1.10
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return float(exact.quantize(step, rounding))
