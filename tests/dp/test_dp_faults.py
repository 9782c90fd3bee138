"""What must hold when a part fails: a named error, or the end of the interval that claims less.

A fault is put in by hand, because the code is written so that no input is known to reach these
guards. Bounds that are still returned are held against the Gaussian in closed form.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats

from lora_privacy.dp import (
    PldAccountant,
    ProjectedGaussian,
    SampledGaussian,
    VectorProjection,
    _conversion,
    _fourier,
    _gaussian,
    _grid,
    _majorant,
    _projected_rdp,
    _solve,
    _vector_loss,
    calibrate,
    calibrate_steps,
)
from lora_privacy.dp._profiles import Direction, SampledPair
from lora_privacy.errors import ConvergenceError


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of N(μ, 1) against N(0, 1), by the two tails (Balle & Wang 2018)."""
    below, above = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
    return float(stats.norm.cdf(below) - math.exp(epsilon) * stats.norm.cdf(above))


def gaussian_epsilon(mu: float, delta: float) -> float:
    return float(optimize.brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0, 500))


def nan_like(array: np.ndarray) -> np.ndarray:
    return np.full(array.shape, np.nan)


def test_a_renyi_divergence_that_is_nan_is_no_bound() -> None:
    with pytest.raises(ConvergenceError, match="came out as NaN"):
        _conversion.least_epsilon(lambda _, orders: nan_like(orders), np.ones(1), 1e-5, None)


def test_a_projected_divergence_that_is_nan_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_projected_rdp, "log_excess", lambda _m, _r, x: nan_like(x))
    with pytest.raises(ConvergenceError, match="came out as NaN"), np.errstate(invalid="ignore"):
        _projected_rdp.log_moment([(7, 3)], 1.0, 1.0, np.array([2.0]))


def test_a_projected_profile_that_is_nan_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_majorant, "_least", lambda _s, _z, epsilons, _n: nan_like(epsilons))
    with pytest.raises(ConvergenceError, match="came out as NaN"):
        ProjectedGaussian(layers=[(7, 3)], noise_multiplier=1.0).delta(1.0)


