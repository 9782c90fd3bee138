"""What may be quoted: a proven bound, one pair's divergence, and a reading that proves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_privacy import _notebook, _validate
from lora_privacy._digits import round_up
from lora_privacy._notebook import Listed, Part
from lora_privacy._plain import plain_fields, unbox_floats
from lora_privacy.references import check_keys, cite

__all__ = [
    "CAVEATS",
    "Adjacency",
    "Aggregation",
    "ImpliedPrivacy",
    "PairDivergence",
    "PrivacyBound",
]

Adjacency = Literal["add-remove", "replace"]
Aggregation = Literal["independent", "coherent"]

ADJACENCIES: tuple[str, ...] = get_args(Adjacency)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)

CAVEATS = (
    "Hyper-parameter search, choice of the best checkpoint and early stopping are not accounted.",
    "Arithmetic is floating point: the attack of Mironov (2012) on Gaussian samplers is not "
    "excluded.",
)
"""Printed with every bound."""

# Assumptions that accountants share.
CLIPPED = "each record's contribution to a release has norm at most the clip norm"
POISSON_SAMPLED = "each release has its own Poisson sample, independent of all others and secret"
GAUSSIAN_NOISE = "the noise is Gaussian, fresh for each release and unknown to others"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyBound:
    """A proven (ε, δ) guarantee and what is needed to quote it.

    Attributes:
        epsilon: Upper bound, in nats, >= 0; ``inf`` means that no bound is known, and ``reason``
            then says why.
        delta: The δ it holds at, dimensionless, in (0, 1). δ = 1, which promises nothing, is
            allowed with a ``reason``.
        adjacency: Neighbouring relation: ``"add-remove"`` adds or removes one privacy unit,
            ``"replace"`` exchanges one for another.
        method: Accountant that proved it, such as ``"rdp"``.
        assumptions: What must be true of the run for the proof to apply.
        references: Keys into ``lora_privacy.references``.
        unit: What one neighbour differs by.
        reason: Why there is no bound; None when there is one.

    Raises:
        ValueError: A number is NaN or out of range, or a vacuous bound gives no reason.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency
    method: str
    assumptions: tuple[str, ...]
    references: tuple[str, ...]
    unit: str = "one training example"
    reason: str | None = None

    def __post_init__(self) -> None:
        unbox_floats(self)
        _check_epsilon(self.epsilon, self.reason)
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        if not (self.delta == 1 and self.reason):
            _validate.inside("delta", self.delta, 0, 1, "δ = 1 holds for every mechanism.")
        check_keys(*self.references)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What no bound of this library covers."""
        return CAVEATS

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields; an infinite ε is the string ``"inf"``, which ``float`` reads back."""
        return {"kind": "guarantee", **plain_fields(self), "caveats": list(self.caveats)}

    def __str__(self) -> str:
        """A paragraph to paste; ε is rounded up in its last digit, δ is printed in full."""
        return _notebook.paragraph(bound_parts(self))

    def _repr_html_(self) -> str:
        kind = "Guarantee" if self.reason is None else "No guarantee"
        return _notebook.box(kind, bound_parts(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpliedPrivacy:
    """A heuristic reading of a projection's noise as if it were DP-SGD's. Not a guarantee.

    It answers "if the injected noise were Gaussian, independent of the data and fresh, which ε
    would an accountant print?" and lists the assumptions that fail. No method turns it into a
    ``PrivacyBound``. The reading is that of arXiv:2409.17538, versions 2-3; version 9 claims a
    proof for a frozen A, which this type neither uses nor refutes.

    Attributes:
        epsilon: What the accountant would print, in nats; ``inf`` with a ``reason``.
        delta: The δ handed to the accountant, in (0, 1); the failure probability is not in it.
        noise_multiplier: Implied z over all layers, dimensionless, >= 0.
        sample_rate: Batch size over data set size, in (0, 1].
        steps: Optimizer steps.
        distortion: Declared distortion τ of the row norms, >= 0.
        failure_probability: Union bound on the event that some row of some sample in some step
            is distorted by more than τ, for rows fixed before A is drawn; 1 is vacuous.
        failure_probability_per_step: The same for one step.
        aggregation: How the noises of the samples of a batch were taken to add up.
        layers: ``(out_features, rank)`` of each adapted layer.
        failing_assumptions: Why this is not a guarantee.
        references: Keys into ``lora_privacy.references``.
        reason: Why ε is infinite; None when it is not.

    Raises:
        ValueError: A number is NaN or out of range, an infinite ε has no reason, or no failing
            assumption is named.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    distortion: float
    failure_probability: float
    failure_probability_per_step: float
    aggregation: Aggregation
    layers: tuple[tuple[int, int], ...]
    failing_assumptions: tuple[str, ...]
    references: tuple[str, ...]
    reason: str | None = None

    def __post_init__(self) -> None:
        unbox_floats(self)
        _check_epsilon(self.epsilon, self.reason)
        _validate.inside("delta", self.delta, 0, 1)
        for name in ("noise_multiplier", "distortion"):
            _validate.between(name, getattr(self, name), 0, math.inf)
        for name in ("failure_probability", "failure_probability_per_step", "sample_rate"):
            _validate.between(name, getattr(self, name), 0, 1)
        _validate.choice("aggregation", self.aggregation, AGGREGATIONS)
        if not self.failing_assumptions:
            raise ValueError(
                "failing_assumptions must name at least one: a reading whose assumptions all held "
                "would be a guarantee, and this type is none."
            )
        check_keys(*self.references)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields; an infinite ε is the string ``"inf"``, which ``float`` reads back."""
        return {"kind": "heuristic reading, not a guarantee", **plain_fields(self)}

    def __str__(self) -> str:
        """A paragraph to paste. It opens by saying what it is not."""
        return _notebook.paragraph(self._parts())

    def _repr_html_(self) -> str:
        return _notebook.box("Reading, not a guarantee", self._parts())

    def _parts(self) -> list[Part]:
        epsilon = "infinite" if math.isinf(self.epsilon) else round_up(self.epsilon)
        because = "" if self.reason is None else f" ({self.reason})"
        return [
            "Not a guarantee.",
            "If the noise that the projection injects were Gaussian, independent of the data "
            f"and fresh, its implied noise multiplier would be {self.noise_multiplier:.4g} "
            f"and ε would be {epsilon} nats at δ = {self.delta!r}{because}: "
            f"{self.steps} steps at sampling rate {self.sample_rate:.4g}, "
            f"{len(self.layers)} adapted layers, {self.aggregation} aggregation, "
            f"distortion {self.distortion:g}, which fails with probability up to "
            f"{self.failure_probability:.3g}.",
            Listed("These assumptions fail:", self.failing_assumptions),
            f"Reading of [{cite(*self.references)}].",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDivergence:
    """How far apart one mechanism's outputs are for two given inputs. Not a guarantee.

    Its ε is a function of the two inputs, which are private data, and says nothing of any other
    pair. No method turns it into a ``PrivacyBound``.

    Attributes:
        epsilon: The larger direction, in nats, >= 0; ``inf`` with a ``reason``.
        forward: Smallest ε with P[output in E | input] <= e^ε P[output in E | input'] + δ for
            every event E, or an upper bound where ``method`` says so.
        backward: The same with the inputs exchanged.
        delta: The δ it holds at, in (0, 1).
        method: How it was computed, such as ``"exact profile"``.
        pair: The two inputs, as far as the mechanism can tell them apart.
        references: Keys into ``lora_privacy.references``.
        reason: Why ε is infinite; None when it is not.

    Raises:
        ValueError: A number is NaN or out of range, ``epsilon`` is not the larger direction, or
            an infinite ε has no reason.
    """

    epsilon: float
    forward: float
    backward: float
    delta: float
    method: str
    pair: str
    references: tuple[str, ...]
    reason: str | None = None

    def __post_init__(self) -> None:
        unbox_floats(self)
        _check_epsilon(self.epsilon, self.reason)
        for name in ("forward", "backward"):
            _validate.between(name, getattr(self, name), 0, math.inf)
        if self.epsilon != max(self.forward, self.backward):
            raise ValueError(
                f"epsilon must be the larger of forward = {self.forward!r} and "
                f"backward = {self.backward!r}, got {self.epsilon!r}."
            )
        _validate.inside("delta", self.delta, 0, 1)
        check_keys(*self.references)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields; an infinite ε is the string ``"inf"``, which ``float`` reads back."""
        return {"kind": "divergence of one pair, not a guarantee", **plain_fields(self)}

    def __str__(self) -> str:
        """A paragraph to paste. It opens by saying what it is not."""
        return _notebook.paragraph(self._parts())

    def _repr_html_(self) -> str:
        return _notebook.box("Divergence of one pair, not a guarantee", self._parts())

    def _parts(self) -> list[Part]:
        epsilon = "infinite" if math.isinf(self.epsilon) else round_up(self.epsilon)
        because = "" if self.reason is None else f" ({self.reason})"
        return [
            "Not a guarantee.",
            f"For this one pair, {self.pair}, ε is {epsilon} nats at δ = "
            f"{self.delta!r}{because}; forward {round_up(self.forward)}, "
            f"backward {round_up(self.backward)}.",
            "ε depends on the private inputs, and another pair has another one.",
            f"Method: {self.method} [{cite(*self.references)}].",
        ]


def bound_parts(bound: PrivacyBound) -> list[Part]:
    """The sentences of a bound, for itself and for results that carry one."""
    if bound.reason is not None:
        head = f"No guarantee at δ = {bound.delta!r}: {bound.reason}"
    else:
        head = f"({round_up(bound.epsilon)}, {bound.delta!r})-differential privacy (ε in nats)."
    return [
        head,
        f"Neighbours: {bound.adjacency} of {bound.unit}.",
        f"Method: {bound.method} [{cite(*bound.references)}].",
        *([Listed("Assumes:", bound.assumptions)] if bound.assumptions else []),
        *bound.caveats,
    ]


def _check_epsilon(epsilon: float, reason: str | None) -> None:
    _validate.between("epsilon", epsilon, 0, math.inf, "An ε is never NaN and never negative.")
    if math.isinf(epsilon) and not reason:
        raise ValueError("reason must say why epsilon is infinite, got none.")
