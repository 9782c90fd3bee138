"""Proved bounds on the distance of an entry to a Gaussian, and the published ratio."""

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from lora_privacy.errors import NonFiniteError, UnsupportedLawError
from lora_privacy.noise import bounds
from lora_privacy.noise._stirling import digamma_remainder, log_gamma_remainder
from lora_privacy.noise.bounds import berry_esseen_bound, lyapunov_ratio, tv_bound
from lora_privacy.noise.distance import round_up
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import Variance, kolmogorov_to_gaussian, tv_to_gaussian

VARIANCES: tuple[Variance, ...] = ("exact", "published")
# Theory 2.5, ρ = 0, five decimals.
PINS = {1: 0.44472, 2: 0.20207, 4: 0.09465, 8: 0.04557, 16: 0.02233, 32: 0.01105, 64: 0.00550}
RANKS = [1, 2, 3, 8, 64, 3000]
RHOS = [0.0, 1e-9, 0.01, 0.1, 0.3, -0.5, 0.7, 0.95, 1 - 1e-9, 1.0]


@pytest.mark.parametrize(("rank", "expected"), PINS.items())
@pytest.mark.parametrize("variance", VARIANCES)
def test_pins(rank: int, expected: float, variance: Variance) -> None:
    """Oracle: theory 2.5; half a unit of the fifth decimal."""
    bound = tv_bound(EntryNoise(rank), variance)
    assert bound.value == pytest.approx(expected, rel=0, abs=5.1e-6)
    assert bound.kind == "upper bound"


@pytest.mark.parametrize("rank", [1, 9, 31, 32, 33, 200_000])
def test_centred_bound_matches_mpmath_and_is_rounded_up(rank: int) -> None:
    """Oracle: E|He₄|/8 by quadrature and ψ, at 40 digits; above it by at most 2e-10 relative."""
    with mp.workdps(40):
        roots = [mp.sqrt(3 - mp.sqrt(6)), mp.sqrt(3 + mp.sqrt(6))]
        area = mp.quad(lambda x: abs(x**4 - 6 * x**2 + 3) * mp.npdf(x), [0, *roots, 8, 16, mp.inf])
        expected = area / 4 * (mp.log(mp.mpf(rank) / 2) - mp.digamma(mp.mpf(rank) / 2))
        ratio = mp.mpf(tv_bound(EntryNoise(rank)).value) / expected
    assert 1 <= ratio <= 1 + 2e-10


@pytest.mark.parametrize(("rank", "rho"), [(64, 0.3), (1000, -0.2), (100_000, 0.45)])
def test_mixture_bound_matches_its_proof(rank: int, rho: float) -> None:
    """Oracle: each step of the proof (section 2.2) by quadrature, not by its closed form; 1e-8."""
    with mp.workdps(25):
        r, p = mp.mpf(rank), abs(mp.mpf(rho))
        he3 = 2 * mp.quad(lambda x: abs(x**3 - 3 * x) * mp.npdf(x), [0, mp.sqrt(3), 8, 20])
        he4 = 8 * mp.mpf("0.35007503760372954")
        spread = mp.log(r / 2) - mp.digamma(r / 2)
        a2 = 1 - p**2
        variance_step = he4 / 4 * spread + (a2 * p / mp.sqrt(r)) * he3 / a2**1.5
        smoothing = mp.quad(lambda u: (a2 + 2 * (1 - u) * p**2) ** mp.mpf(-1.5), [0, 1])
        mean_step = (8 * p**3 / mp.sqrt(r) / 6) * he3 * smoothing
        expected = float((variance_step + mean_step) / 2)
    assert tv_bound(EntryNoise(rank, 1.0, rho)).value == pytest.approx(expected, rel=1e-8, abs=0)


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("variance", VARIANCES)
def test_entropy_bound_matches_its_definition(rank: int, variance: Variance) -> None:
    """At |ρ| = 1 the bound is √(KL/2). Oracle: ∫ p ln(p/φ) of the χ² law by quadrature; 1e-7."""
    law = stats.chi2(rank)
    spread = math.sqrt(2 * rank if variance == "exact" else rank)

    def term(z: float) -> float:  # x = z² tames the density at 0
        x = z * z
        gap = law.logpdf(x) - stats.norm.logpdf(x, rank, spread)
        return 2 * z * law.pdf(x) * gap

    top = math.sqrt(law.isf(1e-25))
    kl = integrate.quad(term, 1e-12, top, points=[math.sqrt(rank)], epsabs=1e-12, limit=300)[0]
    pinsker = math.sqrt(kl / 2)
    if variance == "published":  # the other reading adds a distance instead of an entropy
        assert tv_bound(EntryNoise(rank, 1.0, 1.0), variance).value <= pinsker * (1 + 1e-7)
        return
    bound = tv_bound(EntryNoise(rank, 1.0, 1.0), variance).value
    assert bound == pytest.approx(pinsker, rel=1e-7, abs=0)


