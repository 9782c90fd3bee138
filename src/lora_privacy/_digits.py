"""Numbers in decimal, rounded to the side on which a bound stays true."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

__all__ = ["at_most", "round_down", "round_up"]


def round_up(value: float) -> str:
    """``value`` in decimal with six significant digits, never below ``value``.

    >>> round_up(1.00000001)
    '1.00001'
    """
    return _rounded(value, ROUND_CEILING)


def round_down(value: float) -> str:
    """``value`` in decimal with six significant digits, never above ``value``.

    >>> round_down(0.99999999)
    '0.999999'
    """
    return _rounded(value, ROUND_FLOOR)


def at_most(value: float) -> str:
    """``value`` in up to six significant digits, never below it.

    >>> at_most(1e-5), at_most(0.16144097)
    ('1e-05', '0.161441')
    """
    short = f"{value:.6g}"
    return short if float(short) >= value else round_up(value)


def _rounded(value: float, rounding: str) -> str:
    exact = Decimal(value)
    if exact == 0 or not exact.is_finite():
        return f"{value:g}"
    digit = Decimal(1).scaleb(exact.adjusted() - 5)
    return f"{exact.quantize(digit, rounding=rounding).normalize():g}"
