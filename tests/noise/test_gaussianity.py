"""Exact distances of one entry of the noise to a Gaussian (theory 2.4)."""

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from lora_privacy.errors import NonFiniteError, UnsupportedLawError
from lora_privacy.noise.distance import Distance
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import (
    Variance,
    kl_to_gaussian,
    kolmogorov_to_gaussian,
    maximal_coupling,
    tv_of_entries,
    tv_to_gaussian,
)
from lora_privacy.noise.joint import joint_tv_to_gaussian

VARIANCES: tuple[Variance, ...] = ("exact", "published")
# Theory 2.4, ρ = 0, six decimals.
PINS = {1: 0.237533, 2: 0.141302, 4: 0.078343, 8: 0.041378, 16: 0.021267, 32: 0.010784}
PINS |= {64: 0.005431}
CASES = [(1, 0.0), (1, 0.6), (2, 0.3), (3, -0.9), (8, 0.3), (64, 0.5), (300, 0.05)]


def densities(rank: int, rho: float, variance: Variance) -> tuple[Callable, Any]:
    """Density of an entry with ‖q‖ = 1, from its definition as a Gaussian mixture, and φ.

    Given S ~ χ²_r/r the entry is N(ρ(S − 1), (1 − ρ²)S/r). In ln S the integrand is analytic and
    falls faster than exponentially at both ends, so that equal steps give all digits.
    """
    k, spread = rank / 2, (1 - rho**2) / rank
    y = np.arange(
        -60.0 / max(k, 1.0) - 12.0 / math.sqrt(k) - 8.0, 5.0, 0.5 / (20 + 4 * math.sqrt(rank))
    )
    s, step = np.exp(y), y[1] - y[0]
    with mp.workdps(30):
        constant = float(k * mp.log(k) - mp.loggamma(k) - mp.log(2 * mp.pi * spread) / 2 - k)
    weight = constant + k * (y - np.expm1(y)) - y / 2
    scale = math.sqrt((1 + (rho**2 if variance == "exact" else 0)) / rank)

    def law(x: np.ndarray) -> np.ndarray:
        flat = np.ravel(x)[:, None]
        total = np.exp(weight - (flat - rho * np.expm1(y)) ** 2 / (2 * spread * s)).sum(axis=1)
        return np.reshape(total * step, np.shape(x))

    return law, stats.norm(0, scale)


def panels(rank: int, rho: float, width: float) -> np.ndarray:
    """Edges half a standard deviation apart in the bulk, crowding at x = −ρ."""
    std = math.sqrt(1.0 / rank)
    bulk = np.arange(-8, 8.1, 0.5) * std
    out = std * 8.0 * (width / 8.0) ** (np.arange(1, 16) / 15)
    near = std * 8.0 ** -np.arange(1.0, 14.0)
    spike = [-rho - near, [-rho], -rho + near]
    return np.unique(np.concatenate([-out, bulk, out, *spike]))


def integrate(function: Callable, edges: np.ndarray) -> float:
    """Gauss–Legendre with 14 nodes a panel."""
    x, weight = np.polynomial.legendre.leggauss(14)
    half = np.diff(edges)[:, None] / 2
    nodes = edges[:-1, None] + half * (1 + x)
    return float(np.sum(half * weight * function(nodes)))


def sign_changes(function: Callable, edges: np.ndarray) -> list[float]:
    """Roots of ``function`` by bisection between the points of a grid four times finer."""
    grid = np.unique(np.concatenate([edges[:-1] + np.diff(edges) * i / 4 for i in range(4)]))
    value = function(grid)
    turn = np.flatnonzero(value[:-1] * value[1:] < 0)
    return [
        optimize.brentq(lambda x: float(function(x)), grid[i], grid[i + 1], xtol=1e-13)
        for i in turn
    ]


@pytest.mark.parametrize(("rank", "expected"), PINS.items())
@pytest.mark.parametrize("variance", VARIANCES)
def test_pins(rank: int, expected: float, variance: Variance) -> None:
    """Oracle: theory 2.4; at ρ = 0 both variances are the same, and so is every m."""
    assert tv_to_gaussian(EntryNoise(rank), variance).value == pytest.approx(
        expected, rel=0, abs=5.1e-7
    )


