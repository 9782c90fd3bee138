"""The two types that carry an ε: what they refuse, what they print, what JSON sees."""

import dataclasses
import json
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_privacy.dp import ImpliedPrivacy, PrivacyBound
from lora_privacy.dp.result import round_up

BOUND = PrivacyBound(
    epsilon=1.23456789,
    delta=1e-5,
    adjacency="add-remove",
    method="rdp",
    assumptions=("the noise is fresh",),
    references=("mironov-rdp-2017",),
)
READING = ImpliedPrivacy(
    epsilon=512.3456789,
    delta=1e-5,
    noise_multiplier=0.0722,
    sample_rate=0.01,
    steps=300,
    distortion=0.5,
    failure_probability=1.0,
    failure_probability_per_step=0.3,
    aggregation="independent",
    layers=((768, 8),),
    failing_assumptions=("the noise is not Gaussian",),
    references=("p1-implicit-2024",),
)


@pytest.mark.parametrize("result", [BOUND, READING])
@pytest.mark.parametrize("epsilon", [math.nan, -1e-9, -math.inf])
def test_epsilon_is_neither_nan_nor_negative(
    result: PrivacyBound | ImpliedPrivacy, epsilon: float
) -> None:
    """For both types."""
    with pytest.raises(ValueError, match="epsilon must lie in"):
        dataclasses.replace(result, epsilon=epsilon)


@pytest.mark.parametrize("result", [BOUND, READING])
@pytest.mark.parametrize("delta", [math.nan, 0.0, 1.0, -0.1, 1.5])
def test_delta_lies_between_zero_and_one(
    result: PrivacyBound | ImpliedPrivacy, delta: float
) -> None:
    """For both types."""
    with pytest.raises(ValueError, match="delta must lie in"):
        dataclasses.replace(result, delta=delta)


@pytest.mark.parametrize("result", [BOUND, READING])
def test_an_infinite_epsilon_needs_a_reason(result: PrivacyBound | ImpliedPrivacy) -> None:
    """And JSON, which has no infinity, sees the string that float() reads back."""
    for reason in (None, ""):
        with pytest.raises(ValueError, match="reason must say why"):
            dataclasses.replace(result, epsilon=math.inf, reason=reason)
    with_reason = dataclasses.replace(result, epsilon=math.inf, reason="nothing is known.")
    stored = json.loads(json.dumps(with_reason.to_dict(), allow_nan=False))
    assert stored["epsilon"] == "inf"
    assert math.isinf(float(stored["epsilon"]))
    assert "nothing is known" in str(with_reason)


def test_a_vacuous_delta_needs_a_reason() -> None:
    """δ = 1 promises nothing and says so."""
    vacuous = dataclasses.replace(BOUND, delta=1.0, reason="no δ below 1 is proved.")
    assert str(vacuous).startswith("No guarantee at δ = 1.0: no δ below 1 is proved.")


@pytest.mark.parametrize("result", [BOUND, READING])
def test_results_are_frozen_and_name_their_fields(result: PrivacyBound | ImpliedPrivacy) -> None:
    """Nobody edits a number after it was proved, or passes it by position."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.epsilon = 0.1
    assert not hasattr(result, "__dict__")
    with pytest.raises(TypeError):
        type(result)(1.0, 1e-5)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["epsilon"] == result.epsilon


def test_unknown_references_and_adjacencies_are_refused() -> None:
    """A key with a typo would print a bound without its source."""
    with pytest.raises(ValueError, match="no reference of this library"):
        dataclasses.replace(BOUND, references=("mironov-rpd-2017",))
    with pytest.raises(ValueError, match="adjacency must be one of"):
        dataclasses.replace(BOUND, adjacency="swap")


def test_a_bound_prints_everything_needed_to_quote_it() -> None:
    """ε rounded up, δ in full, neighbours, unit, method with source, assumptions, caveats."""
    text = str(BOUND)
    assert text.startswith("(1.23457, 1e-05)-differential privacy")
    for part in (
        "add-remove of one training example",
        "rdp [Mironov, Ilya (2017)",
        "Assumes: the noise is fresh.",
        "Hyper-parameter search, choice of the best checkpoint and early stopping are not",
        "floating point",
    ):
        assert part in text
    assert BOUND.to_dict()["caveats"] == list(BOUND.caveats)
    assert BOUND.to_dict()["kind"] == "guarantee"


def test_a_reading_cannot_be_mistaken_for_a_bound() -> None:
    """Not by its type, its text, its JSON, nor for want of a failing assumption."""
    assert not isinstance(READING, PrivacyBound)
    assert str(READING).startswith("Not a guarantee.")
    assert "These assumptions fail: the noise is not Gaussian." in str(READING)
    assert "512.346 nats" in str(READING)
    assert READING.to_dict()["kind"] == "heuristic reading, not a guarantee"
    assert "adjacency" not in READING.to_dict()
    with pytest.raises(ValueError, match="must name at least one"):
        dataclasses.replace(READING, failing_assumptions=())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", math.nan),
        ("noise_multiplier", -0.1),
        ("failure_probability", 1.1),
        ("sample_rate", math.nan),
        ("distortion", -1.0),
        ("aggregation", "mean"),
    ],
)
def test_a_reading_refuses_bad_numbers(field: str, value: float | str) -> None:
    """NaN never passes."""
    with pytest.raises(ValueError, match=f"{field} must"):
        dataclasses.replace(READING, **{field: value})


@given(st.floats(1e-300, 1e300))
def test_printed_numbers_are_never_below(value: float) -> None:
    """Six digits, at most one unit of the last above the float itself, exactly compared."""
    printed = Decimal(round_up(value))
    assert Decimal(value) <= printed
    assert printed <= Decimal(value) * (1 + Decimal("1.0001e-5"))
