"""Rényi accounting: oracles are mpmath on the definitions, Opacus and dp-accounting."""

import itertools
import math
import re
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from accountant_contract import AccountantContract
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant as peer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant as OpacusAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from rdp_oracle import divergence, excess_backward, excess_forward, gaussian_delta
from scipy import optimize

from lora_privacy.dp import (
    GaussianEvent,
    RdpAccountant,
    SampledGaussian,
    _conversion,
    _moments,
    event_rdp,
    rdp,
    sampled_gaussian_bounds,
    sampled_gaussian_rdp,
)
from lora_privacy.errors import UnsupportedEventError

OPACUS_ORDERS = tuple(float(a) for a in OpacusAccountant.DEFAULT_ALPHAS)
# (z, p, α): whole and fractional orders, both sides of every switch in the code.
DEFINITION_CASES = [
    (0.025, 1e-3, 1.001),
    (0.3, 1e-3, 1.01),
    (0.3, 0.5, 3.7),
    (0.5, 1e-7, 1.5),
    (0.7, 0.01, 2.0),
    (1.0, 1e-7, 1.001),
    (1.0, 0.01, 7.3),
    (1.0, 0.9, 12.0),
    (1.0, 1e-4, 33.5),
    (2.0, 0.3, 1.7),
    (3.2, 0.02, 64.5),
    (10.0, 1e-5, 5.5),
    (10.0, 0.5, 150.25),
    (100.0, 1e-2, 2.5),
    (1000.0, 1e-3, 20.5),
]


class TestRdp(AccountantContract):
    accountant = RdpAccountant()


class TestRdpReplace(AccountantContract):
    accountant = RdpAccountant("replace")


class TestRdpFixedOrders(AccountantContract):
    accountant = RdpAccountant(orders=OPACUS_ORDERS)


@pytest.mark.parametrize(("z", "p", "alpha"), DEFINITION_CASES)
def test_divergence_matches_its_definition(z: float, p: float, alpha: float) -> None:
    """Oracle: 30-digit quadrature of the definition; never below it, and 1e-10 above at most.

    The other direction of the adjacency never exceeds what is returned.
    """
    true = divergence(excess_forward(z, p, alpha), alpha)
    found = sampled_gaussian_rdp(z, p, [alpha])[0]
    assert found >= true
    # Rounding is bounded relative to p, aliasing to 1, not to the much smaller A - 1.
    assert found <= true * (1 + mp.mpf("1e-10")) + (1e-12 * p + 3e-20) / (alpha - 1)
    assert divergence(excess_backward(z, p, alpha), alpha) <= found


def test_the_definition_oracle_has_converged() -> None:
    """At 45 digits it gives what it gave at 30; 1e-20 relative."""
    for case in [(1.0, 0.01, 7.3), (10.0, 1e-5, 5.5)]:
        assert mp.almosteq(
            excess_forward(*case), excess_forward(*case, digits=45), mp.mpf("1e-20")
        )
        assert mp.almosteq(
            excess_backward(*case), excess_backward(*case, digits=45), mp.mpf("1e-20")
        )


@pytest.mark.parametrize("p", [1e-7, 1e-3, 0.1, 0.999])
@pytest.mark.parametrize("z", [0.05, 0.5, 1.0, 20.0, 1e3])
def test_order_two_in_closed_form(z: float, p: float) -> None:
    """Oracle: A(2) = 1 + p² (e^{1/z²} - 1), at 40 digits; 1e-11 relative, never below."""
    with mp.workdps(40):
        true = mp.log1p(mp.mpf(p) ** 2 * mp.expm1(1 / mp.mpf(z) ** 2))
    found = sampled_gaussian_rdp(z, p, 2.0)
    assert true <= found <= true * (1 + mp.mpf("1e-11"))


@pytest.mark.parametrize("z", [0.1, 0.5, 1.0, 4.0, 300.0])
@pytest.mark.parametrize("p", [1e-5, 0.02, 0.6])
def test_quadrature_agrees_with_the_sum_at_whole_orders(z: float, p: float) -> None:
    """The two formulas share no code: 1e-9 relative, beside the quadrature's rounding."""
    orders = np.array([[2.0, 3.0, 5.0, 17.0, 64.0, 333.0]])
    summed = _moments._sum(np.full(6, z), p, orders[0])
    integrated = _moments._integrate(np.array([z]), p, orders)[0]
    assert np.all(np.abs(integrated - summed) <= 1e-9 * summed + 1e-14 * p * orders[0])


