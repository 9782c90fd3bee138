"""One record exchanged for another in a Poisson sample: mpmath, densities and draws."""

import itertools
import math
import warnings

import mpmath as mp
import numpy as np
import pytest
from accountant_contract import AccountantContract
from hypothesis import given, settings
from hypothesis import strategies as st
from pld_oracle import exchange_delta, measure_delta, removal_delta
from projected_oracle import gaussian_delta, shares
from scipy import integrate, stats

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    _grid,
    _majorant,
    calibrate,
    calibrate_steps,
)
from lora_privacy.dp._profiles import DIRECTIONS, SampledPair
from lora_privacy.dp._replaced import ReplacedPair
from lora_privacy.errors import UnsupportedEventError

PAIRS = [
    (1e-3, 0.3),
    (0.1, 1e-3),
    (0.7, 1 - 1e-9),
    (1.0, 1e-7),
    (1.0, 0.1),
    (3.0, 0.02),
    (3.0, 0.9),
    (40.0, 0.01),
]


def replaced(event: object, count: int = 1) -> PldAccountant:
    return PldAccountant("replace").compose(event, count)


class TestSampledReplace(AccountantContract):
    """A ledger with a sampled release is an accountant like any other."""

    accountant = PldAccountant("replace")

    def test_composition_is_commutative(self) -> None:
        """Projected, sampled and plain releases in either order; 1e-9 relative."""
        events = [ProjectedGaussian([(64, 8)], 1.0, 0.1), SampledGaussian(1.0, 0.1)]
        events.append(GaussianEvent(30.0))
        one = two = self.accountant
        for event in events:
            one = one.compose(event, 3)
        for event in reversed(events):
            two = two.compose(event, 3)
        assert one.epsilon(1e-5).epsilon == pytest.approx(
            two.epsilon(1e-5).epsilon, rel=1e-9, abs=0
        )


# --- one release


@pytest.mark.parametrize(("mu", "p"), PAIRS)
def test_profile_is_the_exact_one_between_two_roundings(mu: float, p: float) -> None:
    """Oracle: the best test at 60 digits; both ends within 1e-6 of it."""
    epsilons = np.array([0.0, 1e-12, *np.geomspace(1e-6, 60, 14), 700.0])
    pair = ReplacedPair(mu, p)
    for direction in DIRECTIONS:
        low, high = pair.lower(direction, epsilons), pair.upper(direction, epsilons)
        for epsilon, floor, top in zip(epsilons, low, high, strict=True):
            true = exchange_delta(mu, p, epsilon)
            assert floor <= true <= top
            assert top <= true * (1 + 1e-6) + 1e-290
            assert floor >= true * (1 - 1e-6) - 1e-290


@pytest.mark.parametrize(
    ("mu", "p", "epsilon"), [(1.0, 0.1, 0.2), (2.5, 0.3, 1.5), (0.4, 0.8, 0.0)]
)
def test_the_oracle_is_the_integral(mu: float, p: float, epsilon: float) -> None:
    """∫ (M - e^ε M')₊ by quadrature between the only root and infinity, in both directions."""

    def density(x: float, sign: float) -> float:
        return (1 - p) * stats.norm.pdf(x) + p * stats.norm.pdf(x - sign * mu)

    for sign in (1, -1):
        found, _ = integrate.quad(
            lambda x, s=sign: max(density(x, s) - math.exp(epsilon) * density(x, -s), 0.0),
            -12,
            12,
            limit=2_000,
            epsabs=1e-12,
        )
        assert found == pytest.approx(float(exchange_delta(mu, p, epsilon)), rel=1e-7, abs=0)


GRID = np.linspace(-9.0, 9.0, 721)
ANGLES = (0.0, 0.5, 1.0, math.pi / 2, 2.2, 2.9, math.pi)


def plane(centre: tuple[float, float]) -> np.ndarray:
    """Density of N(centre, I) in the plane."""
    return np.outer(stats.norm.pdf(GRID - centre[0]), stats.norm.pdf(GRID - centre[1]))


def stick(ours: np.ndarray, theirs: np.ndarray, epsilon: float) -> float:
    """∫ (ours - e^ε theirs)₊; 3e-4 relative, for the kink."""
    return float(np.maximum(ours - math.exp(epsilon) * theirs, 0.0).sum()) * float(
        GRID[1] - GRID[0]
    ) ** (ours.ndim)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.4, 1.5])