def test_pins_off_centre() -> None:
    """Oracle: theory 2.4, r = 64, ρ = .3, four decimals."""
    law = EntryNoise(64, 1.0, 0.3)
    assert tv_to_gaussian(law, "exact").value == pytest.approx(0.0259, rel=0, abs=5e-5)
    assert tv_to_gaussian(law, "published").value == pytest.approx(0.0298, rel=0, abs=5e-5)


@pytest.mark.parametrize(("rank", "rho"), [*CASES, (2, 0.99)])
@pytest.mark.parametrize("variance", VARIANCES)
def test_matches_quadrature_of_the_definition(rank: int, rho: float, variance: Variance) -> None:
    """Oracle: ½∫|p − φ| over the Gaussian mixture; 1e-9 relative."""
    p, phi = densities(rank, rho, variance)
    edges = panels(rank, rho, 60.0)
    roots = sign_changes(lambda x: p(x) - phi.pdf(x), edges)
    edges = np.unique([*edges, *roots])
    expected = integrate(lambda x: np.abs(p(x) - phi.pdf(x)), edges) / 2
    value = tv_to_gaussian(EntryNoise(rank, 2.0, 2.0 * rho), variance).value
    assert value == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.6), (3, -0.9), (64, 0.5)])
@pytest.mark.parametrize("variance", VARIANCES)
def test_kl_matches_quadrature_of_the_definition(
    rank: int, rho: float, variance: Variance
) -> None:
    """Oracle: ∫ p ln(p/φ) over the Gaussian mixture; 1e-8 relative."""
    p, phi = densities(rank, rho, variance)
    edges = panels(rank, rho, 60.0)
    expected = integrate(lambda x: special.xlogy(p(x), p(x)) - p(x) * phi.logpdf(x), edges)
    distance = kl_to_gaussian(EntryNoise(rank, 2.0, 2.0 * rho), variance)
    assert distance.value == pytest.approx(expected, rel=1e-8, abs=0)
    assert "nats" in str(distance)


@pytest.mark.parametrize("rank", [1, 2, 31, 33, 10_000])
def test_kl_of_a_single_input_is_that_of_chi_square(rank: int) -> None:
    """Oracle: the entropies of gamma and Gaussian at 40 digits; 1e-11 relative."""
    with mp.workdps(40):
        k = mp.mpf(rank) / 2
        entropy = k + mp.loggamma(k) + (1 - k) * mp.digamma(k)
        expected = float(mp.log(2 * mp.pi * mp.e * k) / 2 - entropy)
        published = expected + float((1 - mp.log(2)) / 2)
    law = EntryNoise(rank, 3.0, -3.0)
    assert kl_to_gaussian(law).value == pytest.approx(expected, rel=1e-11, abs=0)
    assert kl_to_gaussian(law, "published").value == pytest.approx(published, rel=1e-11, abs=0)


@pytest.mark.parametrize("digits", [9, 10, 11, 12])
def test_kl_keeps_its_error_at_the_spike(digits: int) -> None:
    """At rank 1 KL nears its limit as .8202416 √(1 − ρ), the constant read off at ρ = 1 − 1e-8.

    The density has a pole as narrow as 1 − ρ; the stated error must cover what that costs.
    """
    limit = kl_to_gaussian(EntryNoise(1, 1.0, 1.0)).value
    reference = limit - kl_to_gaussian(EntryNoise(1, 1.0, 1.0 - 1e-8)).value
    near = kl_to_gaussian(EntryNoise(1, 1.0, 1.0 - 10.0**-digits))
    expected = reference * 10 ** ((8 - digits) / 2)
    assert abs(limit - near.value - expected) <= near.error + 1e-4 * expected
    assert near.error < 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("variance", VARIANCES)
def test_single_input_equals_the_joint_distance(rank: int, variance: Variance) -> None:
    """Oracle: ``joint.py`` with one input, which integrates the χ² density by other means.

    The limit ρ → 1 is continuous, here to 1e-4.
    """
    value = tv_to_gaussian(EntryNoise(rank, 2.0, -2.0), variance).value
    joint = joint_tv_to_gaussian(rank, 1, covariance=variance).value
    assert value == pytest.approx(joint, rel=0, abs=1e-9)
    near = tv_to_gaussian(EntryNoise(rank, 1.0, 1.0 - 1e-9), variance).value
    assert near == pytest.approx(value, rel=0, abs=1e-4)


