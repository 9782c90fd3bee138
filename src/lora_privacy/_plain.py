"""Results as JSON types."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, cast

__all__ = ["plain", "plain_fields", "unbox_floats"]


def plain(value: object) -> Any:  # noqa: ANN401
    """``value`` with lists for tuples, and infinities, which JSON lacks, as strings."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in cast("dict[Any, object]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[object]", value)]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def unbox_floats(result: Any) -> None:  # noqa: ANN401
    """Make the floats of a new dataclass Python's: numpy's print with their type."""
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
            object.__setattr__(result, field.name, float(value))


def plain_fields(result: Any) -> dict[str, Any]:  # noqa: ANN401
    """Fields of a dataclass; ``dataclasses.asdict`` keeps tuples and infinities."""
    return {field.name: plain(getattr(result, field.name)) for field in dataclasses.fields(result)}
