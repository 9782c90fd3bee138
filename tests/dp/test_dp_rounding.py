"""Rounding is paid for: at random doubles, upper ends are never below the exact value.

Half of all results lie below it when their margin is left out, so that some hundred points find a
margin that is missing; the other side is held to a few digits less than double precision, which
finds one that is far too wide. Oracles are mpmath at 50 digits, from the definitions.
"""

import math

import mpmath as mp
import numpy as np
import pytest
from pld_oracle import DELTAS, cdf, exchange_delta

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    RdpAccountant,
    SampledGaussian,
    _conversion,
    _gaussian,
    _grid,
    _hyp1f1,
    _majorant,
    _solve,
    sampled_gaussian_bounds,
    sampled_gaussian_rdp,
)
from lora_privacy.dp._profiles import DIRECTIONS, Direction, SampledPair
from lora_privacy.dp._replaced import ReplacedPair

POINTS = 200
EXACT = mp.MPContext()
EXACT.dps = 50


def spread(rng: np.random.Generator, low: float, high: float, size: int = POINTS) -> np.ndarray:
    """Doubles with all their digits, evenly in logarithms."""
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


def test_plain_divergences() -> None:
    """α/(2z²), to four units of the last place."""
    rng = np.random.default_rng(1)
    for z, alpha in zip(spread(rng, 1e-3, 1e3), 1 + spread(rng, 1e-6, 1e6), strict=True):
        true = EXACT.mpf(alpha) / (2 * EXACT.mpf(z) ** 2)
        assert true <= sampled_gaussian_rdp(z, 1.0, [alpha])[0] <= true * (1 + EXACT.mpf("3e-15"))


def test_sampled_divergences_at_whole_orders() -> None:
    """The binomial sum of Mironov, Talwar & Zhang with its terms k = 0 and 1."""
    rng = np.random.default_rng(2)
    rates, orders = spread(rng, 1e-8, 0.99), rng.integers(2, 12, POINTS)
    for z, p, alpha in zip(spread(rng, 0.3, 50.0), rates, orders.tolist(), strict=True):
        q, total = EXACT.mpf(p), EXACT.mpf(0)
        for k in range(alpha + 1):
            moment = EXACT.exp(EXACT.mpf(k * (k - 1)) / (2 * EXACT.mpf(z) ** 2))
            total += EXACT.binomial(alpha, k) * (1 - q) ** (alpha - k) * q**k * moment
        true = EXACT.log(total) / (alpha - 1)
        assert true <= sampled_gaussian_rdp(z, p, [alpha])[0] <= true * (1 + EXACT.mpf("2e-12"))


@pytest.mark.parametrize("released", [1, 3])
def test_conversion_at_one_order(released: int) -> None:
    """Canonne, Kamath & Steinke, Prop. 12, with one order to choose from."""
    rng = np.random.default_rng(3)
    divergences, deltas = spread(rng, 1e-6, 1e4), spread(rng, 1e-30, 0.5)
    for alpha, rho, delta in zip(1 + spread(rng, 1e-3, 1e4), divergences, deltas, strict=True):
        grid, plain = (float(alpha),) * released, np.ones(1)
        found = _conversion.least_epsilon(
            lambda _, k, r=rho: np.full(k.shape, r), plain, delta, grid
        )
        a, r, d = EXACT.mpf(alpha), EXACT.mpf(rho), EXACT.mpf(delta)
        paid = -(EXACT.log(d) + EXACT.log(a)) / (a - 1)
        true = r + EXACT.log((a - 1) / a) + paid
        size = r + abs(EXACT.log((a - 1) / a)) + abs(EXACT.log(d) / (a - 1)) + 1
        assert max(true, 0) <= found[0] <= max(true, 0) + size * EXACT.mpf("1e-14")
        epsilon = float(found[0]) + 0.1
        log_delta = _conversion.least_log_delta(
            lambda _, k, r=rho: np.full(k.shape, r), plain, epsilon, grid
        )
        true = (a - 1) * (r - EXACT.mpf(epsilon) + EXACT.log((a - 1) / a)) - EXACT.log(a)
        size = (a - 1) * (size + EXACT.mpf(epsilon)) + EXACT.log(a)
        assert true <= log_delta[0] <= true + size * EXACT.mpf("1e-14")


