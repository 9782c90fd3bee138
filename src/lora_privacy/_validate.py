"""Checks of single arguments: what must hold, what came, what to do."""

import math
import operator


def inside(name: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Raise ValueError unless ``low < value < high``; NaN fails every comparison, so it raises."""
    if not low < value < high:
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}), got {value!r}. {hint}".rstrip())


def between(name: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Raise ValueError unless ``low <= value <= high``, both ends allowed; NaN raises."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}. {hint}".rstrip())


def half_open(name: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Raise ValueError unless ``low <= value < high``; NaN raises."""
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}), got {value!r}. {hint}".rstrip())


def at_least(name: str, value: float, low: float, hint: str = "") -> None:
    """Raise ValueError unless ``low <= value < inf``; NaN raises."""
    if not low <= value < math.inf:
        raise ValueError(
            f"{name} must be finite and at least {low:g}, got {value!r}. {hint}".rstrip()
        )


def positive(name: str, value: float, hint: str = "") -> None:
    """Raise ValueError unless ``0 < value < inf``; NaN raises."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}. {hint}".rstrip())


def integer(name: str, value: int, low: int, hint: str = "") -> int:
    """Return ``value`` as an int, at least ``low``.

    Raises:
        TypeError: It is no integer type; a bool or a float such as 2.0 is none.
        ValueError: It is below ``low``.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}. {hint}".rstrip())
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}. {hint}".rstrip()) from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}. {hint}".rstrip())
    return number


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")
