"""Noise after the projection: the two bounds, and each step of their proof, by simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from lora_privacy.dp import NoisedProjection, VectorProjection

M, N, RANK, SIZE = 5, 3, 4, 20_000
V = np.random.default_rng(21).standard_normal((M, N))
V[:, 2] = V[:, 1]  # columns 1 and 2 have rank 1
CHANGE = np.random.default_rng(22).standard_normal(M)


def changed(matrix: np.ndarray, change: np.ndarray, column: int = 0) -> np.ndarray:
    other = matrix.copy()
    other[:, column] += change
    return other


def draws(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """AᵀA from the definition, and the part of it that the projection of V[:, 1] shows."""
    a = rng.standard_normal((SIZE, RANK, M)) / math.sqrt(RANK)
    whole = np.einsum("sri,srj->sij", a, a)
    u = V[:, 1] / np.linalg.norm(V[:, 1])
    seen = whole @ u
    return whole, np.einsum("si,sj->sij", seen, seen) / (seen @ u)[:, None, None]


def test_the_hidden_part_is_a_fresh_projection_of_lower_rank() -> None:
    """M - M∥ vanishes on the span; w(M - M∥)w r / ‖w‖² is χ²_{r-k}, independent of what is shown.

    KS at level 1e-4; χ²_r, the law without the split, must be rejected.
    """
    whole, shown = draws(np.random.default_rng(23))
    u = V[:, 1] / np.linalg.norm(V[:, 1])
    hidden = whole - shown
    assert np.abs(hidden @ u).max() < 1e-12
    w = CHANGE - u * (u @ CHANGE)
    form = np.einsum("i,sij,j->s", w, hidden, w) * RANK / (w @ w)
    assert stats.kstest(form, stats.chi2(RANK - 1).cdf).pvalue > 1e-4
    assert stats.kstest(form, stats.chi2(RANK).cdf).pvalue < 1e-4
    shown_norm = np.linalg.norm(shown @ CHANGE, axis=1)
    assert abs(stats.spearmanr(form, shown_norm)[0]) < 5 / math.sqrt(SIZE)


@pytest.mark.parametrize("failure", [0.4, 0.02])
def test_norm_of_the_shown_part_stays_within_its_bound(failure: float) -> None:
    """But for the failure probability, in 600 dimensions; the bound is not 4 times too large."""
    rng = np.random.default_rng(24)
    m, rank, size = 600, 8, 1_500
    u, change = np.eye(m)[0], rng.standard_normal(m)
    a = rng.standard_normal((size, rank, m)) / math.sqrt(rank)
    b = a @ u
    unit = b / np.linalg.norm(b, axis=1)[:, None]
    norms = np.linalg.norm(np.einsum("srm,sr->sm", a, unit), axis=1)
    norms *= np.abs(np.einsum("sr,srm,m->s", unit, a, change, optimize=True))
    v = np.stack([change, u], axis=1)
    release = NoisedProjection(v, changed(v, change), rank, 1.0)
    bound = release._shown(1, change[:1], change - u * change[0], failure)
    assert (norms > bound).mean() <= failure
    assert bound < 4 * np.quantile(norms, 1 - failure / 4)


def test_gaussian_with_a_revealed_holds_on_average() -> None:
    """Draws of ‖AᵀAΔ‖ in 600 dimensions: the mean of the Gaussian δ at ε is at most δ.

    At a quarter of ε it is not, so a shift that leaves out the other coordinates would be seen.
    """
    rng = np.random.default_rng(25)
    m, rank, size, noise, delta = 600, 8, 1_500, 100.0, 0.1
    change = rng.standard_normal(m)
    a = rng.standard_normal((size, rank, m)) / math.sqrt(rank)
    mu = np.linalg.norm(np.einsum("srm,sr->sm", a, a @ change), axis=1) / noise
    v = rng.standard_normal((m, 1))
    epsilon = NoisedProjection(v, changed(v, change), rank, noise)._revealed(delta)[0]

    def mean(level: float) -> float:
        below = stats.norm.cdf(-mu / 2 - level / mu)
        return float((stats.norm.cdf(mu / 2 - level / mu) - math.exp(level) * below).mean())

    assert mean(epsilon) <= delta < mean(epsilon / 4)


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_scalar_release_meets_the_bound(noise: float) -> None:
    """Oracle: one row, one column: densities by quadrature over S ~ χ²_r / r. ε/4 is too small."""
    rank, v, w, delta = 6, 1.0, 1.4, 0.05
    law = stats.chi2(rank, scale=1 / rank)
    found = NoisedProjection(np.array([[v]]), np.array([[w]]), rank, noise).epsilon(delta)
    s = np.linspace(1e-6, 6, 4001)
    y = np.linspace(-8 * noise - 1, 8 + 8 * noise, 2001)
    kernels = [
        integrate.trapezoid(stats.norm.pdf(y[:, None], x * s, noise) * law.pdf(s), s, axis=1)
        for x in (v, w)
    ]
    for epsilon, (p, q) in (
        (found.forward, kernels),
        (found.backward, kernels[::-1]),
    ):
        gap = integrate.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), y)
        assert gap <= delta
        assert integrate.trapezoid(np.maximum(p - math.exp(epsilon / 4) * q, 0), y) > delta


def test_without_other_columns_the_projection_alone_bounds_it() -> None:
    """Little noise changes nothing: ε is that of the vector mechanism; much noise lowers it."""
    v, w = V[:, :1], changed(V[:, :1], 0.02 * CHANGE)
    cosine = float(v[:, 0] @ w[:, 0] / np.linalg.norm(v) / np.linalg.norm(w))
    ratio = float(np.linalg.norm(w) / np.linalg.norm(v))
    expected = VectorProjection(M, 40, cosine, ratio).epsilon(1e-3).epsilon
    quiet = NoisedProjection(v, w, 40, 1e-6).epsilon(1e-3)
    assert quiet.epsilon == pytest.approx(expected, rel=1e-9)
    assert NoisedProjection(v, w, 40, 10.0).epsilon(1e-3).epsilon < 0.1 * expected


def test_the_split_wins_at_large_rank_and_small_noise() -> None:
    """And its parts add up: never below the residual vectors' own ε in m - k dimensions."""
    rng = np.random.default_rng(26)
    v = rng.standard_normal((60, 3))
    w = changed(v, 0.1 * rng.standard_normal(60), 1)
    found = NoisedProjection(v, w, 200, 0.01).epsilon(1e-3)
    assert found.method == "upper bound, split"
    u, _ = np.linalg.qr(v[:, [0, 2]])
    a, b = (x[:, 1] - u @ (u.T @ x[:, 1]) for x in (v, w))
    pair = VectorProjection(
        58,
        198,
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        float(np.linalg.norm(b) / np.linalg.norm(a)),
    )
    assert found.epsilon > pair.epsilon(1e-3).epsilon
    assert NoisedProjection(v, w, 2, 0.01).epsilon(1e-3).method == "upper bound, A revealed"
    assert str(found).startswith("Not a guarantee.")


