"""The exact law of one entry, against mpmath oracles of their own and draws of the definition."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
from entry_oracle import even_upper, log_bessel_density, odd_upper, upper_tail
from scipy import stats

from lora_privacy.errors import ConvergenceError
from lora_privacy.noise import EntryNoise, _quadrature

RANKS = [1, 2, 3, 8, 64, 1024]
RHOS = [0.0, 0.3, -0.3, 0.99, 1.0]
CASES = [(rank, rho) for rank in RANKS for rho in RHOS]
DEPTHS = [0.4, 1e-10, 1e-100]
SAMPLES = 2_000


@pytest.mark.parametrize(("rank", "rho"), CASES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_upper_tail_matches_mpmath(rank: int, rho: float, depth: float) -> None:
    """Oracle: finite sum (even rank), averaged erfc (odd), Γ (ρ = 1); 1e-10 relative."""
    law = EntryNoise(rank, 1.0, rho)
    x = float(law.isf(depth))
    with mp.workdps(40):
        expected = upper_tail(rank, rho, x)
        assert float(law.sf(x)) == pytest.approx(float(expected), rel=1e-10, abs=0)
        assert float(expected) == pytest.approx(depth, rel=1e-9, abs=0)


@pytest.mark.parametrize(("rank", "rho"), CASES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_lower_tail_matches_mpmath(rank: int, rho: float, depth: float) -> None:
    """The same oracle, as 1 - upper with 150 more digits, so that nothing cancels."""
    law = EntryNoise(rank, 1.0, rho)
    # At ρ = 1 the support ends at -1, and S = 1 + x below 1e-6 is no longer a double's business.
    x = max(float(law.ppf(depth)), -1.0 + 1e-6 if rho == 1.0 else -math.inf)
    with mp.workdps(190 if rank % 2 == 0 or rho == 1.0 else 40):
        t = rank * (mp.mpf(x) + mp.mpf(rho))
        if rho < 1.0 and t < 0:
            beyond = even_upper if rank % 2 == 0 else odd_upper
            expected = beyond(rank, -mp.mpf(rho), -t)
        elif rho == 1.0:
            k = mp.mpf(rank) / 2
            expected = mp.gammainc(k, 0, k * (1 + mp.mpf(x)), regularized=True)
        else:
            expected = 1 - upper_tail(rank, rho, x)
        assert float(law.cdf(x)) == pytest.approx(float(expected), rel=1e-10, abs=0)


@pytest.mark.parametrize(("rank", "rho"), CASES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_density_matches_mpmath(rank: int, rho: float, depth: float) -> None:
    """Oracle: K_ν at 40 digits, or the gamma density at ρ = 1; 1e-10 relative."""
    law = EntryNoise(rank, 1.0, rho)
    for x in (float(law.isf(depth)), max(float(law.ppf(depth)), -1 + 1e-6)):
        with mp.workdps(40):
            if rho == 1.0:
                k, s = mp.mpf(rank) / 2, 1 + mp.mpf(x)
                log_density = k * mp.log(k) - mp.loggamma(k) + (k - 1) * mp.log(s) - k * s
            else:
                t = rank * (mp.mpf(x) + mp.mpf(rho))
                log_density = mp.log(rank) + log_bessel_density(rank, mp.mpf(rho), t)
            expected = float(mp.exp(log_density))
        assert float(law.pdf(x)) == pytest.approx(expected, rel=1e-10, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize(("rho", "z"), [(0.0, 0.5), (0.6, -3.0), (0.6, 12.0)])
def test_huge_rank(rho: float, z: float) -> None:
    """Rank 10⁵ against the finite sum at 60 digits; 1e-10 relative."""
    rank, law = 100_000, EntryNoise(100_000, 1.0, rho)
    x = z * law.std()
    with mp.workdps(60):
        t = rank * (mp.mpf(x) + mp.mpf(rho))
        if t >= 0:
            above = even_upper(rank, mp.mpf(rho), t)
        else:
            above = 1 - even_upper(rank, -mp.mpf(rho), -t)
        below = 1 - above
    assert float(law.sf(x)) == pytest.approx(float(above), rel=1e-10, abs=0)
    assert float(law.cdf(x)) == pytest.approx(float(below), rel=1e-10, abs=0)


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.3), (3, 0.9), (64, 0.999), (4096, 0.1)])
def test_density_is_the_slope_of_the_cdf(rank: int, rho: float) -> None:
    """Bessel density and contour integral share no formula; Gauss–Legendre over one σ, 1e-12."""
    law = EntryNoise(rank, 2.0, 2.0 * rho)
    low = 0.2 * law.std()
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = low + law.std() * (1 + nodes) / 2
    mass = float(weights @ law.pdf(x)) * law.std() / 2
    between = float(law.sf(low) - law.sf(low + law.std()))
    assert mass == pytest.approx(between, rel=1e-12, abs=0)


@pytest.mark.parametrize(("rank", "rho"), [*CASES, (8, -1.0), (100_000, 0.2), (1, 1 - 1e-9)])
def test_ppf_and_isf_invert(rank: int, rho: float) -> None:
    """Inverting returns the probability, 1e-11 relative, where the support does not end."""
    law = EntryNoise(rank, 3.0, 3.0 * rho)
    p = np.array([1e-250, 1e-20, 0.01, 0.3, 0.5, 0.77, 1 - 1e-8])
    p = p[p < 0.999] if abs(rho) == 1.0 else p  # the support ends; see the next test
    if rho != -1.0:
        assert law.sf(law.isf(p)) == pytest.approx(p, rel=1e-11, abs=0)
    if abs(rho) < 0.99:
        assert law.cdf(law.ppf(p)) == pytest.approx(p, rel=1e-11, abs=0)
    assert law.ppf(0.3) == pytest.approx(law.isf(0.7), rel=1e-12)


def test_ends_of_the_quantile_function() -> None:
    """0 and 1 give the ends of the support, which is half a line at |ρ| = 1."""
    assert EntryNoise(4).ppf([0.0, 1.0]).tolist() == [-math.inf, math.inf]
    assert EntryNoise(4).isf([0.0, 1.0]).tolist() == [math.inf, -math.inf]
    assert EntryNoise(4, 2.0, 2.0).ppf([0.0, 1.0]).tolist() == [-2.0, math.inf]
    assert EntryNoise(4, 2.0, -2.0).ppf([0.0, 1.0]).tolist() == [-math.inf, 2.0]
    assert EntryNoise(4, 2.0, -2.0).cdf([-math.inf, 2.0, math.inf]).tolist() == [0.0, 1.0, 1.0]
    assert EntryNoise(4).sf([-math.inf, math.inf]).tolist() == [1.0, 0.0]
    assert EntryNoise(4).pdf([-math.inf, math.inf]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("rank", "rho"), CASES)
def test_law_matches_its_definition(rank: int, rho: float) -> None:
    """KS at level 1e-4 on draws of q (AᵀA - I) itself; a law 40 % too wide must be rejected."""
    rng = np.random.default_rng(20240917)
    q = np.array([rho, math.sqrt(1 - rho**2)])
    draws = SAMPLES if rank < 1000 else SAMPLES // 2
    a = rng.standard_normal((draws, rank, 2)) / math.sqrt(rank)
    noise = np.einsum("ski,skj,j->si", a, a, q)[:, 0] - rho
    law = EntryNoise(rank, 1.0, rho)
    assert stats.kstest(noise, law.cdf).pvalue > 1e-4
    assert stats.kstest(noise, lambda x: law.cdf(x / 1.4)).pvalue < 1e-4


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.0), (8, -0.4), (8, 1.0)])
def test_own_draws_match_the_cdf(rank: int, rho: float) -> None:
    """KS at level 1e-4 on rvs; the mirrored law must be rejected where it differs."""
    law = EntryNoise(rank, 5.0, 5.0 * rho)
    noise = law.rvs((20, 100), np.random.default_rng(5))
    assert noise.shape == (20, 100)
    assert stats.kstest(noise.ravel(), law.cdf).pvalue > 1e-4
    if rho:
        assert stats.kstest(-noise.ravel(), law.cdf).pvalue < 1e-4


@pytest.mark.parametrize("rho", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("rank", [1, 6])
def test_moments_are_those_of_two_gammas(rank: int, rho: float) -> None:
    """Oracle: cumulants of scaled χ², (n-1)! 2^(n-1) r cⁿ each, added; 1e-14 relative."""
    law = EntryNoise(rank, 2.0, 2.0 * rho)
    scales = (2.0 * (1 + rho) / (2 * rank), -2.0 * (1 - rho) / (2 * rank))
    cumulant = {
        n: math.factorial(n - 1) * 2 ** (n - 1) * rank * sum(c**n for c in scales)
        for n in (1, 2, 3, 4)
    }
    assert law.mean() == cumulant[1] - 2.0 * rho == 0
    assert law.var() == pytest.approx(cumulant[2], rel=1e-14)
    assert law.std() == pytest.approx(math.sqrt(cumulant[2]), rel=1e-14)
    assert law.skewness() == pytest.approx(cumulant[3] / cumulant[2] ** 1.5, rel=1e-14)
    assert law.kurtosis() == pytest.approx(3 + cumulant[4] / cumulant[2] ** 2, rel=1e-14)


def test_kurtosis_at_right_angle() -> None:
    """The pin of the theory: excess 6/r."""
    assert EntryNoise(8).kurtosis() == 3 + 6 / 8


def test_scale_and_mirror() -> None:
    """Law of c·q is c times the law of q, also for extreme norms, and ρ → -ρ mirrors it."""
    x = np.array([-0.7, 0.0, 0.4])
    base = EntryNoise(5, 1.0, 0.25)
    for norm in (1e-150, 3.0, 1e150):
        law = EntryNoise(5, norm, 0.25 * norm)
        assert law.cdf(x * norm) == pytest.approx(base.cdf(x), rel=1e-13)
        assert law.pdf(x * norm) * norm == pytest.approx(base.pdf(x), rel=1e-13)
    mirrored = EntryNoise(5, 1.0, -0.25)
    assert mirrored.sf(-x) == pytest.approx(base.cdf(x), rel=1e-13)
    assert mirrored.pdf(-x) == pytest.approx(base.pdf(x), rel=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3, 70])
def test_density_at_the_special_point(rank: int) -> None:
    """At x = -ρ: infinite at rank 1, else Γ((r-1)/2) r (1-ρ²)^(r/2-1) / (2√π Γ(r/2))."""
    rho = 0.4
    value = float(EntryNoise(rank, 1.0, rho).pdf(-rho))
    if rank == 1:
        assert value == math.inf
        return
    ratio = math.exp(math.lgamma((rank - 1) / 2) - math.lgamma(rank / 2))
    expected = rank * ratio * (1 - rho**2) ** (rank / 2 - 1) / (2 * math.sqrt(math.pi))
    assert value == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "rank must be at least 1"),
        ((2, 0.0), "norm must be positive"),
        ((2, math.nan), "norm must be positive"),
        ((2, math.inf), "norm must be positive"),
        ((2, 1.0, 1.1), "coord must lie in"),
        ((2, 1.0, math.nan), "coord must lie in"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[float, ...], message: str) -> None:
    """Fail closed, with what must hold."""
    with pytest.raises(ValueError, match=message):
        EntryNoise(*arguments)


def test_a_coordinate_may_exceed_its_norm_by_rounding() -> None:
    """A norm summed in another order is off by a few last places; ρ stays in [-1, 1]."""
    for coord in (1.0 + 2e-15, -1.0 - 2e-15):
        assert EntryNoise(4, 1.0, coord).rho == math.copysign(1.0, coord)
    for coord in (1.0 + 1e-14, -1.0 - 1e-14):
        with pytest.raises(ValueError, match="coord must lie in"):
            EntryNoise(4, 1.0, coord)


def test_nan_never_passes() -> None:
    """NaN in x or in a probability raises; a rank that is no integer is a TypeError."""
    law = EntryNoise(2)
    for method in (law.pdf, law.logpdf, law.cdf, law.sf):
        with pytest.raises(ValueError, match="NaN"):
            method([0.0, math.nan])
    for method in (law.ppf, law.isf):
        for bad in (math.nan, -1e-9, 1.1):
            with pytest.raises(ValueError, match="probability must lie"):
                method(bad)
    with pytest.raises(TypeError, match="rank must be an integer"):
        EntryNoise(2.0)


def test_a_missed_tolerance_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value comes out when the two trapezoidal sums do not agree."""
    monkeypatch.setattr(_quadrature, "_AGREEMENT", -1.0)
    with pytest.raises(ConvergenceError, match="missed its tolerance"):
        EntryNoise(3).cdf(0.5)


def test_shapes_broadcast() -> None:
    """The shape of the result is the shape of the argument, the empty one too."""
    law = EntryNoise(3, 1.0, 0.2)
    for shape in ((), (0,), (2, 3)):
        x = np.full(shape, 0.1)
        for method in (law.pdf, law.logpdf, law.cdf, law.sf, law.ppf, law.isf):
            assert method(x).shape == shape