@pytest.mark.parametrize("k", [0.5, 1.0, 3.5, 15.5, 16.0, 16.5, 1000.0, 5e5])
def test_remainders_match_mpmath(k: float) -> None:
    """Oracle: mpmath at 50 digits; 1e-12 of what they are added to."""
    with mp.workdps(50):
        x = mp.mpf(k)
        gamma = mp.loggamma(x) - ((x - 0.5) * mp.log(x) - x + mp.log(2 * mp.pi) / 2)
        digamma = mp.log(x) - 1 / (2 * x) - mp.digamma(x)
        assert abs(log_gamma_remainder(k) - gamma) * k < 1e-12
        assert abs(digamma_remainder(k) - digamma) * k * k < 1e-12


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_covers_the_exact_distance_and_is_no_idle_one(
    rank: int, rho: float, variance: Variance
) -> None:
    """Oracle: ``tv_to_gaussian``, whose oracle is quadrature; within a factor of 2.8."""
    law = EntryNoise(rank, 2.0, 2.0 * rho)
    exact, bound = tv_to_gaussian(law, variance).value, tv_bound(law, variance).value
    assert exact <= bound <= min(1.0, 2.8 * exact)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rank=st.one_of(st.integers(1, 20), st.integers(21, 100_000)),
    rho=st.one_of(st.floats(0, 1), st.floats(0, 1).map(lambda x: x**4)),
    variance=st.sampled_from(VARIANCES),
)
def test_bound_is_sound_everywhere(rank: int, rho: float, variance: Variance) -> None:
    """Oracle: ``tv_to_gaussian``; NaN would fail the comparison."""
    law = EntryNoise(rank, 1.0, rho)
    assert tv_to_gaussian(law, variance).value <= tv_bound(law, variance).value <= 1.0


@pytest.mark.parametrize("rho", [1e-5, 1e-3, 0.03, 0.4, 1.0])
def test_published_variance_adds_a_floor(rho: float) -> None:
    """As r grows the bound tends to TV(N(0, 1 + ρ²), N(0, 1)). Oracle: ½∫|p − q| by quadrature."""
    wide = stats.norm(0, math.sqrt(1 + rho**2))
    with mp.workdps(30):
        std = mp.sqrt(1 + mp.mpf(rho) ** 2)
        cut = std * mp.sqrt(mp.log(std**2) / (std**2 - 1))
        expected = float(2 * (mp.ncdf(cut) - mp.ncdf(cut / std)))
    grid = np.linspace(-9, 9, 200_001)
    plain = 0.5 * integrate.trapezoid(np.abs(wide.pdf(grid) - stats.norm.pdf(grid)), grid)
    assert expected == pytest.approx(plain, rel=1e-4, abs=1e-12)
    law = EntryNoise(10**12, 1.0, rho)
    added = tv_bound(law, "published").value - tv_bound(law, "exact").value
    assert added == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("rank", [1, 4, 64, 3000])
@pytest.mark.parametrize("rho", [0.0, 0.1, -0.6, 0.999, 1.0])
def test_berry_esseen_covers_the_exact_distance(rank: int, rho: float) -> None:
    """Oracle: ``kolmogorov_to_gaussian``."""
    law = EntryNoise(rank, 3.0, 3.0 * rho)
    assert kolmogorov_to_gaussian(law).value <= berry_esseen_bound(law).value <= 1.0


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.8, 0.999, 1.0])
def test_berry_esseen_ratio(rho: float) -> None:
    """β₃ of one term, whose law is the entry's at rank 1. Oracle: E|ξ|³ by quadrature; 1e-8.

    For ρ = 1 the term is z² − 1 and the oracle integrates over z.
    """
    if rho == 1.0:
        cube = 2 * sum(
            integrate.quad(lambda z: abs(z * z - 1) ** 3 * stats.norm.pdf(z), a, b, epsabs=1e-13)[
                0
            ]
            for a, b in ((0, 1), (1, 16))
        )
    else:
        one = EntryNoise(1, 1.0, rho)
        points = [-60.0, -20.0, -5.0, -2.0, -1.0, -rho - 1e-3, -rho, -rho + 1e-3, 0.0, 0.5]
        points += [2.0, 6.0, 20.0, 100.0, 200.0]
        cube = sum(
            integrate.quad(lambda x: abs(x) ** 3 * float(one.pdf(x)), a, b, epsabs=1e-12)[0]
            for a, b in itertools.pairwise(sorted(set(points)))
        )
    beta = cube / (1 + rho**2) ** 1.5
    bound = berry_esseen_bound(EntryNoise(900, 1.0, rho)).value
    assert bound == pytest.approx(0.469 * beta / 30, rel=1e-8, abs=0)
    if rho == 0.0:
        assert beta == pytest.approx(8 / math.pi, rel=1e-8, abs=0)