def test_renyi_accounting_of_plain_ledgers() -> None:
    """Several noises and counts, one order: the sum and the conversion, all in one."""
    rng = np.random.default_rng(4)
    for alpha, delta in zip(1 + spread(rng, 0.1, 100.0), spread(rng, 1e-12, 1e-2), strict=True):
        accountant, total = RdpAccountant(orders=(float(alpha),)), EXACT.mpf(0)
        for z, count in zip(spread(rng, 0.5, 30, 3).tolist(), (1, 7, 1000), strict=True):
            accountant = accountant.compose(GaussianEvent(z), count)
            total += count * EXACT.mpf(alpha) / (2 * EXACT.mpf(z) ** 2)
        a = EXACT.mpf(alpha)
        paid = -(EXACT.log(EXACT.mpf(delta)) + EXACT.log(a)) / (a - 1)
        true = total + EXACT.log((a - 1) / a) + paid
        found = accountant.epsilon(float(delta)).epsilon
        assert max(true, 0) <= found <= max(true, 0) * (1 + EXACT.mpf("1e-13")) + 1e-13
        together = sampled_gaussian_bounds(
            [30.0], 1.0, steps=1000, delta=float(delta), orders=(float(alpha),)
        )
        single = 1000 * a / (2 * EXACT.mpf(30.0) ** 2) + EXACT.log((a - 1) / a) + paid
        assert together[0].epsilon >= single


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_profiles_of_a_sampled_pair(direction: Direction) -> None:
    """Both ends enclose the best test; they part by 1e-7 at most where δ is a normal double."""
    rng = np.random.default_rng(5)
    rates = np.where(rng.uniform(size=POINTS) < 0.3, 1.0, spread(rng, 1e-6, 0.999))
    for mu, p, share in zip(spread(rng, 1e-3, 30.0), rates, spread(rng, 1e-4, 5.0), strict=True):
        end = -math.log1p(-p) if direction == "add" and p < 1 else mu + mu * mu
        epsilon, pair = share * end, SampledPair(float(mu), float(p))
        at = np.array([epsilon])
        low, high = pair.lower(direction, at)[0], pair.upper(direction, at)[0]
        true = DELTAS[direction](mu, p, epsilon, digits=60 + int(epsilon))
        assert low <= true <= high
        assert high - low <= 1e-7 * true + 1e-290


def test_profiles_of_an_exchange() -> None:
    rng = np.random.default_rng(6)
    size = 40  # the oracle bisects
    rates = spread(rng, 1e-4, 0.99, size)
    for mu, p, share in zip(
        spread(rng, 0.1, 5.0, size), rates, spread(rng, 0.01, 2, size), strict=True
    ):
        epsilon, pair = share * mu, ReplacedPair(float(mu), float(p))
        at = np.array([epsilon])
        low, high = pair.lower("remove", at)[0], pair.upper("remove", at)[0]
        true = exchange_delta(mu, p, epsilon)
        assert low <= true <= high
        assert high - low <= 1e-7 * true + 1e-290


def test_one_gaussian_between_two_ends() -> None:
    """Plain ledgers are one Gaussian, whose δ meets the target at the upper ε and misses below."""
    rng = np.random.default_rng(7)
    noises = (spread(rng, 0.3, 50, 60) for _ in range(2))
    for delta, first, second in zip(spread(rng, 1e-15, 0.3, 60), *noises, strict=True):
        accountant = PldAccountant().compose(GaussianEvent(first), 3)
        accountant = accountant.compose(SampledGaussian(second, 1.0), 11)
        with mp.workdps(50):
            mu = mp.sqrt(3 / mp.mpf(first) ** 2 + 11 / mp.mpf(second) ** 2)
        low, high = accountant.epsilon_interval(float(delta))
        assert DELTAS["remove"](mu, 1.0, high) <= delta
        assert low == 0 or DELTAS["remove"](mu, 1.0, low) >= delta
        assert high - low <= 1e-8 * high
        low, high = accountant.delta_interval(1.0)
        assert low <= DELTAS["remove"](mu, 1.0, 1.0) <= high <= low * (1 + 1e-7) + 1e-290


def test_trade_offs() -> None:
    """The likelihood-ratio test; a false negative rate is rounded down."""
    rng = np.random.default_rng(8)
    for mu, fpr in zip(spread(rng, 1e-3, 30.0), spread(rng, 1e-30, 1.0), strict=True):
        with mp.workdps(80):
            quantile = -mp.sqrt(2) * mp.erfinv(2 * mp.mpf(fpr) - 1)
            true = cdf(quantile - mu)
        found = _gaussian.trade_off(float(mu), np.array([fpr]))[0]
        assert true * (1 - mp.mpf("1e-9")) <= found <= true


