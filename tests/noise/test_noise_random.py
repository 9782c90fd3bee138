"""Laws and bounds at random points with all their digits, against mpmath.

Grids of round numbers miss what happens at a fraction of a step, and on both sides of a switch
between two formulas.
"""

import math

import mpmath as mp
import numpy as np
import pytest
from entry_oracle import even_upper, log_bessel_density

from lora_privacy.noise import EntryNoise, jl_distortion, jl_failure, jl_probability, tv_bound
from lora_privacy.noise._density import chi_square_logpdf
from lora_privacy.noise._stirling import digamma_remainder, log_gamma_remainder

POINTS = 150


def laws(rng: np.random.Generator, size: int = POINTS) -> list[tuple[int, float, float]]:
    """Even ranks, any ρ, also next to ±1, and x in standard deviations."""
    ranks = 2 * np.exp(rng.uniform(0.0, math.log(300.0), size)).astype(int)
    rho = rng.uniform(-1.0, 1.0, size)
    close = rng.uniform(size=size) < 0.3
    rho = np.where(close, np.sign(rho) * (1 - 10.0 ** -rng.uniform(1, 9, size)), rho)
    return list(
        zip(ranks.tolist(), rho.tolist(), rng.normal(0.0, 4.0, size).tolist(), strict=True)
    )


def test_densities() -> None:
    """Gaunt's density by the finite sum for K; 1e-11 of a logarithm of size 1, else relative."""
    for rank, rho, z in laws(np.random.default_rng(1)):
        law = EntryNoise(rank, 1.0, rho)
        x = z * law.std()
        with mp.workdps(60):
            t = rank * (mp.mpf(x) + mp.mpf(rho))
            expected = mp.log(rank) + log_bessel_density(rank, mp.mpf(rho), t)
        assert float(law.logpdf(x)) == pytest.approx(float(expected), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.8])
def test_densities_at_a_large_rank(rho: float) -> None:
    """Where terms of the size of the rank combine into a small one, by the same sum; 3e-11."""
    law = EntryNoise(20_000, 1.0, rho)
    for z in (-6.1, -2.3, -0.7, 0.4, 1.9, 3.3, 6.7):
        x = z * law.std()
        with mp.workdps(60):
            t = 20_000 * (mp.mpf(x) + mp.mpf(rho))
            expected = mp.log(20_000) + log_bessel_density(20_000, mp.mpf(rho), t)
        assert float(law.logpdf(x)) == pytest.approx(float(expected), rel=0, abs=3e-11)