@pytest.mark.parametrize("split", ["products", "columns"])
def test_lyapunov_ratio_matches_its_definition(split: str) -> None:
    """Σ E|ξ|³/(Σ Var ξ)^{3/2} of draws of A, within 4.5 standard errors.

    Rejected: 5 % more, and the published shape, whose variance ‖q‖²/r is not that of the sum.
    """
    rng = np.random.default_rng(20240920)
    q, rank, draws = np.array([2.0, -1.0, 0.5, 1.0]), 3, 400_000
    a = rng.standard_normal((draws, rank, 4)) / math.sqrt(rank)
    # Entry i = 0, without its own term.
    terms = a[:, :, :1] * a[:, :, 1:] * q[1:]
    if split == "columns":
        terms = terms.sum(axis=1, keepdims=True)
    total = np.square(terms).sum(axis=(1, 2))
    variance = (q[1:] @ q[1:]) / rank
    assert abs(total.mean() - variance) < 4.5 * total.std() / math.sqrt(draws)
    cubes = (np.abs(terms) ** 3).sum(axis=(1, 2)) / variance**1.5
    value = lyapunov_ratio(q, rank, split, index=0)  # type: ignore[arg-type]
    error = 4.5 * cubes.std() / math.sqrt(draws)
    assert abs(cubes.mean() - value) < error
    assert abs(cubes.mean() - 1.05 * value) > error
    published = value * (1 - q[0] ** 2 / (q @ q)) ** 1.5
    assert abs(cubes.mean() - published) > error


@pytest.mark.parametrize("split", ["products", "columns"])
def test_lyapunov_ratio_has_no_unit_and_leaves_the_entry_out(split: str) -> None:
    """q_i is in neither sum; .4502 by hand for (3, 1, 1, 1, 1), (8/π)/√8 · 4/8."""
    value = lyapunov_ratio([3.0, 1.0, 1.0, 1.0, 1.0], 8, split, index=0)  # type: ignore[arg-type]
    for row in ([0.0, 1.0, 1.0, 1.0, 1.0], [7e200, 1e-200, 1e-200, -1e-200, 1e-200]):
        again = lyapunov_ratio(row, 8, split, index=0)  # type: ignore[arg-type]
        assert again == pytest.approx(value, rel=1e-14, abs=0)
    short = lyapunov_ratio([1.0, 1.0, 1.0, 1.0], 8, split)  # type: ignore[arg-type]
    assert short == pytest.approx(value, rel=1e-14, abs=0)
    if split == "products":
        assert value == pytest.approx(4 / (math.pi * math.sqrt(8)), rel=1e-14, abs=0)


def test_published_ratio_is_no_bound() -> None:
    """For any constant C, C·L₃ falls below the distance as m grows; the distance does not move.

    The row has equal entries but a zero, so that ρ = 0 at every m. Rank 8; C = 100.
    """
    exact = tv_to_gaussian(EntryNoise(8)).value
    ratios = []
    for inputs in (10, 1000, 100_000, 10_000_000):
        row = np.ones(inputs)
        row[0] = 0.0
        ratios.append(100 * lyapunov_ratio(row, 8, index=0))
        assert ratios[-1] == pytest.approx(
            100 * 8 / math.pi / math.sqrt(8 * (inputs - 1)), rel=1e-9, abs=0
        )
    assert ratios[0] > exact > ratios[-1]
    assert exact == pytest.approx(0.041378, rel=0, abs=5.1e-7)


def test_columns_do_not_fall_with_rank() -> None:
    """2√(2/π) is what remains of the factor; products fall as r^{-1/2}."""
    row = np.ones(100)
    high = lyapunov_ratio(row, 100_000, "columns")
    assert high == pytest.approx(2 * math.sqrt(2 / math.pi) / 10, rel=1e-4, abs=0)
    assert lyapunov_ratio(row, 100_000) == pytest.approx(
        lyapunov_ratio(row, 10) / 100, rel=1e-12, abs=0
    )


def test_the_reference_is_the_one_that_was_asked_for() -> None:
    """A bound is quoted with the Gaussian whose distance it bounds."""
    law = EntryNoise(8, 2.0, 1.0)
    assert tv_bound(law).reference == "N(0, (‖q‖² + q_i²)/8)"
    assert tv_bound(law, "published").reference == "N(0, ‖q‖²/8)"
    assert berry_esseen_bound(law).reference == "N(0, (‖q‖² + q_i²)/8)"


