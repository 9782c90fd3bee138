"""Second oracles of the numbers of ``noise``: closed forms of rank 2, exact sums, draws of A.

``docs/oracles.md`` lists both of each number.
"""

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, special, stats
from test_gaussianity import densities, integrate, panels, sign_changes
from test_moments import product_rule

from lora_privacy.laws import LAW_NAMES, LawName
from lora_privacy.noise import (
    EmpiricalNoise,
    EntryNoise,
    RowNoise,
    berry_esseen_bound,
    expected_noise_energy,
    jl_distortion,
    kl_to_gaussian,
    kolmogorov_to_gaussian,
    matrix_tv_to_gaussian,
    noise_covariance,
    noise_energy_variance,
    noise_variance,
    tv_of_entries,
    tv_to_gaussian,
    wishart_moments,
)

Array = npt.NDArray[np.float64]
VARIANCES = ("exact", "published")


# At rank 2 both χ² are exponential, so all is elementary: with ‖q‖ = 1 the noise is Z − ρ, where
# Z = αE − βE' has density e^{−z/α} on z > 0 and e^{z/β} below, α = (1 + ρ)/2 and β = (1 − ρ)/2.


def laplace_cdf(rho: float, x: Array) -> Array:
    a, b, z = (1 + rho) / 2, (1 - rho) / 2, np.asarray(x) + rho
    return np.where(z < 0, b * np.exp(np.minimum(z, 0) / b), 1 - a * np.exp(-np.maximum(z, 0) / a))


def laplace_gaps(rho: float, variance: str) -> tuple[Array, float]:
    """F − Φ where the densities cross, at roots of two quadratics; and KL, E ln f being −1."""
    a, b = (1 + rho) / 2, (1 - rho) / 2
    v = (1 + (rho**2 if variance == "exact" else 0)) / 2
    constant = rho**2 / (2 * v) + math.log(2 * math.pi * v) / 2
    roots = [
        z
        for sign, slope in ((1, -1 / a), (-1, 1 / b))
        for z in np.roots([1 / (2 * v), slope - rho / v, constant])
        if abs(z.imag) == 0 and sign * z.real > 0
    ]
    x = np.sort(np.real(roots)) - rho
    gaps = laplace_cdf(rho, x) - stats.norm.cdf(x, 0, math.sqrt(v))
    entropy = math.log(2 * math.pi * v) / 2 + (1 + rho**2) / (4 * v) - 1
    return gaps, entropy


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.8])
def test_rank_two_is_an_asymmetric_laplace_law(rho: float) -> None:
    """Density, both tails and both quantiles in closed form; 1e-11."""
    law, a, b = EntryNoise(2, 1.0, rho), (1 + rho) / 2, (1 - rho) / 2
    x = np.linspace(-3, 3, 21)
    z = x + rho
    density = np.exp(np.where(z > 0, -z / a, z / b))
    assert law.pdf(x) == pytest.approx(density, rel=1e-11, abs=0)
    below = laplace_cdf(rho, x)
    assert law.cdf(x) == pytest.approx(below, rel=1e-11, abs=0)
    above = np.where(z > 0, a * np.exp(-z / a), 1 - b * np.exp(np.minimum(z, 0) / b))
    assert law.sf(x) == pytest.approx(above, rel=1e-11, abs=0)
    p = np.array([1e-6, 0.05, 0.4, 0.97])
    quantile = np.where(p < b, b * np.log(p / b), -a * np.log((1 - p) / a)) - rho
    assert law.ppf(p) == pytest.approx(quantile, rel=1e-10, abs=1e-12)
    assert law.isf(1 - p) == pytest.approx(quantile, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.2, -0.6, 0.95])
@pytest.mark.parametrize("variance", VARIANCES)
def test_distances_at_rank_two(rho: float, variance: str) -> None:
    """All three in closed form, 1e-9; those to the other Gaussian differ."""
    law = EntryNoise(2, 3.0, 3.0 * rho)
    gaps, entropy = laplace_gaps(rho, variance)
    ends = np.concatenate([[0.0], gaps, [0.0]])
    found = tv_to_gaussian(law, variance).value  # type: ignore[arg-type]
    assert found == pytest.approx(np.abs(np.diff(ends)).sum() / 2, rel=1e-9, abs=0)
    found = kolmogorov_to_gaussian(law, variance).value  # type: ignore[arg-type]
    assert found == pytest.approx(np.abs(gaps).max(), rel=1e-9, abs=0)
    found = kl_to_gaussian(law, variance).value  # type: ignore[arg-type]
    assert found == pytest.approx(entropy, rel=1e-8, abs=0)
    if rho:
        other = laplace_gaps(rho, VARIANCES[1 - VARIANCES.index(variance)])[1]
        assert found != pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