def test_moments_of_a_share_of_one() -> None:
    """Rank = features: log(e^x - 1), to four units of the last place of its terms."""
    rng = np.random.default_rng(9)
    for x in spread(rng, 1e-250, 1e6):
        true = EXACT.log(EXACT.expm1(EXACT.mpf(x)))
        found = float(_hyp1f1.log_excess(5, 5, x))
        assert true <= found <= true + (1 + abs(true)) * EXACT.mpf("4e-15")


@pytest.mark.parametrize(("features", "rank"), [(2, 1), (7, 3), (64, 8), (768, 700)])
def test_moments_of_a_share(features: int, rank: int) -> None:
    """The series of ₁F₁, in which all terms are positive."""
    rng = np.random.default_rng(10)
    for x in spread(rng, 1e-250, 200.0, POINTS // 4):
        a, b = EXACT.mpf(rank) / 2, EXACT.mpf(features) / 2
        term = total = a / b * EXACT.mpf(x)
        for k in range(1, 900):
            term *= (a + k) / (b + k) * EXACT.mpf(x) / (k + 1)
            total += term
        true = EXACT.log(total)
        found = float(_hyp1f1.log_excess(features, rank, x))
        assert true <= found <= true + (1 + abs(true)) * EXACT.mpf("2e-12")


def test_the_gaussian_profile_of_a_projection() -> None:
    """δ rounded up and its derivative φ(a), where μ is a share of 1/z."""
    rng = np.random.default_rng(11)
    mus, epsilons = spread(rng, 1e-3, 30.0), spread(rng, 1e-4, 100.0)
    found, slopes = _majorant._gauss(epsilons, mus)
    for epsilon, mu, value, slope in zip(epsilons, mus, found, slopes, strict=True):
        true = DELTAS["remove"](mu, 1.0, epsilon)
        assert true <= value + 1e-300
        assert value <= true * (1 + 1e-7) + mp.mpf("1e-14") * float(slope) + 1e-250
        with mp.workdps(30):
            density = mp.npdf(mp.mpf(epsilon) / mp.mpf(mu) - mp.mpf(mu) / 2)
        assert slope == pytest.approx(float(density), rel=1e-9, abs=1e-300)


def exact_profile(measure: _grid.Measure, epsilon: mp.mpf) -> mp.mpf:
    """Σ mass (1 - e^{ε - loss})₊ + infinite of the doubles at hand, without rounding."""
    total = mp.mpf(measure.infinite)
    for i, mass in enumerate(measure.masses.tolist()):
        loss = (measure.first + i) * mp.mpf(measure.step) + mp.mpf(measure.offset)
        if loss > epsilon:
            total += mp.mpf(mass) * -mp.expm1(epsilon - loss)
    return total


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("mu", "p", "step"), [(0.5, 1.0, 0.125), (1.0, 0.1, 0.25), (2.0, 0.9, 0.5), (0.1, 1e-3, 1e-3)]
)
def test_measures_where_they_touch_the_profile(
    mu: float, p: float, step: float, direction: Direction
) -> None:
    """That above touches it at the points of the grid, that below between them: rounding decides.

    Points at which a convex function has been put in place of rounded dots lie higher; the others
    are within 1e-11.
    """
    pair, half = SampledPair(mu, p), 24
    step = _solve._short(step)
    main = DIRECTIONS.index(direction)
    source = _solve.sampled_source(pair, pair)
    above = _grid.above(source.profiles, step, half)[main]
    below = _grid.below(pair, direction, step, half, 1.0)
    near = 0
    with mp.workdps(60):
        for k in range(-half, half):
            at = k * mp.mpf(step)
            true, found = DELTAS[direction](mu, p, at), exact_profile(above, at)
            assert true <= found
            near += found <= true * (1 + mp.mpf("1e-11"))
            for share in (0.25, 0.5, 0.75):
                at = (k + share) * mp.mpf(step)
                true = DELTAS[direction](mu, p, at)
                assert exact_profile(below, at) <= true + mp.mpf("1e-50")
                assert true <= exact_profile(above, at) + mp.mpf("1e-50")
        assert sum((mp.mpf(x) for x in above.masses.tolist()), mp.mpf(above.infinite)) >= 1
        assert sum((mp.mpf(x) for x in below.masses.tolist()), mp.mpf(below.infinite)) <= 1
    assert near >= half // 2
