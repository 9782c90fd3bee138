"""The joint law of a row: density by quadrature and by the Wishart law, draws by definition."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate, stats

from lora_privacy.errors import NonFiniteError
from lora_privacy.noise import EntryNoise, RowNoise

Array = npt.NDArray[np.float64]


def defined_noise(q: Array, rank: int, draws: int, seed: int) -> Array:
    """Draws of q (AᵀA - I) from A itself."""
    a = np.random.default_rng(seed).standard_normal((draws, rank, q.size)) / math.sqrt(rank)
    return np.einsum("sk,skj->sj", a @ q, a) - q


def plane(row: Array, rank: int) -> tuple[Array, Array]:
    """Points of the half plane y·q > 0 as noise, with weights times density: should sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    norm = np.linalg.norm(row)
    # ln S from -46 at rank 1, where S has density S^(-1/2), and |w| up to 14 deviations given S.
    span = (-46.0, 6.0) if rank == 1 else (-30.0, 5.0)
    log_s = span[0] + (span[1] - span[0]) * (nodes + 1) / 2
    s, w = np.meshgrid(np.exp(log_s), 14 * nodes, indexing="ij")
    measure = np.outer(weights * (span[1] - span[0]) / 2, 14 * weights)
    step = norm * np.sqrt(s / rank)
    unit = row / norm
    across = np.array([-unit[1], unit[0]])
    noise = norm * (s - 1)[..., None] * unit + (step * w)[..., None] * across
    mass = np.exp(RowNoise(rank, row).logpdf(noise)) * measure * step * norm * s
    return noise.reshape(-1, 2), mass.ravel()


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 60])
def test_density_integrates_to_the_moments(rank: int) -> None:
    """Mass 1, mean 0 and the covariance of theory 2.1, by quadrature over the plane; 1e-8."""
    row = np.array([1.5, -0.7])
    noise, mass = plane(row, rank)
    # At rank 1 a mass of 3e-9 has S < 1e-17, where y + q is lost in the rounding of y.
    assert mass.sum() == pytest.approx(1.0, abs=1e-8 if rank == 1 else 1e-9)
    assert mass @ noise == pytest.approx(np.zeros(2), abs=1e-8)
    second = np.einsum("s,si,sj->ij", mass, noise, noise)
    expected = (row @ row * np.eye(2) + np.outer(row, row)) / rank
    assert second == pytest.approx(expected, abs=1e-8)
    assert RowNoise(rank, row).covariance() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("rank", [2, 3, 7])
@pytest.mark.parametrize("angle", [0.0, 0.9])
def test_density_matches_the_wishart_law(rank: int, angle: float) -> None:
    """Oracle, r >= m = 2: scipy's Wishart density of M, M_22 integrated out; 1e-7 relative."""
    wishart = stats.wishart(df=rank, scale=np.eye(2) / rank)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    row = 2.0 * turn[0]
    for first, second in ((0.4, 0.3), (1.7, -0.9)):

        def density(rest: float, first: float = first, second: float = second) -> float:
            corner = rest + second**2 / first
            return float(wishart.pdf(np.array([[first, second], [second, corner]])))

        near, far = (integrate.quad(density, *ends)[0] for ends in ((0, 1), (1, np.inf)))
        noise = 2.0 * (first * turn[0] + second * turn[1]) - row
        value = float(np.exp(RowNoise(rank, row).logpdf(noise)))
        assert value == pytest.approx((near + far) / 4.0, rel=1e-7, abs=0)


@pytest.mark.parametrize(("rank", "m"), [(1, 3), (2, 6), (8, 3), (5, 1)])
def test_own_draws_match_the_definition(rank: int, m: int) -> None:
    """Two-sample KS at level 1e-4 on log densities and on two coordinates.

    A Gaussian row with the exact covariance must be rejected.
    """
    q = np.random.default_rng(1).standard_normal(m)
    law, draws = RowNoise(rank, q), 4_000
    defined = defined_noise(q, rank, draws, seed=2)
    own = law.rvs(draws, np.random.default_rng(3))
    assert own.shape == (draws, m)
    gaussian = np.random.default_rng(4).multivariate_normal(np.zeros(m), law.covariance(), draws)
    for view in (law.logpdf, lambda y: y[:, 0], lambda y: y @ q, lambda y: (y**2).sum(axis=1)):
        assert stats.ks_2samp(view(defined), view(own)).pvalue > 1e-4
    assert stats.ks_2samp(law.logpdf(gaussian), law.logpdf(own)).pvalue < 1e-4
    assert np.isfinite(law.logpdf(defined)).all()


def test_one_input_is_the_scaled_chi_square() -> None:
    """At m = 1 the density is that of the entry law at |ρ| = 1."""
    y = np.array([[-1.5], [-0.3], [0.0], [4.0]])
    law = RowNoise(3, np.array([2.0]))
    assert law.logpdf(y) == pytest.approx(EntryNoise(3, 2.0, 2.0).logpdf(y[:, 0]), rel=1e-13)