def test_all_entries_of_a_row_at_rank_two(variance: str) -> None:
    """Each entry in closed form; 1e-7, as stated."""
    q = np.random.default_rng(1).standard_normal(30)
    found = tv_of_entries(q, 2, variance)  # type: ignore[arg-type]
    for value, rho in zip(found, q / np.linalg.norm(q), strict=True):
        gaps = laplace_gaps(float(rho), variance)[0]
        ends = np.concatenate([[0.0], gaps, [0.0]])
        assert value == pytest.approx(np.abs(np.diff(ends)).sum() / 2, rel=1e-7, abs=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_an_entry_of_a_row_by_quadrature(variance: str) -> None:
    """½∫|p − φ| at rank 3, p an average over a random scale; 1e-7. The other entry differs."""
    found = tv_of_entries([0.6, -0.8], 3, variance)  # type: ignore[arg-type]
    p, phi = densities(3, 0.6, variance)  # type: ignore[arg-type]
    edges = panels(3, 0.6, 60.0)
    roots = sign_changes(lambda x: p(x) - phi.pdf(x), edges)
    area = integrate(lambda x: np.abs(p(x) - phi.pdf(x)), np.unique([*edges, *roots]))
    assert found[0] == pytest.approx(area / 2, rel=1e-7, abs=0)
    assert found[1] != pytest.approx(area / 2, rel=1e-3)


# Other ranks.


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.4), (3, -0.7), (8, 0.1), (31, 0.9)])
def test_an_entry_is_a_gaussian_of_random_scale(rank: int, rho: float) -> None:
    """Density and tail as averages over S ~ χ²_r/r of normal ones; 1e-8. One rank more differs."""
    u, w = np.polynomial.legendre.leggauss(400)
    low, high = stats.chi2.ppf(1e-13, rank), stats.chi2.isf(1e-13, rank)
    log_s = np.log(low) + (np.log(high) - np.log(low)) * (u + 1) / 2
    s = np.exp(log_s) / rank
    w = w * (np.log(high) - np.log(low)) / 2 * stats.chi2.pdf(rank * s, rank) * rank * s
    law, spread = EntryNoise(rank, 1.0, rho), np.sqrt((1 - rho**2) * s / rank)
    for x in law.std() * np.array([-1.6, -0.3, 0.7, 2.5]):
        density = w @ stats.norm.pdf(x, rho * (s - 1), spread)
        tail = w @ stats.norm.sf(x, rho * (s - 1), spread)
        # At rank 1 a mass of 1e-7 has a smaller S.
        assert float(law.pdf(x)) == pytest.approx(density, rel=1e-5 if rank == 1 else 1e-8)
        assert float(law.sf(x)) == pytest.approx(tail, rel=1e-5 if rank == 1 else 1e-8)
        assert float(EntryNoise(rank + 1, 1.0, rho).pdf(x)) != pytest.approx(density, rel=1e-4)


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.3), (2, -0.6), (3, 0.0)])
def test_four_moments_by_integration_over_the_matrix(rank: int, rho: float) -> None:
    """Oracle: Gauss–Hermite over the entries of A, exact to degree 9 in each; 1e-11."""
    weights, matrices = product_rule("gaussian", rank, 2)
    q = np.array([rho, math.sqrt(1 - rho**2)])
    noise = matrices[:, 0, :] @ q - rho
    mean, variance, third, fourth = (float(weights @ noise**k) for k in (1, 2, 3, 4))
    law = EntryNoise(rank, 1.0, rho)
    assert mean == pytest.approx(law.mean(), abs=1e-12)
    assert law.var() == pytest.approx(variance, rel=1e-11)
    assert law.skewness() == pytest.approx(third / variance**1.5, rel=1e-11, abs=1e-12)
    assert law.kurtosis() == pytest.approx(fourth / variance**2, rel=1e-11)
    rows = matrices @ q - q
    covariance = np.einsum("s,si,sj->ij", weights, rows, rows)
    assert RowNoise(rank, q).covariance() == pytest.approx(covariance, abs=1e-12)