@pytest.mark.parametrize(("z", "p"), [(1.0, 0.05), (0.5, 0.3), (2.0, 0.9)])
def test_every_pair_of_records_is_covered(z: float, p: float, epsilon: float) -> None:
    """Oracle: densities in the plane for records of several lengths and angles, both directions.

    Opposite records of full length attain it, and advanced joint convexity lies above. Wrong
    alternatives are below some pair: the distance C where 2C belongs, and add-remove.
    """
    base, mu, at = plane((0.0, 0.0)), 1 / z, np.array([epsilon])
    bound = PldAccountant("replace").compose(SampledGaussian(z, p)).delta(epsilon).delta
    worst = 0.0
    for long, short, angle in itertools.product((1.0, 0.6), (1.0, 0.5, 0.0), ANGLES):
        first = plane((mu * long, 0.0))
        second = plane((mu * short * math.cos(angle), mu * short * math.sin(angle)))
        ours, theirs = ((1 - p) * base + p * one for one in (first, second))
        for one, other in ((ours, theirs), (theirs, ours)):
            found = stick(one, other, epsilon)
            assert found <= bound * (1 + 5e-4)
            worst = max(worst, found)
    assert bound <= worst * (1 + 5e-4)
    inner = math.log1p(math.expm1(epsilon) / p)
    beta = math.exp(epsilon - inner)
    near, far = (p * float(gaussian_delta(inner, np.array(k * mu))) for k in (1, 2))
    assert near < 0.95 * worst, "distance C"
    assert worst <= ((1 - beta) * near + beta * far) * (1 + 5e-4), "advanced joint convexity"
    assert SampledPair(mu, p).upper("remove", at)[0] < worst, "add-remove"


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.8])
def test_coins_of_the_others_only_help(epsilon: float) -> None:
    """The others add -1.5, 0 or 2 by coins of their own: the mixture is within the bound."""
    z, p = 0.7, 0.3
    others = {-1.5: 0.2, 0.0: 0.5, 2.0: 0.3}

    def density(record: float) -> np.ndarray:
        return sum(
            weight
            * (
                (1 - p) * stats.norm.pdf(GRID - shift / z)
                + p * stats.norm.pdf(GRID - (shift + record) / z)
            )
            for shift, weight in others.items()
        )

    bound = replaced(SampledGaussian(z, p)).delta(epsilon).delta
    for record, other in itertools.permutations((1.0, -1.0, 0.3), 2):
        assert stick(density(record), density(other), epsilon) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize(("z", "p"), [(1.0, 0.1), (0.5, 0.01), (3.0, 0.7), (0.1, 1e-4)])
def test_epsilon_of_one_release_meets_mpmath(z: float, p: float, delta: float) -> None:
    """δ at the upper end is at most the target, at the lower end at least; 1e-7 apart."""
    low, high = replaced(SampledGaussian(z, p)).epsilon_interval(delta)
    assert exchange_delta(1 / z, p, high) <= delta
    assert high - low <= 1e-7 * high
    if low > 0:
        assert exchange_delta(1 / z, p, low) >= delta
    else:
        assert exchange_delta(1 / z, p, 0.0) <= delta


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5, 4.0])
@pytest.mark.parametrize(("z", "p"), [(1.0, 0.01), (0.4, 0.3), (5.0, 0.8), (1.0, 1.0)])
def test_an_exchange_costs_at_least_a_removal(z: float, p: float, epsilon: float) -> None:
    """Oracle: removal at 60 digits. The other record may be 0, so no smaller number is a bound."""
    assert removal_delta(1 / z, p, epsilon) <= replaced(SampledGaussian(z, p)).delta(epsilon).delta


@pytest.mark.parametrize(
    ("mu", "p", "step"), [(0.1, 1e-3, 2e-5), (1.0, 0.05, 0.05), (3, 0.9, 0.4)]
)
def test_measures_enclose_the_profile_everywhere(mu: float, p: float, step: float) -> None:
    """Oracle: 60 digits, on and between grid points, at ε of both signs."""
    pair, half = ReplacedPair(mu, p), 400
    profile = lambda epsilons: pair.upper("remove", epsilons)  # noqa: E731
    above = _grid.above((profile, profile), step, half)
    for direction, top in zip(DIRECTIONS, above, strict=True):
        floor = _grid.below(pair, direction, step, half, 1.0)
        for k in (-40.3, -7.5, -1.0, 0.0, 0.4, 1.0, 3.7, 25.2):
            true = exchange_delta(mu, p, k * step)
            high, low = (
                measure_delta(
                    one.masses,
                    one.step * np.arange(one.first, one.last + 1),
                    one.infinite,
                    k * step,
                )
                for one in (top, floor)
            )
            assert low - 1e-15 <= true <= high + 1e-15
            assert high - low <= 0.2 * high