def test_bad_input_is_named() -> None:
    """Each message says what must hold or what to use."""
    with pytest.raises(UnsupportedLawError, match="needs EntryNoise"):
        tv_bound(object())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLawError, match="needs EntryNoise"):
        berry_esseen_bound(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance must be one of"):
        tv_bound(EntryNoise(4), "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split must be one of"):
        lyapunov_ratio([1.0], 4, "rows")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="row must be finite"):
        lyapunov_ratio([1.0, math.inf], 4)
    with pytest.raises(ValueError, match="all zero"):
        lyapunov_ratio([0.0], 4)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 1\], got 2"):
        lyapunov_ratio([1.0, 2.0], 4, index=2)
    for row in ([0.0, -2.0], [-2.0]):
        with pytest.raises(ValueError, match=r"besides index \d, got none.*0/0"):
            lyapunov_ratio(row, 4, index=len(row) - 1)


def test_bound_prints_rounded_up() -> None:
    """Six digits, never below the value: .0455716106 prints as .0455717."""
    text = str(tv_bound(EntryNoise(8)))
    assert "≤ 0.0455717 (proved upper bound, Taylor expansion of a Gaussian mixture)" in text


@pytest.mark.parametrize("rho", [0.05, 0.4, 0.99])
def test_the_third_moment_of_one_term(rho: float) -> None:
    """Oracle: E|ξ|³ given z, where ξ ~ N(ρ(z² − 1), (1 − ρ²)z²), by scipy's quadrature; 1e-12."""
    a = math.sqrt(1 - rho * rho)

    def term(z: float) -> float:
        mean, std = rho * (z * z - 1), a * z
        t = mean / std
        cube = mean * (mean**2 + 3 * std**2) * math.erf(t / math.sqrt(2))
        cube += 2 * std * (mean**2 + 2 * std**2) * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        return 2 * cube * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    edges = [1e-14, 1 - 2 * a if a < 0.4 else 0.3, 1 - a / 2, 1.0, 1 + a / 2, 1 + 2 * a, 4, 7, 15]
    pieces = itertools.pairwise(edges)
    cube = sum(integrate.quad(term, *piece, epsabs=0, epsrel=1e-13)[0] for piece in pieces)
    expected = cube / (1 + rho * rho) ** 1.5
    assert bounds._third_moment_ratio(rho) == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_third_moment_at_the_ends() -> None:
    """Of a product of two Gaussians, 8/π, and of z² − 1, by mpmath; 1e-14."""
    assert bounds._third_moment_ratio(0.0) == pytest.approx(8 / math.pi, rel=1e-14)
    with mp.workdps(30):
        cube = 2 * mp.quad(lambda z: abs(z * z - 1) ** 3 * mp.npdf(z), [0, 1, 4, 10, 20])
        expected = float(cube / mp.sqrt(8))
    assert bounds._third_moment_ratio(1.0) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("rho", [1e-12, 9e-9, 1.1e-8])
def test_two_gaussians_that_hardly_differ(rho: float) -> None:
    """Never below the distance, and above it by 4 % at most where its crossing would cancel."""
    with mp.workdps(60):
        square = mp.mpf(rho) ** 2
        cut = mp.sqrt((1 + 1 / square) * mp.log1p(square))
        true = mp.erf(cut / mp.sqrt(2)) - mp.erf(cut / mp.sqrt(2 * (1 + square)))
    found = bounds._between_gaussians(rho)
    if rho < 1e-8:
        assert true <= found <= mp.mpf("1.04") * true
    else:
        assert abs(found - true) < 2e-16


def test_a_published_bound_takes_the_lesser_way() -> None:
    """What the other variance adds, to a distance or to an entropy: each is less somewhere."""
    ways = set[bool]()
    for rank, rho in ((1, 1.0), (8, 0.9), (10**6, 0.05), (100, 0.999)):
        entropy = bounds._pinsker(rank)
        moved = math.sqrt(entropy**2 + (rho**2 - math.log1p(rho**2)) / 4)
        added = entropy + bounds._between_gaussians(rho)
        found = tv_bound(EntryNoise(rank, 1.0, rho), "published").value
        assert found <= min(moved, added) * (1 + 2e-10)
        ways.add(moved < added)
    assert ways == {True, False}


def test_a_value_is_rounded_up_by_its_margin() -> None:
    """1e-10 of it, and one step at least."""
    assert round_up(0.3) == pytest.approx(0.3 * (1 + 1e-10), rel=1e-15)
    assert round_up(5e-324) > 5e-324
