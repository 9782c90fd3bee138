"""What an attack may claim: a lower bound on ε, or a rate with its interval. Never a guarantee."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, Self, cast, get_args

from lora_privacy import _notebook, _validate
from lora_privacy._digits import round_down, round_up
from lora_privacy._notebook import Listed, Part
from lora_privacy._plain import plain_fields, unbox_floats
from lora_privacy.references import check_keys, cite

__all__ = ["CAVEAT", "NOT_STATED", "Adjacency", "LeakageEstimate", "RateEstimate"]

Adjacency = Literal["add-remove", "replace"]

ADJACENCIES: tuple[str, ...] = get_args(Adjacency)

NOT_STATED = "not stated"
"""Threat model of an estimate whose caller named none; it is printed."""

CAVEAT = "A small value says that this attack found little, not that there is little to find."
"""Printed with every estimate."""

_HEADING = "Evidence, not a guarantee"

_LOWER_BOUND, _RATE = "evidence, a lower bound", "evidence, a rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageEstimate:
    """Evidence that a mechanism leaks: ε is at least this, at a stated confidence.

    If the assumptions hold, the probability that ``epsilon`` exceeds the smallest ε for which
    the mechanism is (ε, δ)-differentially private is at most ``significance``. No method turns
    it into an upper bound.

    Attributes:
        epsilon: Lower bound, in nats, finite and >= 0; 0 says that nothing was shown.
        delta: The δ it holds at, in [0, 1).
        significance: Probability of a false claim, in (0, 1); the confidence is one minus it.
        canaries: Examples (or runs) that the evidence rests on, members and non-members.
        ceiling: Largest ε that a flawless attack could have shown with as many canaries at this
            δ and significance, in nats, >= ``epsilon``.
        method: How it was computed.
        observed: What the attack did, in words and counts.
        assumptions: What must be true for the claim to hold.
        references: Keys into ``lora_privacy.references``.
        threat_model: What the attacker sees and chooses, in the caller's words.
        adjacency: What membership means: ``"add-remove"`` if a non-member is absent,
            ``"replace"`` if another record stands in its place.
        attempts: Attacks, thresholds or numbers of guesses among which the best was taken; the
            significance pays for all of them.
        mu: Lower bound on μ where the bound went through Gaussian differential privacy.

    Raises:
        ValueError: A number is NaN or out of range, or an assumption is missing.
    """

    epsilon: float
    delta: float
    significance: float
    canaries: int
    ceiling: float
    method: str
    observed: str
    assumptions: tuple[str, ...]
    references: tuple[str, ...]
    threat_model: str = NOT_STATED
    adjacency: Adjacency = "add-remove"
    attempts: int = 1
    mu: float | None = None

    def __post_init__(self) -> None:
        hint = "No finite number of canaries shows an infinite ε."
        _validate.half_open("epsilon", self.epsilon, 0, math.inf, hint)
        if not self.ceiling >= self.epsilon:
            raise ValueError(
                f"ceiling must be at least epsilon = {self.epsilon!r}, got {self.ceiling!r}."
            )
        _validate.half_open("delta", self.delta, 0, 1)
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        _validate.integer("attempts", self.attempts, 1)
        if self.mu is not None:
            _validate.between("mu", self.mu, 0, math.inf)
        _check_common(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {"kind": _LOWER_BOUND, **plain_fields(self), "caveat": CAVEAT}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave, checked again; ValueError for anything else."""
        return cls(**_restored(cls, data, _LOWER_BOUND))

    def __str__(self) -> str:
        """A paragraph to paste; ε is rounded down, δ and the significance are printed in full."""
        return _notebook.paragraph(self._parts())

    def _repr_html_(self) -> str:
        return _notebook.box(_HEADING, self._parts())

    def _parts(self) -> list[Part]:
        mu = "" if self.mu is None else f" (μ ≥ {round_down(self.mu)})"
        best = "" if self.attempts == 1 else f", the best of {self.attempts}, all paid for"
        return [
            f"ε ≥ {round_down(self.epsilon)} nats at δ = {self.delta!r}{mu}, at confidence "
            f"{confidence(self.significance)}.",
            f"Evidence, not a guarantee: {self.observed}{best}; {self.canaries} canaries, "
            f"with which no attack shows more than {round_up(self.ceiling)}.",
            f"Threat model: {self.threat_model}. Neighbours: {self.adjacency} of one canary.",
            f"Method: {self.method} [{cite(*self.references)}].",
            Listed("Assumes:", self.assumptions),
            CAVEAT,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateEstimate:
    """A success rate of an attack, with a confidence interval that holds at every sample size.

    Attributes:
        quantity: What it is, such as ``"AUC"`` or ``"TPR at FPR 0.01"``.
        value: Rate on the scores at hand, in [0, 1].
        low: Lower confidence limit, in [0, 1].
        high: Upper confidence limit. The population's rate lies in [``low``, ``high``] but with
            probability ``significance``; ``value`` need not.
        significance: Probability that the interval misses, both sides together, in (0, 1).
        canaries: Scores, of members and non-members.
        method: How the interval was computed.
        assumptions: What must be true for it to hold.
        references: Keys into ``lora_privacy.references``.
        threat_model: What the attacker sees and chooses, in the caller's words.

    Raises:
        ValueError: A number is NaN or out of range, or an assumption is missing.
    """

    quantity: str
    value: float
    low: float
    high: float
    significance: float
    canaries: int
    method: str
    assumptions: tuple[str, ...]
    references: tuple[str, ...]
    threat_model: str = NOT_STATED

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            _validate.between(name, getattr(self, name), 0, 1)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low!r} and {self.high!r}.")
        _check_common(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {"kind": _RATE, **plain_fields(self), "caveat": CAVEAT}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave, checked again; ValueError for anything else."""
        return cls(**_restored(cls, data, _RATE))

    def __str__(self) -> str:
        """A paragraph to paste; the interval is rounded outwards."""
        return _notebook.paragraph(self._parts())

    def _repr_html_(self) -> str:
        return _notebook.box(_HEADING, self._parts())

    def _parts(self) -> list[Part]:
        return [
            f"{self.quantity} = {self.value:.4g}, in [{round_down(self.low)}, "
            f"{round_up(self.high)}] at confidence {confidence(self.significance)}, "
            f"on {self.canaries} canaries.",
            f"Threat model: {self.threat_model}.",
            f"Method: {self.method} [{cite(*self.references)}].",
            Listed("Assumes:", self.assumptions),
            CAVEAT,
        ]


def confidence(significance: float) -> str:
    """One minus the significance, exact in decimal: 1 - 1e-12 must not print as 1.

    >>> confidence(0.05), confidence(1e-12)
    ('0.95', '0.999999999999')
    """
    return f"{1 - Decimal(repr(significance)):f}"


def _check_common(result: LeakageEstimate | RateEstimate) -> None:
    unbox_floats(result)
    _validate.inside("significance", result.significance, 0, 1)
    _validate.integer("canaries", result.canaries, 1)
    if not result.assumptions:
        raise ValueError("assumptions must name at least one: no attack is evidence without any.")
    if not result.threat_model.strip():
        raise ValueError(
            "threat_model must say what the attacker sees and chooses, got an empty text."
        )
    check_keys(*result.references)


def _restored(
    kind: type[LeakageEstimate | RateEstimate], data: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Fields out of ``to_dict``: all of them, nothing else, and of this kind of evidence."""
    names = {field.name for field in fields(kind)}
    if data.get("kind") != name or set(data) != names | {"kind", "caveat"}:
        raise ValueError(
            f"data must be what {kind.__name__}.to_dict gave: kind {name!r} with the fields "
            f"{', '.join(sorted(names))} and caveat; got kind {data.get('kind')!r} with "
            f"{', '.join(sorted(map(str, data)))}."
        )
    return {key: _from_json(data[key]) for key in names}


def _from_json(value: object) -> object:
    if isinstance(value, list):
        return tuple(cast("list[str]", value))
    return math.inf if value == "inf" else value