def test_falls_as_one_over_rank_and_not_with_inputs() -> None:
    """r·TV → E|He₄|/8 at ρ = 0, √r·TV → E|He₃|/12 times the skewness else (theory 2.4)."""
    law = EntryNoise(100_000)
    assert tv_to_gaussian(law).value * 1e5 == pytest.approx(0.350075, rel=2e-5, abs=0)
    skewed = EntryNoise(100_000, 1.0, 0.3)
    expected = 0.1258344 * (6 * 0.3 + 2 * 0.027) / 1.09**1.5 / math.sqrt(1e5)
    assert tv_to_gaussian(skewed).value == pytest.approx(expected, rel=1e-3, abs=0)
    limit = (
        0.5 * 0.09 / 1.0
    )  # the published variance leaves TV(N(0, 1.09), N(0, 1)) > .24 ρ² / 1.09
    published = tv_to_gaussian(skewed, "published").value
    assert 0.24 * 0.09 / 1.09 < published < limit


def test_kolmogorov_matches_draws_of_the_definition() -> None:
    """sup|F_n − Φ| of 400,000 draws of q(AᵀA − I) within the DKW band at level 1e-4.

    The distance to the other Gaussian must be rejected. m = 5 inputs, ρ = .8.
    """
    rng = np.random.default_rng(20240919)
    draws, rank = 400_000, 2
    q = np.array([0.8, 0.5, -0.3, 0.1, 0.1])
    q[1:] *= 0.6 / np.linalg.norm(q[1:])
    a = rng.standard_normal((draws, rank, 5)) / math.sqrt(rank)
    noise = np.einsum("sr,sr->s", a @ q, a[:, :, 0]) - q[0]
    band = math.sqrt(math.log(2 / 1e-4) / (2 * draws))
    value = {v: kolmogorov_to_gaussian(EntryNoise(rank, 1.0, 0.8), v).value for v in VARIANCES}
    for variance, other in (("exact", "published"), ("published", "exact")):
        scale = math.sqrt((1.64 if variance == "exact" else 1.0) / rank)
        seen = stats.kstest(noise, stats.norm(0, scale).cdf).statistic
        assert abs(seen - value[variance]) < band
        assert abs(seen - value[other]) > band


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("rank", [1, 8, 500, 100_000])
def test_all_entries_of_a_row_match_one_by_one(rank: int, variance: Variance) -> None:
    """Oracle: ``tv_to_gaussian``; 1e-7 relative. Equal, large, tiny and zero entries."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal(3000) * np.exp(2 * rng.standard_normal(3000))
    q[:5] = 0.0, 1e-30, 60.0, -60.0, 15.0
    values = tv_of_entries(q, rank, variance)
    assert values.shape == q.shape
    norm = float(np.linalg.norm(q))
    for i in [*range(5), *np.argsort(np.abs(q))[-4:], *rng.integers(5, 3000, 12)]:
        law = EntryNoise(rank, norm, float(q[i]))
        assert values[i] == pytest.approx(tv_to_gaussian(law, variance).value, rel=1e-7, abs=0)


def test_all_entries_of_a_row_are_scale_free() -> None:
    """No overflow at 1e300; a row of one non-zero entry has its χ² there and the pin elsewhere."""
    q = np.array([3.0, -1.0, 2.0])
    assert tv_of_entries(q * 1e300, 8) == pytest.approx(tv_of_entries(q, 8), rel=1e-12, abs=0)
    one = tv_of_entries([0.0, 7.0, 0.0], 8)
    assert one[[0, 2]] == pytest.approx(PINS[8], rel=0, abs=5.1e-7)
    assert one[1] == pytest.approx(joint_tv_to_gaussian(8, 1).value, rel=1e-9, abs=0)


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.0), (2, -0.7), (8, 0.3)])
@pytest.mark.parametrize("variance", VARIANCES)
def test_maximal_coupling(rank: int, rho: float, variance: Variance) -> None:
    """Each marginal passes KS at 1e-4, a Gaussian in X's place and a law 5 % wider do not.

    P[X ≠ Y] lies within 4.5 binomial errors of TV, and 10 % more does not.
    """
    law = EntryNoise(rank, 3.0, 3.0 * rho)
    size = 100_000
    x, y = maximal_coupling(law, np.random.default_rng(11), size, variance)
    scale = 3.0 * math.sqrt((1 + (rho**2 if variance == "exact" else 0)) / rank)
    gauss = stats.norm(0, scale)
    # 4,000 exact values joined by straight lines miss the CDF by far less than KS can see.
    grid = np.linspace(x.min() - scale, x.max() + scale, 4000)
    below = law.cdf(grid)
    assert stats.kstest(x, lambda at: np.interp(at, grid, below)).pvalue > 1e-4
    assert stats.kstest(y, gauss.cdf).pvalue > 1e-4
    assert stats.kstest(x, gauss.cdf).pvalue < 1e-4
    assert stats.kstest(y / 1.05, gauss.cdf).pvalue < 1e-4
    value = tv_to_gaussian(law, variance).value
    apart = float(np.mean(x != y))
    error = 4.5 * math.sqrt(value * (1 - value) / size)
    assert abs(apart - value) < error
    assert abs(apart - 1.1 * value) > error


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rank=st.one_of(st.integers(1, 12), st.integers(13, 100_000)),
    rho=st.one_of(
        st.floats(0, 1), st.floats(0, 0.05), st.floats(1e-12, 1e-3).map(lambda x: 1 - x)
    ),
    variance=st.sampled_from(VARIANCES),
)
def test_order_and_symmetry(rank: int, rho: float, variance: Variance) -> None:
    """Kolmogorov <= TV <= √(KL/2) (Pinsker), and the sign of ρ and the unit do not matter."""
    law, mirrored = EntryNoise(rank, 1.0, rho), EntryNoise(rank, 7.0, -7.0 * rho)
    value = tv_to_gaussian(law, variance).value
    assert kolmogorov_to_gaussian(law, variance).value <= value
    assert value**2 <= kl_to_gaussian(law, variance).value / 2
    assert tv_to_gaussian(mirrored, variance).value == pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("rank", [8, 1000, 10**5])
def test_the_error_of_kl_is_small_beside_it(rank: int) -> None:
    """What is promised, 1e-7 relative, is what is stated; values reach down to 1e-10."""
    for rho in (0.0, 0.3):
        found = kl_to_gaussian(EntryNoise(rank, 1.0, rho))
        assert 0 < found.error < 1e-6 * found.value


@pytest.mark.parametrize("distance", [tv_to_gaussian, kolmogorov_to_gaussian, kl_to_gaussian])
def test_the_reference_is_the_one_that_was_asked_for(distance: Callable[..., Distance]) -> None:
    """A distance is quoted with the Gaussian that it is to; both are in units of the law."""
    law = EntryNoise(8, 2.0, 1.0)
    assert distance(law).reference == "N(0, (‖q‖² + q_i²)/8)"
    assert distance(law, "published").reference == "N(0, ‖q‖²/8)"
    assert distance(law).value != distance(law, "published").value


def test_bad_input_is_named() -> None:
    """Each message says what must hold or what to use."""
    with pytest.raises(UnsupportedLawError, match=r"got Sample\. .*use EmpiricalNoise\.cdf"):
        tv_to_gaussian(type("Sample", (), {})())
    with pytest.raises(ValueError, match="variance must be one of"):
        kl_to_gaussian(EntryNoise(4), "paper")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="row must be finite"):
        tv_of_entries([1.0, math.nan], 4)
    with pytest.raises(ValueError, match="all zero"):
        tv_of_entries([0.0, 0.0], 4)
    with pytest.raises(ValueError, match="must be a vector"):
        tv_of_entries([[1.0]], 4)
    with pytest.raises(TypeError, match=r"must be a numpy\.random\.Generator"):
        maximal_coupling(EntryNoise(4), 3, 10)  # type: ignore[arg-type]