def test_under_much_noise_the_split_is_the_residual_pair() -> None:
    """In m - k dimensions at rank r - k, with .8 of the .9 of δ that the norm leaves it."""
    release = NoisedProjection(V, changed(V, 0.3 * CHANGE), 40, 1e9)
    u = V[:, 1] / np.linalg.norm(V[:, 1])
    a = V[:, 0] - u * (u @ V[:, 0])
    b = a + 0.3 * (CHANGE - u * (u @ CHANGE))
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    ratio = float(np.linalg.norm(b) / np.linalg.norm(a))
    pair = VectorProjection(M - 1, 39, cosine, ratio).epsilon(0.8 * 0.9 * 1e-3)
    assert release._split(1e-3)[-1] == pytest.approx((pair.forward, pair.backward), rel=1e-6)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε(δ) of N(μ, 1) against N(0, 1), from its profile (Balle & Wang 2018)."""

    def excess(epsilon: float) -> float:
        below = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - below - delta)

    return optimize.brentq(excess, 0, mu * (mu + 40), xtol=1e-14) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("delta", [0.3, 1e-3, 1e-8])
@pytest.mark.parametrize(("m", "rank"), [(5, 4), (40, 9), (1, 3)])
def test_revealing_pays_for_both_quantiles(m: int, rank: int, delta: float) -> None:
    """Oracle: section 4 of the page. δ/20 for each quantile, the rest for the noise."""
    rng = np.random.default_rng(27)
    v, change, noise = rng.standard_normal((m, 2)), rng.standard_normal(m), 3.0
    radial = stats.chi2.isf(delta / 20, rank) / rank
    across = stats.chi2.isf(delta / 20, m - 1) / rank if m > 1 else 0.0
    shift = np.linalg.norm(change) * math.sqrt(radial * (radial + across))
    expected = gaussian_epsilon(shift / noise, 0.9 * delta)
    found = NoisedProjection(v, changed(v, change), rank, noise)._revealed(delta)
    assert found == pytest.approx((expected, expected), rel=1e-7, abs=0)
    assert found[0] >= expected


@pytest.mark.parametrize("delta", [0.3, 1e-3])
@pytest.mark.parametrize(("m", "n", "rank", "noise"), [(30, 3, 50, 0.5), (6, 3, 5, 2.0)])
def test_the_split_pays_for_all_of_its_parts(
    m: int, n: int, rank: int, noise: float, delta: float
) -> None:
    """Oracle: section 4 of the page. δ/40 for each of four events, .9 δ for both mechanisms.

    The residual vectors by least squares, the norm ‖F‖ ‖FΔ‖ by Davidson and Szarek.
    """
    rng = np.random.default_rng(28)
    v, change, k = rng.standard_normal((m, n)), 0.2 * rng.standard_normal(m), n - 1
    others = v[:, 1:]

    def residual(x: np.ndarray) -> np.ndarray:
        return x - others @ np.linalg.lstsq(others, x, rcond=None)[0]

    part = 0.1 * delta / 4
    t = math.sqrt(2 * math.log(1 / part))
    spread = math.hypot(
        1 + (math.sqrt(k) + t) / math.sqrt(rank),
        (math.sqrt(k) + math.sqrt(m - k) + t) / math.sqrt(rank),
    )
    length = np.linalg.norm(change - residual(change)) * math.sqrt(
        stats.chi2.isf(part, rank) / rank
    )
    length += np.linalg.norm(residual(change)) * math.sqrt(stats.chi2.isf(part, k) / rank)
    a, b = residual(v[:, 0]), residual(v[:, 0] + change)
    one, two = np.linalg.norm(a), np.linalg.norm(b)
    pair = VectorProjection(m - k, rank - k, float(a @ b / one / two), float(two / one))
    expected = []
    for share in (0.02, 0.2, 0.5, 0.8):
        hidden = pair.epsilon(share * 0.9 * delta)
        seen = gaussian_epsilon(spread * length / noise, (1 - share) * 0.9 * delta)
        expected.append((hidden.forward + seen, hidden.backward + seen))
    found = NoisedProjection(v, changed(v, change), rank, noise)._split(delta)
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-6, abs=0)


def test_equal_matrices_cost_nothing() -> None:
    """Without any search."""
    assert NoisedProjection(V, V.copy(), 4, 1.0).epsilon(1e-9).epsilon == 0


def test_arguments_are_checked() -> None:
    """One changed column, positive noise, δ in (0, 1)."""
    with pytest.raises(ValueError, match="differ in one column, got 3"):
        NoisedProjection(V, V + 1, 4, 1.0)
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_std must be positive"):
            NoisedProjection(V, changed(V, CHANGE), 4, noise)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        NoisedProjection(V, changed(V, CHANGE), 0, 1.0)
    with pytest.raises(ValueError, match="delta must lie in"):
        NoisedProjection(V, changed(V, CHANGE), 4, 1.0).epsilon(1.0)