@pytest.mark.parametrize("z", [0.4, 0.8, 1.3, 5.0, 25.0])
@pytest.mark.parametrize("p", [1e-4, 0.01, 0.3, 1.0])
def test_divergence_equals_opacus(z: float, p: float) -> None:
    """Oracle: Opacus on its own orders; 1e-9 relative, or 2e-12 absolute (its rounding)."""
    expected = compute_rdp(q=p, noise_multiplier=z, steps=1, orders=OPACUS_ORDERS)
    found = event_rdp(SampledGaussian(z, p), OPACUS_ORDERS)
    known = np.isfinite(expected)  # its series fails at some orders
    assert known.sum() > 100
    assert found[known] == pytest.approx(expected[known], rel=1e-9, abs=2e-12)


@pytest.mark.parametrize(
    ("z", "p", "steps", "delta"),
    [
        (0.6, 0.01, 1000, 1e-5),
        (1.0, 0.004, 10_000, 1e-6),
        (1.1, 0.05, 200, 1e-8),
        (2.5, 0.2, 500, 1e-5),
        (4.0, 1.0, 30, 1e-3),
        (8.0, 1e-3, 100_000, 1e-7),
    ],
)
def test_epsilon_equals_opacus_and_dp_accounting(
    z: float, p: float, steps: int, delta: float
) -> None:
    """On the same orders: 1e-9 relative, and never below by more than that."""
    opacus = OpacusAccountant()
    opacus.history = [(z, p, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = opacus.get_epsilon(delta)
    accountant = RdpAccountant(orders=OPACUS_ORDERS).compose(SampledGaussian(z, p), steps)
    found = accountant.epsilon(delta).epsilon
    assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert RdpAccountant().compose(SampledGaussian(z, p), steps).epsilon(delta).epsilon <= (
        found * (1 + 1e-5)
    )
    # dp-accounting drops the signs of its series at fractional orders, which is larger there.
    whole = tuple(float(order) for order in range(2, 257))
    accountant = RdpAccountant(orders=whole).compose(SampledGaussian(z, p), steps)
    costs = steps * peer._compute_rdp_poisson_subsampled_gaussian(p, z, whole)
    theirs, _ = peer.compute_epsilon(whole, costs, delta)
    assert accountant.epsilon(delta).epsilon == pytest.approx(theirs, rel=1e-9, abs=0)
    back, _ = peer.compute_delta(whole, costs, theirs)
    assert accountant.delta(theirs).delta == pytest.approx(back, rel=1e-8, abs=0)


def test_mixed_ledger_equals_opacus() -> None:
    """Three different events at once; 1e-9 relative."""
    opacus = OpacusAccountant()
    opacus.history = [(1.0, 0.01, 300), (2.0, 0.05, 40), (6.0, 1.0, 2)]
    accountant = RdpAccountant(orders=OPACUS_ORDERS)
    accountant = accountant.compose(SampledGaussian(1.0, 0.01), 300)
    accountant = accountant.compose(SampledGaussian(2.0, 0.05), 40).compose(GaussianEvent(6.0), 2)
    assert accountant.epsilon(1e-6).epsilon == pytest.approx(
        opacus.get_epsilon(1e-6), rel=1e-9, abs=0
    )


@given(
    z=st.floats(0.02, 200),
    count=st.integers(1, 10_000),
    log_delta=st.floats(-34, -3),
    replace=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_plain_gaussian_is_sound(z: float, count: int, log_delta: float, replace: bool) -> None:
    """Oracle: exact δ of the composed Gaussian at 60 digits; at the returned ε it is at most δ.

    The RDP bound is loose, by less than a factor of 2 of ε where δ is at most half of δ(0), and
    that is asserted too, so a bound that is merely huge fails; next to δ(0), where the true ε
    vanishes, it loses any factor. The same for ``delta``.
    """
    accountant = RdpAccountant("replace" if replace else "add-remove")
    accountant = accountant.compose(GaussianEvent(z), count)
    mu = (2 if replace else 1) * math.sqrt(count) / z
    delta = math.exp(log_delta)
    epsilon = accountant.epsilon(delta).epsilon
    assert gaussian_delta(mu, epsilon) <= delta
    if epsilon > 0.01 and gaussian_delta(mu, 0.0) > 2 * delta:
        assert gaussian_delta(mu, epsilon / 2 - 0.01) > delta
    assert gaussian_delta(mu, epsilon) <= accountant.delta(epsilon).delta <= delta * (1 + 1e-6)


@pytest.mark.parametrize(
    ("z", "p", "steps", "delta"),
    [
        (0.7, 0.01, 200, 1e-5),
        (1.0, 0.02, 500, 1e-6),
        (1.5, 0.2, 50, 1e-4),
        (3.0, 0.1, 1000, 1e-5),
    ],
)
def test_sampled_gaussian_is_sound(z: float, p: float, steps: int, delta: float) -> None:
    """Oracle: the optimistic (lower) ε of dp-accounting's loss distribution; not 1.5× above."""
    lower, upper = (
        pld.from_gaussian_mechanism(
            z,
            sampling_prob=p,
            value_discretization_interval=1e-3,
            pessimistic_estimate=pessimistic,
        )
        .self_compose(steps)
        .get_epsilon_for_delta(delta)
        for pessimistic in (False, True)
    )
    found = RdpAccountant().compose(SampledGaussian(z, p), steps).epsilon(delta).epsilon
    assert lower <= found <= 1.5 * upper


@given(
    z=st.floats(0.3, 30),
    p=st.floats(1e-5, 0.9),
    steps=st.integers(1, 5000),
    log_delta=st.floats(-30, -4),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_epsilon_is_monotone(z: float, p: float, steps: int, log_delta: float) -> None:
    """Less noise, more sampling, more steps, smaller δ: never a smaller ε (1e-5, the lattice)."""

    def epsilon(z: float, p: float, steps: int, log_delta: float) -> float:
        accountant = RdpAccountant().compose(SampledGaussian(z, p), steps)
        return accountant.epsilon(math.exp(log_delta)).epsilon

    base = epsilon(z, p, steps, log_delta) * (1 - 2e-5)
    assert epsilon(z / 1.2, p, steps, log_delta) >= base
    assert epsilon(z, min(1.0, p * 1.1), steps, log_delta) >= base
    assert epsilon(z, p, steps + 1 + steps // 10, log_delta) >= base
    assert epsilon(z, p, steps, log_delta - 1) >= base


@given(st.permutations([(0.8, 0.01, 50), (3.0, 0.2, 4), (1.5, 1.0, 1), (0.8, 0.01, 7)]))
@settings(max_examples=24, deadline=None, derandomize=True)
def test_composition_commutes(ledger: list[tuple[float, float, int]]) -> None:
    """Any order of the same events, equal ones merged: 1e-12 relative."""
    accountant = RdpAccountant()
    for z, p, count in ledger:
        accountant = accountant.compose(SampledGaussian(z, p), count)
    expected = (
        RdpAccountant()
        .compose(SampledGaussian(0.8, 0.01), 57)
        .compose(SampledGaussian(1.5, 1.0))
        .compose(SampledGaussian(3.0, 0.2), 4)
    )
    assert accountant.epsilon(1e-6).epsilon == pytest.approx(
        expected.epsilon(1e-6).epsilon, rel=1e-12, abs=0
    )


@pytest.mark.slow
def test_extremes_stay_finite() -> None:
    """No overflow, no NaN, no warning, and never below 10⁶ times less; all in seconds."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for z, p, steps, delta in itertools.product(
            (1e-2, 0.3, 40.0, 1e3), (1e-7, 0.01, 1.0), (1, 10**6), (1e-2, 1e-15)
        ):
            accountant = RdpAccountant().compose(SampledGaussian(z, p), steps)
            bound = accountant.epsilon(delta)
            assert 0 <= bound.epsilon < math.inf
            assert 0 < accountant.delta(2.0).delta <= 1
            plain = RdpAccountant().compose(GaussianEvent(z), steps).epsilon(delta)
            assert bound.epsilon <= plain.epsilon * (1 + 1e-4)
    assert time.process_time() - started < 60


@pytest.mark.parametrize("z", [1e-200, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("p", [1e-7, 1.0])
def test_beyond_double_precision(z: float, p: float) -> None:
    """Where z² leaves double precision: infinite with a reason, or a tiny positive number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accountant = RdpAccountant().compose(SampledGaussian(z, p), 3)
        bound = accountant.epsilon(1e-5)
        found = event_rdp(SampledGaussian(z, p), [1.5, 20.0])
        vacuous = accountant.delta(1.0)
    assert np.all(found > 0)
    if z < 1:
        assert math.isinf(bound.epsilon)
        assert "beyond double precision" in str(bound)
        assert vacuous.delta == 1
        assert "prove no δ below 1" in str(vacuous)
    else:
        assert bound.epsilon < 1e-3
        assert bound.reason is None


@pytest.mark.parametrize(
    ("z", "steps", "loss"),
    [(1e3, 1, 1.2), (0.02, 10, 1.02), (1.0, 1, 1.0)],
    ids=["high", "low", "middle"],
)
def test_default_orders_have_no_edge(z: float, steps: int, loss: float) -> None:
    """Oracle: minimum over a dense scan of α; Opacus' orders are too few at both ends."""
    delta = 1e-9
    cost = steps / (2 * z * z)
    spread = np.exp(np.linspace(math.log(1e-7), math.log(1e9), 400_001))
    order = 1 + spread
    scan = cost * order + np.log(spread / order) - (math.log(delta) + np.log(order)) / spread
    found = RdpAccountant().compose(GaussianEvent(z), steps).epsilon(delta).epsilon
    assert found == pytest.approx(float(max(scan.min(), 0)), rel=2e-5, abs=0)
    fixed = RdpAccountant(orders=OPACUS_ORDERS).compose(GaussianEvent(z), steps)
    assert fixed.epsilon(delta).epsilon > loss * found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    log_rho=st.floats(-7, 4),
    delta=st.one_of(st.floats(0.01, 0.99), st.floats(-12, -2).map(lambda x: 10.0**x)),
)
@example(log_rho=math.log10(10 * 4 / (2 * 300**2)), delta=0.01)
@example(log_rho=math.log10(0.5), delta=0.55878)
def test_default_orders_lose_less_than_proved(log_rho: float, delta: float) -> None:
    """docs/theory/rdp.md: at most 6.57e-6 (2ρλ + 1/(λ+1)), and less than 1e-5 (1 + ε).

    Oracle: the conversion at its stationary point, where (log(1/δ) - log(1+λ))/λ = ρλ, by a
    root finder. A loss below 1e-9 of 1 + ε is rounding.
    """
    rho = 10.0**log_rho

    def slope(u: float) -> float:
        x = math.exp(u)
        return rho * x * x + math.log1p(x) + math.log(delta)

    x = math.exp(float(optimize.brentq(slope, -25, 35, xtol=1e-13)))
    best = rho * (x + 1) - math.log1p(1 / x) - (math.log(delta) + math.log1p(x)) / x
    event = GaussianEvent(1 / math.sqrt(2 * rho))
    loss = RdpAccountant().compose(event).epsilon(delta).epsilon - max(0.0, best)
    rounding = 1e-9 * (1 + max(0.0, best))
    assert -rounding < loss < 6.57e-6 * (2 * rho * x + 1 / (x + 1)) + rounding
    assert loss < 1e-5 * (1 + max(0.0, best))


@pytest.mark.slow
def test_comparison_with_loss_distributions_on_the_page() -> None:
    """The table of docs/theory/rdp.md. Oracle: dp-accounting; four digits, ratios to two."""
    page = (Path(__file__).parents[2] / "docs" / "theory" / "rdp.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+ \|.+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        z, p, steps, delta, renyi, tight, ratio = map(float, row.split(" | "))
        ours = RdpAccountant().compose(SampledGaussian(z, p), int(steps)).epsilon(delta).epsilon
        assert renyi == pytest.approx(ours, rel=6e-4, abs=0)
        step = pld.from_gaussian_mechanism(
            z,
            sampling_prob=p,
            value_discretization_interval=1e-3 if z < 0.7 or p == 1 else 1e-4,
        )
        theirs = step.self_compose(int(steps)).get_epsilon_for_delta(delta)
        assert tight == pytest.approx(theirs, rel=6e-4, abs=0)
        assert ratio == pytest.approx(ours / theirs, rel=0, abs=0.006)


def test_given_orders_are_used_as_given() -> None:
    """At a single order the conversion is Prop. 12 itself; at 30 digits, 1e-12 relative."""
    accountant = RdpAccountant(orders=(9.5,)).compose(GaussianEvent(2.0))
    with mp.workdps(30):
        a, delta = mp.mpf("9.5"), mp.mpf(1e-5)
        expected = a / 8 + mp.log((a - 1) / a) - (mp.log(delta) + mp.log(a)) / (a - 1)
    found = accountant.epsilon(1e-5).epsilon
    assert expected <= found <= expected * (1 + mp.mpf("1e-12"))
    shuffled = RdpAccountant(orders=(12.0, 2.0, 5.0, 2.0))
    assert shuffled.orders == (2.0, 5.0, 12.0)


def test_negative_conversion_is_clipped_at_zero() -> None:
    """The conversion gives a negative number here; (0, δ) is what it proves."""
    assert RdpAccountant().compose(GaussianEvent(50.0)).epsilon(0.5).epsilon == 0


@pytest.mark.parametrize("orders", [None, OPACUS_ORDERS])
def test_many_noise_multipliers_equal_one_at_a_time(orders: tuple[float, ...] | None) -> None:
    """The batch shares grids between rows; 1e-9 relative to solving each row alone."""
    noises = [0.35, 4.0, 0.9, 0.05, 75.0, 1.7]
    found = [
        bound.epsilon
        for bound in sampled_gaussian_bounds(noises, 0.02, steps=300, delta=1e-6, orders=orders)
    ]
    expected = [
        RdpAccountant(orders=orders).compose(SampledGaussian(z, 0.02), 300).epsilon(1e-6).epsilon
        for z in noises
    ]
    assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert sampled_gaussian_bounds([], 0.02, steps=300, delta=1e-6) == []


def test_divergences_broadcast() -> None:
    """Shape noises + orders, each entry equal to the one computed alone (1e-9, or rounding)."""
    noises, orders = np.array([[0.7], [2.0]]), np.array([[1.5, 2.0, 33.3], [700.0, 1.01, 64.0]])
    found = sampled_gaussian_rdp(noises, 0.03, orders)
    assert found.shape == (2, 1, 2, 3)
    for i, j, k in itertools.product(range(2), range(2), range(3)):
        alone = sampled_gaussian_rdp(noises[i, 0], 0.03, orders[j, k])
        rounding = 1e-12 * 0.03 / (orders[j, k] - 1)
        assert found[i, 0, j, k] == pytest.approx(float(alone), rel=1e-9, abs=rounding)


def test_replace_moves_twice_as_far() -> None:
    """Replacing a record moves a sum by 2C: the same as adding one at half the noise."""
    found = event_rdp(GaussianEvent(3.0), [1.5, 8.0], adjacency="replace")
    assert found == pytest.approx(np.array([1.5, 8.0]) * 4 / (2 * 9), rel=1e-14, abs=0)
    assert event_rdp(SampledGaussian(3.0, 1.0), [8.0], adjacency="replace")[0] == found[1]


def test_replace_has_no_proof_for_sampling() -> None:
    """The accountant and the plain function both refuse."""
    with pytest.raises(UnsupportedEventError, match="adding or removing one record"):
        RdpAccountant("replace").compose(SampledGaussian(1.0, 0.1))
    with pytest.raises(UnsupportedEventError, match="adding or removing one record"):
        event_rdp(SampledGaussian(1.0, 0.1), [2.0], adjacency="replace")


@pytest.mark.parametrize("orders", [(), (1.0,), (0.5, 2.0), (math.nan,), (math.inf,), ((2.0,),)])
def test_bad_orders_are_refused(orders: tuple[float, ...]) -> None:
    """Empty, at or below 1, NaN, infinite, or not flat."""
    with pytest.raises(ValueError, match="orders must be"):
        RdpAccountant(orders=orders)


@pytest.mark.parametrize(
    ("z", "p", "match"),
    [
        (0.0, 0.1, "noise_multiplier must be positive"),
        (-1.0, 0.1, "noise_multiplier must be positive"),
        (math.nan, 0.1, "noise_multiplier must be positive"),
        (math.inf, 0.1, "noise_multiplier must be positive"),
        (1.0, 0.0, "sample_rate must lie in"),
        (1.0, 1.01, "sample_rate must lie in"),
        (1.0, math.nan, "sample_rate must lie in"),
    ],
)
def test_bad_events_are_refused(z: float, p: float, match: str) -> None:
    """By the event and by both functions that take the numbers alone."""
    with pytest.raises(ValueError, match=match):
        SampledGaussian(z, p)
    with pytest.raises(ValueError, match=match):
        sampled_gaussian_rdp([1.0, z], p, [2.0])
    with pytest.raises(ValueError, match=match):
        sampled_gaussian_bounds([1.0, z], p, steps=1, delta=1e-5)


def test_narrow_floats_and_lists_are_taken_at_their_value() -> None:
    """A float32 counts as the double it equals, and a caller's list cannot change a ledger."""
    narrow = SampledGaussian(np.float32(1.3), np.float32(0.01))
    exact = SampledGaussian(float(np.float32(1.3)), float(np.float32(0.01)))
    bound = RdpAccountant().compose(narrow, 100).epsilon(np.float32(1e-5))
    assert bound == RdpAccountant().compose(exact, 100).epsilon(float(np.float32(1e-5)))
    assert type(bound.delta) is float
    orders = [2.0, 3.0]
    accountant = RdpAccountant(orders=orders)
    orders.append(4.0)
    assert accountant.orders == (2.0, 3.0)


def test_subclasses_of_events_are_refused() -> None:
    """What a subclass means is not known here."""

    class Reused(GaussianEvent):
        """The same noise twice, say."""

    with pytest.raises(UnsupportedEventError, match="no proof for Reused"):
        RdpAccountant().compose(Reused(1.0))


def test_many_wide_grids_stay_in_memory() -> None:
    """99 fractional orders at z = 0.01 need 10⁷ nodes; work arrays stay below 200 MB in all."""
    tracemalloc.start()
    found = sampled_gaussian_rdp(0.01, 0.1, [1 + i / 40 + 0.001 for i in range(99)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.all(np.diff(found) > 0)
    assert peak < 200e6


def test_bad_adjacency_is_refused() -> None:
    """A misspelt relation must not fall back to another one."""
    with pytest.raises(ValueError, match="adjacency must be one of"):
        RdpAccountant("swap")
    with pytest.raises(ValueError, match="adjacency must be one of"):
        event_rdp(GaussianEvent(1.0), [2.0], adjacency="swap")


# --- margins and searches, apart

UNIT = 1e-3


@pytest.mark.parametrize("alpha", [1.25, 2.0, 3.0, 40.0])
def test_a_conversion_is_moved_by_eight_units_of_its_terms(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R + log((α-1)/α) - (log δ + log α)/(α-1), where all but the first may cancel.

    For δ it is (α-1)(R - ε + log((α-1)/α)) - log α. One order to choose from.
    """
    monkeypatch.setattr(_conversion, "_EPS", UNIT)
    cost, delta, epsilon = 2.5, 1e-3, 0.7
    gain, spread = math.log((alpha - 1) / alpha), alpha - 1

    def flat(_: np.ndarray, orders: np.ndarray) -> np.ndarray:
        return np.full(orders.shape, cost)

    size = cost - gain + (-math.log(delta) + math.log(alpha)) / spread
    value = cost + gain - (math.log(delta) + math.log(alpha)) / spread
    found = _conversion.least_epsilon(flat, np.ones(1), delta, (alpha,))
    assert found == pytest.approx([value + 8 * UNIT * size], rel=1e-12, abs=0)
    size = spread * (cost + epsilon - gain) + math.log(alpha)
    value = spread * (cost - epsilon + gain) - math.log(alpha)
    found = _conversion.least_log_delta(flat, np.ones(1), epsilon, (alpha,))
    assert found == pytest.approx([value + 8 * UNIT * size], rel=1e-12, abs=1e-15)


def test_the_rest_of_an_order_keeps_its_digits() -> None:
    """Log((α-1)/α), near 1 and far out."""
    orders = np.array([1 + 1e-12, 1.5, 2.0, math.nextafter(2.0, 3.0), 3.0, 1e9, 1e18])
    with mp.workdps(40):
        expected = [float(mp.log((mp.mpf(a) - 1) / mp.mpf(a))) for a in orders.tolist()]
    assert _conversion._log_rest(orders) == pytest.approx(expected, rel=4e-16, abs=0)


@pytest.mark.parametrize(
    ("best", "square"),
    [(0.0, 1.0), (731.0, 2.0**15), (-731.0, 2.0**-15), (5759.0, 2.0**119), (-3839.0, 2.0**-79)],
)
def test_the_lattice_of_orders_is_searched_from_its_guess(best: float, square: float) -> None:
    """Orders 1 + 2^{k/96}, k from -3840 to 5760, from about 1 + √square on, seven a round.

    Four strides, of an octave, a quarter, a sixteenth and 1/96: 28 to 49 orders, found or not.
    """
    asked: list[float] = []

    def objective(_: np.ndarray, orders: np.ndarray) -> np.ndarray:
        k = 96 * np.log2(orders - 1)
        asked.extend(np.round(k, 6).ravel().tolist())
        return np.abs(k - best)

    found = _conversion._minimum(objective, None, np.array([square]))
    assert found[0] < 0.05
    start = min(max(48 * math.log2(square), -3840), 5760)
    assert max(abs(k - start) for k in asked) <= 96 * 3 + 24 * 3 + 6 * 3 + 96
    assert all(abs(k - round(k)) < 0.05 for k in asked)
    assert len(asked) <= 49


@pytest.mark.parametrize(("sign", "end"), [(1, -3840), (-1, 5760)])
def test_the_search_of_an_order_walks_to_the_ends_of_the_lattice(sign: int, end: int) -> None:
    """And not beyond: an order there is not 1 + 2^{k/96} to its digits, or overflows."""
    found = _conversion._minimum(
        lambda _, orders: sign * 96 * np.log2(orders - 1) + 1e4, None, np.array([1.0])
    )
    assert found[0] == pytest.approx(1e4 + sign * end, abs=0.5)
    for square, at in ((1e300, 5760), (1e-300, -3840), (0.0, -3840), (math.inf, 5760)):
        seen: list[float] = []

        def objective(_: np.ndarray, orders: np.ndarray, seen: list = seen) -> np.ndarray:
            seen.extend((96 * np.log2(orders - 1)).ravel().tolist())
            return np.zeros(orders.shape)

        _conversion._minimum(objective, None, np.array([square]))
        if 1e-200 < square < 1e200:
            continue
        inner = min(
            max(48 * math.log2(square) if 0 < square < math.inf else at * 9e9, -3840), 5760
        )
        assert any(abs(k - inner) < 1 for k in seen)
        assert -3841 < min(seen) <= max(seen) < 5761


@pytest.mark.parametrize(("size", "most"), [(24, 28), (25, 28), (60, 42), (300, 150)])
def test_given_orders_are_walked_to_the_best_one(size: int, most: int) -> None:
    """Every place is found, the first and the last too; 24 orders are walked, more are strided."""
    grid = tuple(float(k + 2) for k in range(size))
    for best in range(0, size, max(1, size // 25)):
        asked: list[float] = []

        def objective(
            _: np.ndarray, orders: np.ndarray, b: int = best, a: list = asked
        ) -> np.ndarray:
            a.extend(orders.ravel().tolist())
            return np.abs(orders - 2 - b)

        assert _conversion._minimum(objective, grid, np.ones(1))[0] == 0
        assert len(asked) <= most


def test_rows_walk_on_their_own() -> None:
    """A row that has found its order is not asked again while another walks."""
    asked: list[int] = []
    best = np.array([3, 90, 50])

    def objective(rows: np.ndarray, k: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.abs(k - best[rows, None]) + 1.0

    found = _conversion._search(objective, 0, 99, np.array([3, 3, 40]), (1,))
    assert found.tolist() == [1.0, 1.0, 1.0]
    assert [asked.count(row) for row in range(3)] == [1, 30, 4]


def test_a_divergence_is_raised_by_four_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """And to the next double; the smaller of the sampled and the plain one, if z² is a double."""
    monkeypatch.setattr(rdp, "_EPS", UNIT)
    noises, orders = np.array([0.5, 2.0, 1e-160, 1e160]), np.array([[1.5, 4.0]] * 4)
    plain = [[a / (2 * z * z) for a in (1.5, 4.0)] for z in noises.tolist()[:2]]
    monkeypatch.setattr(
        _moments, "log_moment", lambda z, _p, a: (a - 1) * np.where(z[:, None] < 1, 0.25, 9.0)
    )
    found = rdp._rows(noises, 1.0, orders)
    assert found[:2] == pytest.approx(np.array(plain) * (1 + 4 * UNIT), rel=1e-14, abs=0)
    found = rdp._rows(noises, 0.5, orders)
    assert found[0] == pytest.approx([0.25 * (1 + 4 * UNIT)] * 2, rel=1e-14, abs=0)
    assert found[1] == pytest.approx(np.array(plain[1]) * (1 + 4 * UNIT), rel=1e-14, abs=0)
    assert found[2].tolist() == [math.inf] * 2
    assert np.all((found[3] > 0) & (found[3] < 1e-300))
    monkeypatch.setattr(rdp, "_EPS", 0.0)
    assert rdp._rows(np.ones(1), 1.0, np.full((1, 1), 2.0)).tolist() == [[math.nextafter(1, 2)]]
    for z, usual in ((1e-149, True), (1e-151, False), (1e149, True), (1e151, False)):
        seen = []
        monkeypatch.setattr(
            _moments, "log_moment", lambda z, _p, a, s=seen: s.append(z) or np.zeros(a.shape)
        )
        rdp._rows(np.array([z]), 0.5, np.full((1, 1), 2.0))
        assert bool(seen) == usual


def test_a_ledger_is_raised_by_four_units_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its events and one row; in a table of runs by eight. Divergences are put in."""
    monkeypatch.setattr(rdp, "_EPS", UNIT)
    monkeypatch.setattr(rdp, "_rows", lambda z, rate, a: a / (2 * z * z)[:, None] * rate)
    ledger = RdpAccountant().compose(GaussianEvent(2.0), 3).compose(SampledGaussian(0.5, 0.25), 7)
    ledger = ledger.compose(SampledGaussian(1.5, 0.25), 2).compose(GaussianEvent(0.5))
    orders = np.array([2.0, 5.0])
    total = 3 / 8 + 0.25 * 7 * 2 + 0.25 * 2 / 4.5 + 2
    found = ledger._cost(np.zeros(1, dtype=np.int64), orders)
    assert found == pytest.approx(total * orders * (1 + 4 * UNIT * 5), rel=1e-14, abs=0)
    costs: list[np.ndarray] = []

    def least(cost: Callable, plain: np.ndarray, *_: object) -> np.ndarray:
        assert plain == pytest.approx([6 / 8, 6 * 8], rel=1e-14, abs=0)
        costs.append(cost(np.array([1]), np.array([[2.0, 5.0]])))
        return np.zeros(2)

    monkeypatch.setattr(rdp, "least_epsilon", least)
    sampled_gaussian_bounds([2.0, 0.25], 0.5, steps=6, delta=0.1)
    each = 6 * 0.5 * 8 * orders * (1 + 8 * UNIT)
    assert costs[0][0] == pytest.approx(each, rel=1e-14, abs=0)


def test_a_search_starts_from_the_ledger_without_sampling() -> None:
    """Σ count (distance/z)²/2, as far as it is a double."""
    for adjacency, moved in (("add-remove", 1.0), ("replace", 2.0)):
        ledger = (
            RdpAccountant(adjacency).compose(GaussianEvent(2.0), 3).compose(GaussianEvent(0.5))
        )
        expected = moved**2 * (3 / 8 + 2)
        assert ledger._plain() == pytest.approx([expected], rel=1e-14, abs=0)
    assert RdpAccountant().compose(GaussianEvent(1e-200))._plain().tolist() == [1e300]
    assert RdpAccountant().compose(GaussianEvent(1e200))._plain().tolist() == [1e-300]