@pytest.mark.parametrize("part", [0.999999, 1.000001])
def test_a_beta_law_that_lost_mass_is_refused(
    part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A millionth of the weights is enough, in either direction."""
    monkeypatch.setattr(_majorant, "_WEIGHTS", part * _majorant._WEIGHTS)
    with pytest.raises(ConvergenceError, match="lost mass"):
        _majorant._dilated.__wrapped__(7, 3, 10)


def test_a_search_that_does_not_end_returns_no_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vector_loss, "_NEWTON", 2)
    with pytest.raises(ConvergenceError, match=r"did not end; no value is returned"):
        VectorProjection(20, 10, 0.99, 1.05).epsilon(1e-4)


def test_bisection_gives_a_pair_whose_upper_end_is_allowed() -> None:
    """Nothing allowed: the upper end is infinite. All but 0: the least double above 0."""
    assert _gaussian.crossing(lambda _: True, 1.0) == (0.0, 0.0)
    assert _gaussian.crossing(lambda _: False, 1.0)[1] == math.inf
    assert _gaussian.crossing(lambda epsilon: epsilon > 0, 1.0) == (0.0, 5e-324)
    low, high = _gaussian.crossing(lambda epsilon: epsilon >= 3.0, 1e-3)
    assert low < 3.0 <= high <= 3.0 * (1 + 2e-13)


def test_without_noise_an_attack_makes_no_errors() -> None:
    """Only the test that never rejects keeps a false negative rate of 1."""
    assert _gaussian.trade_off(math.inf, np.array([0.0, 1e-300, 0.5, 1.0])).tolist() == [
        1,
        0,
        0,
        0,
    ]


@pytest.fixture
def ten_releases() -> tuple[list[tuple[_solve.Source, int]], float]:
    """Ten plain Gaussians on the grid, and the μ of the one Gaussian that they are together."""
    pair = SampledPair(0.5, 1.0)
    return [(_solve.sampled_source(pair, pair), 10)], 0.5 * math.sqrt(10)


def test_with_no_tries_left_nothing_is_claimed(
    ten_releases: tuple[list, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, mu = ten_releases
    monkeypatch.setattr(_solve, "_ROUNDS", 0)
    assert _solve.epsilon_interval(sources, 1e-5) == (0.0, math.inf)
    low, high = _solve.delta_interval(sources, 1.0)
    assert low == 0.0
    assert gaussian_delta(mu, 1.0) <= high <= 1.0
    for epsilons, deltas in _solve.upper_points(sources, 1e-5):
        assert epsilons.tolist() == [0.0]
        assert deltas.tolist() == [1.0]


@pytest.mark.parametrize("window", [16, 64, 256])
def test_where_no_transform_fits_the_moments_still_prove_a_bound(
    window: int, ten_releases: tuple[list, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one Gaussian of √10 times the distance; the ends enclose it and are not idle."""
    sources, mu = ten_releases
    monkeypatch.setattr(_fourier, "MAX_WINDOW", window)
    true = gaussian_epsilon(mu, 1e-5)
    low, high = _solve.epsilon_interval(sources, 1e-5)
    assert low <= true <= high <= 1.5 * true
    true = gaussian_delta(mu, 4.0)
    low, high = _solve.delta_interval(sources, 4.0)
    assert low <= true <= high <= 20 * true
    for epsilons, deltas in _solve.upper_points(sources, 1e-5):
        for epsilon, delta in zip(epsilons.tolist(), deltas.tolist(), strict=True):
            assert delta >= gaussian_delta(mu, epsilon) if epsilon < 50 else delta >= 0


def test_a_measure_without_mass_has_no_curve() -> None:
    """All of the mass was rounded away: a lower end of 0 follows, never a division by it."""
    nothing = _grid._trimmed(_grid.Measure(0.1, -3, np.zeros(7)))
    assert nothing.masses.tolist() == [0.0]
    assert _fourier.compose([(nothing, 3)], 1.0, upper=False) is None


@dataclasses.dataclass(frozen=True)
class RandomisedResponse:
    """A bit that is told truly with odds of e^ε: an event that only its profiles describe."""

    epsilon: float
    assumptions: tuple[str, ...] = ("one bit is told",)
    references: tuple[str, ...] = ("balle-wang-2018",)

    def profile(self, _direction: Direction) -> Callable[[np.ndarray], np.ndarray]:
        truth = 1 / (1 + math.exp(-self.epsilon))
        return lambda at: np.maximum(truth - np.exp(np.minimum(at, 50.0)) * (1 - truth), 0.0)

    def composed_delta(self, count: int, epsilon: float) -> float:
        """δ(ε) of ``count`` answers: their sum is binomial in both worlds."""
        heads, truth = np.arange(count + 1), 1 / (1 + math.exp(-self.epsilon))
        one, other = (stats.binom.pmf(heads, count, p) for p in (truth, 1 - truth))
        return float(np.maximum(one - math.exp(epsilon) * other, 0.0).sum())


def test_steps_are_counted_where_no_cheap_accountant_knows_the_event() -> None:
    """Oracle: the binomial law of the answers; the next step would miss even 2 % more than ε."""
    event = RandomisedResponse(0.1)
    found = int(calibrate_steps(event, epsilon=1.5, delta=1e-3).value)
    assert event.composed_delta(found, 1.5) <= 1e-3 < event.composed_delta(found + 1, 1.5 / 1.02)


def test_noise_is_found_where_no_cheap_accountant_knows_the_ledger() -> None:
    """The ledger already holds the event; the noise is the least to 1 %."""
    spent = PldAccountant().compose(RandomisedResponse(0.2), 3)
    found = calibrate(
        lambda z: SampledGaussian(z, 0.1), epsilon=3.0, delta=1e-4, steps=5, accountant=spent
    ).value
    for noise, met in ((found, True), (0.99 * found, False)):
        bound = spent.compose(SampledGaussian(noise, 0.1), 5).epsilon(1e-4)
        assert (bound.epsilon <= 3.0) == met