@pytest.mark.parametrize(("rank", "m"), [(2, 3), (1, 2), (5, 4)])
def test_density_of_a_row_is_that_of_its_draws(rank: int, m: int) -> None:
    """E g/p over draws of A is ∫g = 1 for any density g; 4.5 errors. Rank 2r is rejected.

    Also where r < m. g is lighter than p in every direction, so that g/p is bounded.
    """
    rng = np.random.default_rng(2)
    q = rng.standard_normal(m)
    size = float(np.linalg.norm(q))
    a = rng.standard_normal((20_000, rank, m)) / math.sqrt(rank)
    y = np.einsum("sk,skj->sj", a @ q, a)
    s = y @ q / size**2
    across = np.sum(y**2, axis=1) / size**2 - s**2
    log_g = stats.gamma.logpdf(s, rank / 2 + 1, scale=1 / (rank + 2))
    log_g -= (m - 1) / 2 * np.log(math.pi * s / rank) + rank * across / s + m * math.log(size)
    for law, right in ((RowNoise(rank, q), True), (RowNoise(2 * rank, q), False)):
        ratio = np.exp(log_g - law.logpdf(y - q))
        error = 4.5 * ratio.std() / math.sqrt(ratio.size)
        assert bool(abs(ratio.mean() - 1) < error) is right


def normalised(law: str, rank: int, m: int, draws: int) -> Array:
    """Draws of AᵀA/(v r) from A itself, (draws, m, m)."""
    rng = np.random.default_rng(3)
    if law == "orthonormal":
        a = np.linalg.qr(rng.standard_normal((draws, m, rank)))[0].swapaxes(1, 2) * math.sqrt(m)
    elif law == "uniform":
        a = rng.uniform(-1, 1, (draws, rank, m)) * math.sqrt(3)
    elif law == "rademacher":
        a = rng.choice([-1.0, 1.0], (draws, rank, m))
    else:
        a = rng.standard_normal((draws, rank, m))
    return np.einsum("ski,skj->sij", a, a) / rank


@pytest.mark.parametrize("law", LAW_NAMES)
def test_moments_of_drawn_matrices(law: LawName) -> None:
    """Every moment against 20,000 draws at 4.5 standard errors; another law's is rejected."""
    m, rank = 5, 3
    matrices = normalised(law, rank, m, 20_000)
    g = np.random.default_rng(4).standard_normal((2, m))
    rows = np.einsum("ni,sij->snj", g, matrices) - g

    def near(values: Array, stated: npt.ArrayLike) -> bool:
        error = 4.5 * values.std(axis=0) / math.sqrt(len(values)) + 1e-12
        return bool(np.all(np.abs(values.mean(axis=0) - stated) < error))

    other: LawName = "rademacher" if law == "gaussian" else "gaussian"
    cross = np.einsum("si,sj->sij", rows[:, 0], rows[:, 1])
    assert near(cross, noise_covariance(g[0], g[1], law, rank))
    assert not near(cross, noise_covariance(g[0], g[1], other, rank))
    assert near(rows[:, 0] ** 2, noise_variance(g[0], law, rank))
    energy = np.sum(rows**2, axis=(1, 2))
    mean = expected_noise_energy(g, law, rank)
    assert near(energy, mean)
    if law in ("gaussian", "orthonormal"):
        assert near((energy - mean) ** 2, noise_energy_variance(g, law, rank))
        assert not near((energy - mean) ** 2, 1.6 * noise_energy_variance(g, law, rank))
    stated = wishart_moments(rank, law, m)
    diagonal = matrices[:, 0, 0] - 1
    assert near(diagonal**2, stated.var_diagonal)
    assert near(matrices[:, 0, 1] ** 2, stated.var_offdiagonal)
    assert near(diagonal * (matrices[:, 1, 1] - 1), stated.cov_diagonal)
    square = np.einsum("sij,sij->s", matrices, matrices)
    assert near(square, stated.mean_trace_square)
    assert near(square / m, stated.mean_square)