# --- composition


def binned(mu: float, p: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of cells of one output, on both sides: post-processing, so δ only falls."""
    edges = np.concatenate([[-np.inf], np.linspace(-6 - mu, 6 + mu, cells - 1), [np.inf]])
    base, ours, theirs = (np.diff(stats.norm.cdf(edges - centre)) for centre in (0, mu, -mu))
    return (1 - p) * base + p * ours, (1 - p) * base + p * theirs


@pytest.mark.parametrize(
    ("z", "p", "steps", "cells", "epsilon"),
    [(1.0, 0.1, 2, 1_500, 0.5), (0.6, 0.3, 2, 1_500, 2.0), (1.0, 0.2, 3, 180, 1.0)],
)
def test_composition_is_above_binned_outputs(
    z: float, p: float, steps: int, cells: int, epsilon: float
) -> None:
    """Oracle: every tuple of cells of a few outputs, summed up; at most the bound, and near it.

    Removal of one record, the wrong alternative, is not above it.
    """
    one, two = binned(1 / z, p, cells)
    ours, theirs = one, two
    for _ in range(steps - 1):
        ours, theirs = (np.multiply.outer(a, b).ravel() for a, b in ((ours, one), (theirs, two)))
    found = float(np.maximum(ours - math.exp(epsilon) * theirs, 0.0).sum())
    low, high = replaced(SampledGaussian(z, p), steps).delta_interval(epsilon)
    assert found <= high
    assert low <= found * 1.02
    assert high <= low * 1.06
    removal = PldAccountant().compose(SampledGaussian(z, p), steps).delta(epsilon).delta
    assert removal < 0.9 * found


@pytest.mark.parametrize(
    ("z", "p", "steps", "epsilon"), [(1.0, 0.05, 40, 1.5), (2.0, 0.5, 15, 2.0)]
)
def test_composition_agrees_with_draws(z: float, p: float, steps: int, epsilon: float) -> None:
    """Mean of (1 - e^{ε-loss})₊ over 100,000 drawn sequences; five standard errors."""
    rng, mu = np.random.default_rng(20240917), 1 / z
    y = rng.standard_normal((100_000, steps)) + mu * (rng.random((100_000, steps)) < p)
    up, down = (np.log1p(p * np.expm1(s * mu * y - mu * mu / 2)) for s in (1, -1))
    gain = -np.expm1(np.minimum(epsilon - (up - down).sum(axis=1), 0.0))
    error = 5 * gain.std() / math.sqrt(len(gain))
    low, high = replaced(SampledGaussian(z, p), steps).delta_interval(epsilon)
    assert low - error <= gain.mean() <= high + error
    removal = PldAccountant().compose(SampledGaussian(z, p), steps).delta(epsilon).delta
    assert removal < gain.mean() - error


@pytest.mark.parametrize("p", [1e-4, 0.02, 0.5])
@pytest.mark.parametrize("z", [0.3, 1.0, 8.0])
def test_between_removal_and_no_sampling(z: float, p: float) -> None:
    """ε lies above that of removing a record and below that without sampling, 100 releases."""
    bound = replaced(SampledGaussian(z, p), 100).epsilon(1e-6)
    assert bound.adjacency == "replace"
    assert bound.method == "pld"
    assert "balle-subsampling-2018" in bound.references
    assert PldAccountant().compose(SampledGaussian(z, p), 100).epsilon_interval(1e-6)[0] <= (
        bound.epsilon
    )
    assert bound.epsilon < replaced(GaussianEvent(z), 100).epsilon(1e-6).epsilon


def test_full_sampling_is_no_sampling() -> None:
    """At p = 1 it is the plain event at distance 2C; just below it costs the same within 1 %."""
    plain = replaced(GaussianEvent(2.0), 5).epsilon_interval(1e-5)
    assert replaced(SampledGaussian(2.0, 1.0), 5).epsilon_interval(1e-5) == plain
    assert replaced(ProjectedGaussian([(7, 7)], 2.0), 5).epsilon(1e-5).epsilon == pytest.approx(
        plain[1], rel=0.01, abs=0
    )
    low, high = replaced(SampledGaussian(2.0, 1 - 1e-9), 5).epsilon_interval(1e-5)
    assert low <= plain[1] * (1 + 1e-6)
    assert plain[0] * (1 - 1e-6) <= high <= 1.01 * plain[1]


@given(
    z=st.floats(0.3, 20),
    p=st.floats(1e-5, 0.99),
    count=st.integers(1, 1000),
    log_delta=st.floats(-30, -3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_ends_are_narrow_and_monotone(z: float, p: float, count: int, log_delta: float) -> None:
    """The ends are within 1 % of ε; less noise or more sampling stays above the lower one."""
    delta = math.exp(log_delta)
    low, high = replaced(SampledGaussian(z, p), count).epsilon_interval(delta)
    assert 0 <= low <= high < math.inf
    assert high - low <= 0.01 * high + 1e-3 * min(2 / z, p / z * 6) * math.sqrt(count)
    assert replaced(SampledGaussian(z / 1.2, p), count).epsilon(delta).epsilon >= low
    assert replaced(SampledGaussian(z, min(0.995, 1.1 * p)), count).epsilon(delta).epsilon >= low


@given(z=st.floats(0.05, 100), p=st.floats(1e-6, 0.999), epsilon=st.floats(0, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_release_is_monotone(z: float, p: float, epsilon: float) -> None:
    """δ of one release falls with z and ε and grows with p, to 1e-9 relative."""
    event = SampledGaussian(z, p)
    value = replaced(event).delta(epsilon).delta * (1 + 1e-9) + 1e-290
    assert replaced(SampledGaussian(1.1 * z, p)).delta(epsilon).delta <= value
    assert replaced(SampledGaussian(z, 0.9 * p)).delta(epsilon).delta <= value
    assert replaced(event).delta(1.1 * epsilon).delta <= value


@pytest.mark.parametrize("z", [1e-200, 1e-120, 1e-2, 1e3, 1e120, 1e300])
@pytest.mark.parametrize("p", [5e-324, 1e-7, 1 - 2**-53])
@pytest.mark.parametrize("count", [1, 3])
def test_extremes_are_numbers(z: float, p: float, count: int) -> None:
    """No NaN and no warning; infinite only with a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accountant = replaced(SampledGaussian(z, p), count)
        bound, other = accountant.epsilon(1e-8), accountant.delta(1.0)
    assert bound.epsilon >= 0
    assert (bound.reason is not None) == math.isinf(bound.epsilon)
    assert 0 < other.delta <= 1


def test_trade_off_bounds_the_best_attack() -> None:
    """One step at z = 1, p = 0.3: likelihood-ratio tests of the worst pair, within 2 %."""
    accountant, cuts = replaced(SampledGaussian(1.0, 0.3)), np.linspace(-8, 8, 4001)
    base = 0.7 * stats.norm.sf(cuts)
    ours, theirs = (base + 0.3 * stats.norm.sf(cuts - centre) for centre in (1, -1))
    rates = np.array([1e-4, 0.01, 0.1, 0.4, 0.9])
    best = np.interp(rates, theirs[::-1], ours[::-1])
    bound = accountant.tpr_bound(rates)
    assert np.all(best <= bound * (1 + 1e-5)), "interpolation costs 1e-5"
    assert np.all(bound <= 1.02 * best)
    true = 0.3 * (2 * stats.norm.cdf(1.0) - 1)
    assert true * (1 - 1e-12) <= accountant.advantage() <= 1.05 * true


# --- with a fresh projection


@pytest.mark.parametrize("p", [1.0, 0.2])
@pytest.mark.parametrize("z", [0.4, 2.0])
def test_full_rank_is_the_plain_exchange(z: float, p: float) -> None:
    """Oracle: 60 digits; 1e-6 relative."""
    epsilons = np.array([0.0, 0.01, 0.3, 2.0])
    event = ProjectedGaussian([(7, 7), (768, 8)], z, p)
    for direction in DIRECTIONS:
        found = event.profile(direction, adjacency="replace")(epsilons)
        for epsilon, value in zip(epsilons, found, strict=True):
            true = exchange_delta(1 / z, p, epsilon) if p < 1 else removal_delta(2 / z, 1, epsilon)
            assert true <= value <= true * (1 + mp.mpf("1e-6"))
    plain = replaced(SampledGaussian(z, p), 20).epsilon_interval(1e-5)
    bound = replaced(event, 20).epsilon(1e-5).epsilon
    assert plain[0] <= bound <= 1.01 * plain[1]


DRAWS = 60_000
RECORDS = {
    "opposite, rank one": ([[1, 0, 0, 0]], [[-1, 0, 0, 0]]),
    "opposite, two rows": (
        [[0.5**0.5, 0, 0, 0], [0, 0.5**0.5, 0, 0]],
        [[-(0.5**0.5), 0, 0, 0], [0, -(0.5**0.5), 0, 0]],
    ),
    "opposite, isotropic": (np.eye(4) / 2, -np.eye(4) / 2),
    "orthogonal": ([[1, 0, 0, 0]], [[0, 1, 0, 0]]),
    "oblique": ([[1, 0, 0, 0]], [[-0.8, 0.6, 0, 0]]),
    "none": ([[1, 0, 0, 0]], [[0, 0, 0, 0]]),
    "short": ([[0.6, 0, 0, 0]], [[0, -1, 0, 0]]),
}


def drawn_gains(
    first: np.ndarray, second: np.ndarray, z: float, p: float, epsilon: float
) -> np.ndarray:
    """(1 - e^{ε-loss})₊ for drawn A (2, 4), coins and noise: the release, from its definition."""
    rng = np.random.default_rng(5)
    Q = np.linalg.qr(rng.standard_normal((DRAWS, 4, 2))).Q  # row spaces of Gaussian A
    x, other = (
        np.einsum("ij,sjk->sik", np.asarray(v, dtype=float), Q) / z for v in (first, second)
    )
    y = rng.standard_normal(x.shape) + x * (rng.random((DRAWS, 1, 1)) < p)
    logs = [
        np.log1p(p * np.expm1((v * y).sum((1, 2)) - np.square(v).sum((1, 2)) / 2))
        for v in (x, other)
    ]
    return -np.expm1(np.minimum(epsilon - (logs[0] - logs[1]), 0.0))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
@pytest.mark.parametrize(("z", "p"), [(0.7, 0.3), (0.5, 0.9), (1.0, 1 - 1e-9)])
def test_every_pair_of_records_is_covered_behind_a_projection(
    z: float, p: float, epsilon: float
) -> None:
    """Level: five standard errors of 60,000 draws; the worst pair comes within 20 %.

    A bound with the distance C where 2C belongs is rejected.
    """
    event = ProjectedGaussian([(4, 2)], z, p)
    bound = event.profile("remove", adjacency="replace")(np.array([epsilon]))[0]
    assert bound == pytest.approx(event.delta(epsilon, adjacency="replace").delta, rel=1e-3, abs=0)
    worst = 0.0
    for first, second in RECORDS.values():
        for one, other in ((first, second), (second, first)):
            gains = drawn_gains(np.asarray(one), np.asarray(other), z, p, epsilon)
            lower = gains.mean() - 5 * gains.std() / math.sqrt(DRAWS)
            assert lower <= bound
            worst = max(worst, lower)
    assert bound <= 1.2 * worst
    wrong = event.profile("remove")(np.array([epsilon]))[0]
    assert wrong < worst


@pytest.mark.parametrize(("z", "p"), [(1.0, 0.05), (0.5, 0.5), (3.0, 0.001)])
def test_projection_lies_between_rank_one_and_none(z: float, p: float) -> None:
    """Oracle: opposite records of rank one by Gauss-Jacobi; the bound is at most 15 % above."""
    epsilons = np.array([0.0, 0.01, 0.1, 0.5])
    event = ProjectedGaussian([(20, 3)], z, p)
    found = event.profile("add", adjacency="replace")(epsilons)
    beta, weights = shares(20, 3, 60)
    for epsilon, value in zip(epsilons, found, strict=True):
        true = weights @ [float(exchange_delta(math.sqrt(b) / z, p, epsilon, 20)) for b in beta]
        assert true * (1 - 1e-6) <= value <= 1.15 * true
        assert value < float(exchange_delta(1 / z, p, epsilon))
        inner = _majorant.replaced_profile([(20, 3)], z, p, np.array([epsilon]), _majorant.FINE)
        assert inner[0][0] == pytest.approx(value, rel=2e-3, abs=0)


def test_a_projected_exchange_composes() -> None:
    """100 sampled releases: above removal, below no projection and no sampling; in one ledger."""
    event = ProjectedGaussian([(768, 8)], 0.3, 0.05)
    bound = replaced(event, 100).epsilon(1e-5)
    assert bound.adjacency == "replace"
    assert "row space of A is Haar" in str(bound)
    assert "balle-subsampling-2018" in bound.references
    assert replaced(event, 100).epsilon_interval(1e-5)[0] == 0, "no lower end is known"
    assert PldAccountant().compose(event, 100).epsilon(1e-5).epsilon < bound.epsilon
    assert bound.epsilon < replaced(SampledGaussian(0.3, 0.05), 100).epsilon(1e-5).epsilon
    unsampled = ProjectedGaussian([(768, 8)], 0.3)
    assert bound.epsilon < replaced(unsampled, 100).epsilon(1e-5).epsilon
    mixed = replaced(event, 100).compose(SampledGaussian(2.0, 0.01), 50)
    assert bound.epsilon < mixed.epsilon(1e-5).epsilon


def test_without_sampling_a_projected_exchange_is_half_the_noise() -> None:
    """The same ledger at noise z/2 under add-remove: equal to 1e-9."""
    found = replaced(ProjectedGaussian([(64, 8)], 2.0), 30).epsilon(1e-5).epsilon
    half = PldAccountant().compose(ProjectedGaussian([(64, 8)], 1.0), 30).epsilon(1e-5).epsilon
    assert found == pytest.approx(half, rel=1e-9, abs=0)


@pytest.mark.parametrize("delta", [1e-2, 1e-8])
def test_one_projected_exchange_as_a_bound(delta: float) -> None:
    """ε and δ of the event are inverse, and at most what the accountant says of one step."""
    event = ProjectedGaussian([(40, 3)], 0.4, 0.2)
    bound = event.epsilon(delta, adjacency="replace")
    assert bound.adjacency == "replace"
    assert event.delta(bound.epsilon, adjacency="replace").delta <= delta * (1 + 1e-6)
    assert event.delta(bound.epsilon * (1 - 1e-3), adjacency="replace").delta > delta
    assert bound.epsilon <= replaced(event).epsilon(delta).epsilon <= 1.01 * bound.epsilon
    assert bound.epsilon > event.epsilon(delta).epsilon


# --- around it


def test_calibration_meets_the_target() -> None:
    """Noise and steps, with a proof at the value; one step more or 1 % less noise misses."""
    target = {"epsilon": 2.0, "delta": 1e-5, "accountant": PldAccountant("replace")}
    found = calibrate(lambda z: SampledGaussian(z, 0.01), steps=200, **target)
    assert found.bound.adjacency == "replace"
    less = replaced(SampledGaussian(0.99 * found.value, 0.01), 200).epsilon(1e-5).epsilon
    assert found.bound.epsilon <= 2.0 < less
    steps = calibrate_steps(SampledGaussian(1.5, 0.02), **target)
    more = replaced(SampledGaussian(1.5, 0.02), steps.value + 1).epsilon(1e-5).epsilon
    assert steps.bound.epsilon <= 2.0 < more
    projected = calibrate_steps(ProjectedGaussian([(32, 4)], 1.0, 0.1), **target)
    assert projected.value > 1
    assert projected.bound.adjacency == "replace"


def test_what_has_no_proof_is_refused() -> None:
    """Rényi divergences point to the accountant that has one; subclasses stay unknown."""

    class Reused(ProjectedGaussian):
        """One A for two releases, say."""

    for event in (SampledGaussian(1.0, 0.1), ProjectedGaussian([(8, 2)], 1.0, 0.1)):
        with pytest.raises(UnsupportedEventError, match=r"replace.*Use PldAccountant"):
            RdpAccountant("replace").compose(event)
    with pytest.raises(UnsupportedEventError, match="no proof for Reused"):
        replaced(Reused([(8, 2)], 1.0, 0.1))
    with pytest.raises(ValueError, match="adjacency must be one of"):
        ProjectedGaussian([(8, 2)], 1.0).profile("add", adjacency="swap")