def test_tails() -> None:
    """Both of them, relative, by the finite sum of even ranks at 400 digits."""
    for rank, rho, z in laws(np.random.default_rng(2), POINTS // 2):
        law = EntryNoise(rank, 1.0, rho)
        x = z * law.std()
        with mp.workdps(400):
            t = rank * (mp.mpf(x) + mp.mpf(rho))
            if t >= 0:
                above = even_upper(rank, mp.mpf(rho), t)
                below = 1 - above
            else:
                below = even_upper(rank, -mp.mpf(rho), -t)
                above = 1 - below
            above, below = float(above), float(below)
        if min(above, below) > 1e-290:
            assert float(law.sf(x)) == pytest.approx(above, rel=1e-10, abs=0)
            assert float(law.cdf(x)) == pytest.approx(below, rel=1e-10, abs=0)


def test_quantiles() -> None:
    """They return the probability that was asked for, by the same sum."""
    rng = np.random.default_rng(3)
    for rank, rho, _ in laws(rng, POINTS // 3):
        law, p = EntryNoise(rank, 1.0, rho), float(np.exp(rng.uniform(-200, -0.1)))
        x = float(law.isf(p))
        with mp.workdps(400):
            t = rank * (mp.mpf(x) + mp.mpf(rho))
            above = (
                even_upper(rank, mp.mpf(rho), t)
                if t >= 0
                else 1 - even_upper(rank, -mp.mpf(rho), -t)
            )
        # Rounding of x, and of x + ρ, moves the tail by its hazard, at most r/(1 - |ρ|).
        moved = 1e-15 * rank * (1 + abs(x)) / (1 - abs(rho))
        assert float(above) == pytest.approx(p, rel=1e-12 + moved, abs=0)


def test_scale_of_a_row() -> None:
    """Log density of χ²_r/r − 1 at 40 digits, on both sides of the switch to Stirling's series."""
    rng = np.random.default_rng(4)
    for rank in np.unique(np.exp(rng.uniform(0, math.log(1e6), POINTS)).astype(int)).tolist():
        y = float(max(rng.normal(0.0, 3.0) * math.sqrt(2 / rank), -0.999))
        with mp.workdps(40):
            k, s = mp.mpf(rank) / 2, 1 + mp.mpf(y)
            expected = k * mp.log(k) - mp.loggamma(k) + (k - 1) * mp.log(s) - k * s
        found = float(chi_square_logpdf(rank, y))
        assert found == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_remainders_of_stirling() -> None:
    """Relative where the series is used, from 16 on; below of what cancels."""
    rng = np.random.default_rng(5)
    for k in np.exp(rng.uniform(math.log(0.5), math.log(1e6), POINTS)).tolist():
        with mp.workdps(50):
            x = mp.mpf(k)
            gamma = mp.loggamma(x) - ((x - 0.5) * mp.log(x) - x + mp.log(2 * mp.pi) / 2)
            digamma = mp.log(x) - 1 / (2 * x) - mp.digamma(x)
        loose = 1e-13 * (1 + k * abs(math.log(k))) if k < 16 else 0.0
        assert log_gamma_remainder(k) == pytest.approx(float(gamma), rel=3e-13, abs=loose)
        assert digamma_remainder(k) == pytest.approx(float(digamma), rel=3e-13, abs=loose)


def test_distortions() -> None:
    """Failures are never below the two exact χ² tails, and 1e-10 above at most."""
    rng = np.random.default_rng(6)
    for rank in np.exp(rng.uniform(0, math.log(2000), POINTS)).astype(int).tolist():
        tau, vectors = float(rng.uniform(0.01, 2.0)), int(np.exp(rng.uniform(0, 10)))
        with mp.workdps(50):
            k, t = mp.mpf(rank) / 2, mp.mpf(tau)
            low = k * max(mp.mpf(0), 1 - t) ** 2
            one = mp.gammainc(k, 0, low, regularized=True)
            one += mp.gammainc(k, k * (1 + t) ** 2, mp.inf, regularized=True)
        true, found = vectors * one, jl_failure(rank, tau, vectors)
        assert min(true, 1) <= found + 1e-299 <= true * (1 + mp.mpf("1e-10")) + 2e-299
        assert max(1 - true - 1e-11, 0) <= jl_probability(rank, tau, vectors) <= max(1 - true, 0)
        wanted = float(rng.uniform(1e-6, 0.5))
        least = jl_distortion(rank, wanted, vectors)
        assert jl_failure(rank, least, vectors) <= wanted
        assert jl_failure(rank, least * (1 - 1e-9), vectors) > wanted * (1 - 1e-6)


@pytest.mark.parametrize("variance", ["exact", "published"])
def test_bounds_on_the_total_variation(variance: str) -> None:
    """The lesser of both bounds of the page, evaluated at 50 digits: never below, 1e-9 above."""
    rng = np.random.default_rng(7)
    ranks = np.exp(rng.uniform(0, math.log(1e6), POINTS)).astype(int).tolist()
    with mp.workdps(50):
        phi = mp.npdf
        roots = [mp.sqrt(3 - mp.sqrt(6)), mp.sqrt(3 + mp.sqrt(6))]
        he3 = 8 * phi(mp.sqrt(3)) + 2 * phi(0)  # the primitive of Heₙ φ is −Heₙ₋₁ φ
        he4 = 4 * sum(abs(x**3 - 3 * x) * phi(x) for x in roots)
        for rank, share in zip(ranks, rng.uniform(0, 1, POINTS).tolist(), strict=True):
            rho = share**3
            p, k = mp.mpf(rho), mp.mpf(rank) / 2
            a, sigma = mp.sqrt(1 - p * p), mp.sqrt(1 + p * p)
            extra = mp.mpf(0)
            if variance == "published":
                cut = mp.sqrt((1 + 1 / p**2) * mp.log(1 + p * p))
                extra = 2 * (mp.ncdf(cut) - mp.ncdf(cut / sigma))
            mixture = he4 / 8 * (mp.log(k) - mp.digamma(k)) + extra
            mixture += he3 * p / mp.sqrt(rank) * (1 / (2 * a) + (1 / a - 1 / sigma) * 2 / 3)
            # Entropy of a Gaussian of variance 2r, less that of χ²_r.
            entropy = mp.log(4 * mp.pi * mp.e * rank) / 2
            entropy -= k + mp.log(2) + mp.loggamma(k) + (1 - k) * mp.digamma(k)
            moved = (p * p - mp.log(1 + p * p)) / 2 if variance == "published" else 0
            pinsker = min(mp.sqrt(entropy / 2) + extra, mp.sqrt((entropy + moved) / 2))
            true = min(1, mixture, pinsker)
            found = tv_bound(EntryNoise(rank, 1.0, rho), variance).value
            assert true * (1 - mp.mpf("1e-14")) <= found <= true * (1 + mp.mpf("1e-9"))