def test_a_sampled_law_is_scipys_empirical_one() -> None:
    """Oracles: scipy's ecdf and numpy's inverted one, exact; the band, Kolmogorov's law, 1e-3."""
    noise = EmpiricalNoise("uniform", 2, [0.6, -0.8, 0.1], 1, 500, np.random.default_rng(5))
    points = np.concatenate([np.linspace(-2, 2, 101), noise.samples])
    assert noise.cdf(points) == pytest.approx(
        stats.ecdf(noise.samples).cdf.evaluate(points), abs=1e-15
    )
    p = np.array([0.001, 0.2, 0.333, 0.9])
    assert np.array_equal(noise.ppf(p), np.quantile(noise.samples, p, method="inverted_cdf"))
    for confidence in (0.95, 0.999):
        limit = special.kolmogi(1 - confidence) / math.sqrt(500)
        assert noise.band(confidence) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.8, 0.999])
def test_third_moments_in_polar_coordinates(rho: float) -> None:
    """Oracle: one term of the sum is cE − ρ, E exponential and c = ρ + cos θ; 1e-8.

    Its third absolute moment given θ is elementary; even steps of θ average it. 200,000 draws of
    the term itself, 4.5 standard errors; 10 % more is rejected.
    """
    c = rho + np.cos(2 * math.pi * np.arange(20_000) / 20_000)
    cube = rho**3 - 3 * rho**2 * c + 6 * rho * c**2 - 6 * c**3
    positive = np.maximum(c, 1e-300)
    cube += np.where(c > 0, 12 * c**3 * np.exp(-rho / positive), 0.0)
    beta = cube.mean() / (1 + rho**2) ** 1.5
    found = berry_esseen_bound(EntryNoise(400, 1.0, rho)).value
    assert found == pytest.approx(0.469 * beta / 20, rel=1e-8, abs=0)
    z, g = np.random.default_rng(9).standard_normal((2, 200_000))
    drawn = np.abs(rho * (z**2 - 1) + math.sqrt(1 - rho**2) * z * g) ** 3
    drawn /= (1 + rho**2) ** 1.5
    error = 4.5 * drawn.std() / math.sqrt(drawn.size)
    stated = found * 20 / 0.469
    assert abs(drawn.mean() - stated) < error < 0.1 * stated


@pytest.mark.parametrize(("rank", "failure"), [(1, 0.2), (8, 0.05), (40, 0.3)])
def test_a_distortion_fails_as_often_as_it_was_allowed(rank: int, failure: float) -> None:
    """Oracles: scipy's χ² and a root finder, 1e-9; 20,000 draws of A, 4.5 standard errors."""

    def excess(tau: float) -> float:
        low, high = rank * max(0.0, 1 - tau) ** 2, rank * (1 + tau) ** 2
        return float(stats.chi2.cdf(low, rank) + stats.chi2.sf(high, rank)) - failure

    tau = jl_distortion(rank, failure)
    assert tau == pytest.approx(optimize.brentq(excess, 1e-6, 5.0, xtol=1e-14), rel=1e-9)
    x = np.random.default_rng(6).standard_normal(4)
    a = np.random.default_rng(7).standard_normal((20_000, rank, 4)) / math.sqrt(rank)
    ratio = np.linalg.norm(a @ x, axis=1) / np.linalg.norm(x)
    error = 4.5 * math.sqrt(failure * (1 - failure) / 20_000)
    assert abs(np.mean(np.abs(ratio - 1) > tau) - failure) < error
    assert abs(np.mean(np.abs(ratio - 1) > 1.1 * tau) - failure) > error


def test_rows_of_one_input_lie_on_a_line() -> None:
    """Two rows and one input: noise is (q₁, q₂)(S − 1), which no Gaussian of the plane ever is."""
    rng = np.random.default_rng(8)
    q = np.array([[1.5], [-0.5]])
    a = rng.standard_normal((1_000, 3, 1)) / math.sqrt(3)
    noise = (np.einsum("ni,ski,skj->snj", q, a, a) - q)[:, :, 0]
    gauss = rng.standard_normal((1_000, 2)) * np.abs(q[:, 0])
    off = [np.abs(one[:, 0] * q[1, 0] - one[:, 1] * q[0, 0]) for one in (noise, gauss)]
    assert off[0].max() < 1e-12
    assert off[1].min() > 1e-7
    assert matrix_tv_to_gaussian(q, 3).value == 1.0
