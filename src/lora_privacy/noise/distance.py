"""The type of every distance between a law of the injected noise and a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lora_privacy import _notebook, _validate
from lora_privacy._digits import at_most
from lora_privacy._plain import plain_fields
from lora_privacy.errors import NonFiniteError
from lora_privacy.references import check_keys, cite

__all__ = ["Distance", "Metric", "round_up"]

Metric = Literal["total variation", "Kolmogorov", "KL(law ‖ reference), nats"]

# The formulas of the bounds lose at most 1e-12 of their value to rounding and to truncated series.
_MARGIN = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a law is from a reference Gaussian. A statement about laws, not a guarantee.

    No ε follows from it: a small distance of one entry bounds nothing about the joint law of a
    row or a matrix, and it says nothing about what a neighbouring data set would have given.

    Attributes:
        value: The distance, dimensionless for total variation and Kolmogorov, nats for KL.
        metric: ``"total variation"`` is ½∫|p − q| (never 2·sup), ``"Kolmogorov"`` is sup|P − Q|,
            and KL is from the law to the reference.
        kind: ``"exact"`` up to ``error``, or a proved ``"upper bound"``, rounded up.
        error: Absolute error of ``value``: an estimate by quadrature or of rounding for an exact
            distance, 0 for an upper bound, which is rounded up instead.
        law: The law that is measured, in words.
        reference: The Gaussian it is compared with, such as ``"N(0, 1/8)"``.
        method: How ``value`` was obtained.
        references: Keys into ``lora_privacy.references``.

    Raises:
        NonFiniteError: ``value`` or ``error`` is NaN.
        ValueError: ``value`` or ``error`` is negative.
    """

    value: float
    metric: Metric
    kind: Literal["exact", "upper bound"]
    error: float
    law: str
    reference: str
    method: str
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        if math.isnan(self.value) or math.isnan(self.error):
            raise NonFiniteError(
                f"a distance must be a number, got value {self.value} with error {self.error}; "
                "check the law it was computed from."
            )
        _validate.between("value", self.value, 0.0, math.inf)
        _validate.between("error", self.error, 0.0, math.inf)
        check_keys(*self.references)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return plain_fields(self)

    def __str__(self) -> str:
        """One sentence for a paper; an upper bound is printed rounded up."""
        unit = " nats" if "nats" in self.metric else ""
        name = self.metric.removesuffix(", nats")
        if self.kind == "upper bound":
            size = f"≤ {at_most(self.value)}{unit} (proved upper bound, {self.method})"
        else:
            size = f"= {self.value:.6g}{unit} (±{self.error:.0e}, {self.method})"
        return f"{name} of {self.law} to {self.reference} {size}; {cite(*self.references)}"

    def _repr_html_(self) -> str:
        return _notebook.box("Law, not a guarantee", [str(self)])


def round_up(value: float) -> float:
    """``value`` plus a relative margin for rounding; what leaves as an upper bound passes here."""
    return math.nextafter(value * (1.0 + _MARGIN), math.inf)