def test_density_by_hand() -> None:
    """The closed form of noise-laws.md, section 3, at 30 digits; 1e-13."""
    rank, q = 3, [1.0, -2.0, 0.5]
    noise = [0.7, -1.1, 0.4]
    with mp.workdps(30):
        y = [mp.mpf(a) + mp.mpf(b) for a, b in zip(noise, q, strict=True)]
        square = mp.fsum(mp.mpf(v) ** 2 for v in q)
        dot = mp.fsum(a * b for a, b in zip(y, q, strict=True))
        k, s, m = mp.mpf(rank) / 2, dot / square, 3
        density = k**k / mp.gamma(k) * (rank / (2 * mp.pi)) ** (mp.mpf(m - 1) / 2)
        density *= square ** (-mp.mpf(m) / 2) * s ** (mp.mpf(rank - m - 1) / 2)
        density *= mp.exp(-rank * mp.fsum(v * v for v in y) / (2 * dot))
    found = float(RowNoise(rank, np.array(q)).logpdf(noise))
    assert found == pytest.approx(float(mp.log(density)), rel=1e-13, abs=0)


def test_marginal_of_the_density_is_the_entry_law() -> None:
    """Integrating the joint density over the other entry gives Bessel's; 1e-8 relative."""
    row = np.array([1.2, 0.5])
    law = RowNoise(5, row)
    for x in (-0.9, 0.1, 1.4):
        pieces = [-30.0, -3.0, -1.0, 0.0, 1.0, 3.0, 30.0]
        mass = sum(
            integrate.quad(
                lambda y, x=x: float(np.exp(law.logpdf([x, y]))), a, b, epsabs=1e-13, limit=400
            )[0]
            for a, b in itertools.pairwise(pieces)
        )
        assert mass == pytest.approx(float(law.entry(0).pdf(x)), rel=1e-8, abs=0)


def test_outside_the_half_space_the_density_is_zero() -> None:
    """(y + q)·q < 0 has probability 0."""
    q = np.array([1.0, 2.0])
    law = RowNoise(2, q)
    outside = np.array([[-0.1, 0.0], [-2.0, 0.9], [-1e300, 0.0]])
    assert law.logpdf(outside - q).tolist() == [-math.inf] * 3
    assert np.isfinite(law.logpdf(-outside[:2] - q)).all()
    assert RowNoise(2, np.array([0.0, 2.0])).logpdf([1.0, -2.0]) == -math.inf  # its edge


def test_extreme_scales_and_sizes() -> None:
    """The density scales as 1/c^m; a row of 50,000 entries costs no matrix."""
    q, y = np.array([0.6, -0.8]), np.array([0.3, 0.1])
    for c in (1e-120, 1e120):
        assert RowNoise(4, c * q).logpdf(c * y) + 2 * math.log(c) == pytest.approx(
            float(RowNoise(4, q).logpdf(y)), rel=1e-10
        )
    long = RowNoise(1, np.ones(50_000))
    assert np.isfinite(long.logpdf(long.rvs(3, np.random.default_rng(0)))).all()


def test_one_row_looks_gaussian_and_pooled_draws_do_not() -> None:
    """Given A, entries of a flat row at rank 1 are Gaussian with one random scale; 1e-4.

    A histogram over the entries of one row passes a Gaussian test with the fitted scale and fails
    the true marginal law; an entry pooled over draws of A does the reverse.
    """
    q = np.ones(1_500) / math.sqrt(1_500)
    a = np.random.default_rng(8).standard_normal(q.size)
    s = float((a @ q) ** 2)
    row = (a @ q) * a - q
    entry = EntryNoise(1, 1.0, float(q[0]))
    assert stats.kstest(row, stats.norm(0, math.sqrt(s)).cdf).pvalue > 1e-4
    assert stats.kstest(row, entry.cdf).pvalue < 1e-4
    pooled = RowNoise(1, np.ones(50) / math.sqrt(50)).rvs(1_500, np.random.default_rng(9))[:, 0]
    law = EntryNoise(1, 1.0, 1 / math.sqrt(50))
    assert stats.kstest(pooled, law.cdf).pvalue > 1e-4
    assert stats.kstest(pooled, stats.norm(0, law.std()).cdf).pvalue < 1e-4


def test_bad_input_is_refused() -> None:
    """Fail closed; the row is copied and cannot be changed."""
    with pytest.raises(ValueError, match="not be all zero"):
        RowNoise(2, np.zeros(3))
    with pytest.raises(ValueError, match="non-empty vector"):
        RowNoise(2, np.ones((2, 2)))
    with pytest.raises(NonFiniteError, match="must be finite"):
        RowNoise(2, np.array([1.0, math.inf]))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        RowNoise(0, np.ones(2))
    with pytest.raises(ValueError, match="size must be at least 0"):
        RowNoise(2, np.ones(2)).rvs(-1, np.random.default_rng(0))
    assert RowNoise(2, np.ones(3)).rvs(0, np.random.default_rng(0)).shape == (0, 3)
    q = np.ones(2)
    law = RowNoise(2, q)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\)"):
        law.logpdf([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="NaN"):
        law.logpdf([1.0, math.nan])
    with pytest.raises(IndexError):
        law.entry(2)
    q[0] = 7.0
    assert law.row[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        law.row[0] = 3.0
