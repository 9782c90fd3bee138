"""Curves: never below the truth of the plain Gaussian, and refused where bounds do not mix."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as peer_pld
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    PrivacyBound,
    PrivacyCurve,
    RdpAccountant,
    SampledGaussian,
    privacy_curve,
)
from lora_privacy.errors import UnsupportedEventError
from lora_privacy.references import cite

RATES = np.array([0.0, 1e-6, 1e-3, 0.01, 0.1, 0.31, 0.5, 0.9, 1.0])


def bound(epsilon: float, delta: float, **changes: object) -> PrivacyBound:
    fields = {
        "epsilon": epsilon,
        "delta": delta,
        "adjacency": "add-remove",
        "method": "rdp",
        "assumptions": ("the noise is fresh",),
        "references": ("mironov-rdp-2017",),
    }
    return PrivacyBound(**{**fields, **changes})


def exact_gaussian(mu: float, points: int = 400) -> PrivacyCurve:
    """The privacy profile of N(0,1) against N(μ,1), from SciPy (Balle & Wang 2018)."""
    epsilons = np.linspace(0, 12 * mu, points)
    deltas = stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * stats.norm.cdf(
        -mu / 2 - epsilons / mu
    )
    return PrivacyCurve(
        tuple(
            bound(e, d) for e, d in zip(epsilons.tolist(), deltas.tolist(), strict=True) if d > 0
        )
    )


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_the_exact_profile_gives_the_exact_trade_off(mu: float) -> None:
    """Oracle: Φ(Φ⁻¹(1-α) - μ), Neyman–Pearson. 400 tangents: never above, 1e-4 below at most.

    The advantage is 2Φ(μ/2) - 1. A profile of 1.05 μ must be told from this one.
    """
    curve = exact_gaussian(mu)
    truth = stats.norm.cdf(stats.norm.ppf(1 - RATES) - mu)
    found = curve.trade_off(RATES)
    assert np.all(found <= truth + 1e-12)
    assert np.all(found >= truth - 1e-4)
    assert np.array_equal(curve.tpr_bound(RATES), 1 - found)
    assert curve.advantage() == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, rel=1e-4, abs=0)
    wrong = stats.norm.cdf(stats.norm.ppf(1 - RATES) - 1.05 * mu)
    assert not np.all(found <= wrong + 1e-12)


@given(st.floats(0, 800), st.floats(1e-300, 0.999), st.floats(0, 1))
def test_one_bound_limits_both_errors(epsilon: float, delta: float, fpr: float) -> None:
    """The region of Kairouz, Oh & Viswanath, Thm. 2.1, both lines, in exact logarithms."""
    fnr = float(PrivacyCurve((bound(epsilon, delta),)).trade_off(fpr))
    assert 0 <= fnr <= 1 - fpr + 1e-12
    slack = 1e-12
    first = 1 - delta - (math.exp(epsilon) * fpr if epsilon < 700 else (math.inf if fpr else 0))
    second = math.exp(-epsilon) * (1 - delta - fpr)
    assert fnr == pytest.approx(max(0.0, first, second), rel=1e-9, abs=slack)


def test_an_accountants_curve_holds_for_its_true_trade_off() -> None:
    """Rényi bounds are loose: below the exact trade-off everywhere, and not vacuous."""
    curve = privacy_curve(RdpAccountant().compose(GaussianEvent(1.0)))
    truth = stats.norm.cdf(stats.norm.ppf(1 - RATES) - 1)
    assert np.all(curve.trade_off(RATES) <= truth)
    assert curve.trade_off(0.01) > 0.8
    assert 2 * stats.norm.cdf(0.5) - 1 < curve.advantage() < 0.6
    epsilons = [b.epsilon for b in curve.bounds]
    deltas = [b.delta for b in curve.bounds]
    assert epsilons == sorted(epsilons)
    assert deltas == sorted(deltas, reverse=True)
    assert epsilons[0] == 0
    assert deltas[-1] == 1e-10


def test_a_curve_from_grids_lies_on_the_safe_side_of_a_peer() -> None:
    """Oracle: dp-accounting's optimistic δ, never above ours; its pessimistic one, 2 % at most.

    A curve of δ at the next higher ε of 65, in place of its own, would fall below.
    """
    accountant = PldAccountant().compose(SampledGaussian(1.0, 0.1), 10)
    curve = privacy_curve(accountant)
    assert curve.method == "pld"
    low, high = (
        peer_pld.from_gaussian_mechanism(
            1.0,
            sampling_prob=0.1,
            pessimistic_estimate=upper,
            value_discretization_interval=2e-4,
            use_connect_dots=upper,
        ).self_compose(10)
        for upper in (False, True)
    )
    for here, above in itertools.pairwise(curve.bounds[::4]):
        assert low.get_delta_for_epsilon(here.epsilon) <= here.delta
        assert here.delta <= 1.02 * high.get_delta_for_epsilon(here.epsilon)
        assert low.get_delta_for_epsilon(here.epsilon) > above.delta
    assert curve.bounds[0].epsilon == 0
    assert curve.bounds[-1] == accountant.epsilon(1e-10)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-5), (1.0, 0.05), (3.0, 0.0), (8.0, 0.3)])
def test_the_advantage_of_one_bound(epsilon: float, delta: float) -> None:
    """Where its two lines meet at equal errors: (e^ε - 1 + 2δ)/(e^ε + 1)."""
    found = PrivacyCurve((bound(epsilon, delta or 1e-300),)).advantage()
    expected = (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)
    assert expected <= found <= expected * (1 + 1e-13)


@pytest.mark.parametrize("event", [SampledGaussian(1.0, 0.1), SampledGaussian(5.0, 0.5)])
def test_a_long_curve_has_no_sag(event: SampledGaussian) -> None:
    """Down to 1e-40 no δ is more than a quarter above its certified lower end."""
    accountant = PldAccountant().compose(event, 10)
    for found in privacy_curve(accountant, least_delta=1e-40).bounds[1:-1:4]:
        low, _ = accountant.delta_interval(found.epsilon)
        assert low <= found.delta <= 1.25 * low


def test_a_history_without_cost_and_one_without_bound() -> None:
    """Nothing released: blind guessing. Nothing proved: no curve, with the reason."""
    curve = privacy_curve(RdpAccountant())
    assert curve.trade_off(0.3) == pytest.approx(0.7, abs=1e-9)
    assert curve.advantage() < 1e-9
    with pytest.raises(UnsupportedEventError, match=r"no finite ε is proved up to δ = 0\.1"):
        privacy_curve(RdpAccountant().compose(GaussianEvent(1e-160)))
    vacuous = bound(math.inf, 0.5, reason="nothing is known.")
    assert PrivacyCurve((vacuous,)).trade_off(0.0) == 0
    assert PrivacyCurve((vacuous,)).advantage() == 1


@pytest.mark.parametrize("adjacency", ["add-remove", "replace"])
def test_a_curve_says_whose_neighbours_it_is_about(adjacency: str) -> None:
    """Of one bound too."""
    assert PrivacyCurve((bound(1.0, 1e-5, adjacency=adjacency),)).adjacency == adjacency


def test_bounds_of_different_neighbours_are_not_mixed() -> None:
    """Nor none at all. Different methods are: the better one speaks, and both are named."""
    one = bound(1.0, 1e-5)
    for other in (
        dataclasses.replace(one, adjacency="replace"),
        dataclasses.replace(one, unit="one author"),
    ):
        with pytest.raises(ValueError, match="all of one adjacency"):
            PrivacyCurve((one, other))
    mixed = PrivacyCurve((one, dataclasses.replace(one, epsilon=0.5, method="pld")))
    assert mixed.method == "rdp or pld"
    assert mixed.trade_off(0.1) == pytest.approx(1 - 1e-5 - 0.1 * math.exp(0.5), rel=1e-9)
    with pytest.raises(ValueError, match="at least one"):
        PrivacyCurve(())


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_rates_out_of_range_are_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="fpr must lie in"):
        PrivacyCurve((bound(1.0, 1e-5),)).trade_off([0.5, fpr])


def test_json_holds_what_is_needed_to_quote_it() -> None:
    event = SampledGaussian(1.0, 0.1)
    stored = privacy_curve(RdpAccountant().compose(event, 10), points=5).to_dict()
    stored = json.loads(json.dumps(stored, allow_nan=False))
    assert len(stored["epsilon"]) == len(stored["delta"]) == 5
    assert stored["adjacency"] == "add-remove"
    assert any("each release has its own Poisson sample" in text for text in stored["assumptions"])
    assert cite("kairouz-composition-2015") in stored["citations"]
    assert [row["false_positive_rate"] for row in stored["true_positive_rate_at_most"]] == [
        0.001,
        0.01,
        0.1,
    ]
