"""The two types of evidence: what they refuse, what they print, what JSON sees."""

import dataclasses
import json
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_privacy._digits import round_down, round_up
from lora_privacy.audit import LeakageEstimate, RateEstimate
from lora_privacy.audit.result import confidence

ESTIMATE = LeakageEstimate(
    epsilon=1.23456789,
    delta=1e-5,
    significance=0.05,
    canaries=1000,
    ceiling=3.2,
    method="one-run audit",
    observed="75 of 100 guesses right",
    assumptions=("fair coins",),
    references=("steinke-one-run-2023",),
    threat_model="white box, every step",
)
RATE = RateEstimate(
    quantity="AUC",
    value=0.75,
    low=0.70000009,
    high=0.79999999,
    significance=0.05,
    canaries=400,
    method="Mann–Whitney statistic",
    assumptions=("independent scores",),
    references=("hoeffding-1963",),
    threat_model="black box",
)


@pytest.mark.parametrize("epsilon", [math.nan, -1e-9, math.inf])
def test_epsilon_is_finite_and_not_negative(epsilon: float) -> None:
    """An infinite lower bound would need infinitely many canaries."""
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, inf\)"):
        dataclasses.replace(ESTIMATE, epsilon=epsilon)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("delta", 1.0, r"delta must lie in \[0, 1\)"),
        ("delta", math.nan, r"delta must lie in \[0, 1\)"),
        ("significance", 0.0, "significance must lie in"),
        ("significance", math.nan, "significance must lie in"),
        ("canaries", 0, "canaries must be at least 1"),
        ("ceiling", 1.2, "ceiling must be at least epsilon"),
        ("ceiling", math.nan, "ceiling must be at least epsilon"),
        ("assumptions", (), "assumptions must name at least one"),
        ("references", ("stienke",), "no reference of this library"),
        ("threat_model", " ", "threat_model must say"),
        ("adjacency", "swap", "adjacency must be one of"),
        ("attempts", 0, "attempts must be at least 1"),
        ("mu", math.nan, "mu must lie in"),
    ],
)
def test_an_estimate_refuses(field: str, value: object, message: str) -> None:
    """What would make it false, or unquotable."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ESTIMATE, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("value", math.nan, "value must lie in"),
        ("low", -0.1, "low must lie in"),
        ("high", 1.1, "high must lie in"),
        ("low", 0.9, "low must not exceed high"),
        ("significance", 1.0, "significance must lie in"),
    ],
)
def test_a_rate_refuses(field: str, value: object, message: str) -> None:
    """The same for a rate."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RATE, **{field: value})


@pytest.mark.parametrize("result", [ESTIMATE, RATE])
def test_results_are_frozen_and_json_safe(result: LeakageEstimate | RateEstimate) -> None:
    """Nobody edits a number after it was measured, or passes it by position."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.significance = 0.5
    assert not hasattr(result, "__dict__")
    with pytest.raises(TypeError):
        type(result)(1.0, 1e-5)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["kind"].startswith("evidence")
    assert stored["threat_model"] == result.threat_model
    assert set(stored) == {f.name for f in dataclasses.fields(result)} | {"kind", "caveat"}


def test_an_infinite_ceiling_survives_json() -> None:
    """As the string that float() reads back."""
    stored = dataclasses.replace(ESTIMATE, ceiling=math.inf).to_dict()
    assert math.isinf(float(json.loads(json.dumps(stored, allow_nan=False))["ceiling"]))


def test_an_estimate_prints_everything_needed_to_quote_it() -> None:
    """ε rounded down, δ in full, confidence, canaries, threat model, source, assumptions."""
    text = str(ESTIMATE)
    assert text.startswith("ε ≥ 1.23456 nats at δ = 1e-05, at confidence 0.95.")
    for part in (
        "Evidence, not a guarantee: 75 of 100 guesses right; 1000 canaries",
        "no attack shows more than 3.2",
        "Threat model: white box, every step. Neighbours: add-remove of one canary.",
        "one-run audit [Steinke, Thomas",
        "Assumes: fair coins.",
        "not that there is little to find",
    ):
        assert part in text
    assert "the best of 4, all paid for" in str(dataclasses.replace(ESTIMATE, attempts=4))
    assert "(μ ≥ 0.5)" in str(dataclasses.replace(ESTIMATE, mu=0.5))
    unstated = dataclasses.replace(ESTIMATE, threat_model="not stated")
    assert "Threat model: not stated." in str(unstated)


def test_a_rate_prints_its_interval_rounded_outwards() -> None:
    """Never narrower than it is."""
    assert str(RATE).startswith("AUC = 0.75, in [0.7, 0.8] at confidence 0.95, on 400 canaries.")


@given(st.floats(min_value=0, max_value=1e6, allow_nan=False))
def test_printed_numbers_are_rounded_to_the_safe_side(value: float) -> None:
    """In exact decimal arithmetic, and by no more than 1e-5."""
    low, high = Decimal(round_down(value)), Decimal(round_up(value))
    assert low <= Decimal(value) <= high
    assert high - low <= Decimal(value) * Decimal("1.1e-5")


def test_a_confidence_near_one_does_not_print_as_one() -> None:
    """Exact in decimal."""
    assert confidence(1e-15) == "0.999999999999999"


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_numpy_print_as_numbers(kind: type) -> None:
    """With numpy's repr, δ would print with its type and the confidence not at all."""
    estimate = dataclasses.replace(ESTIMATE, delta=kind(2**-10), significance=kind(2**-4))
    assert "δ = 0.0009765625," in str(estimate)
    assert "confidence 0.9375" in str(estimate)
    assert json.loads(json.dumps(estimate.to_dict()))["delta"] == 2**-10
