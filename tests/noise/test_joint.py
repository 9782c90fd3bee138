"""Distance of a row and of a whole gradient's noise to Gaussian noise (theory 2.6)."""

import math

import mpmath as mp
import numpy as np
import pytest
from scipy import special, stats

from lora_privacy.errors import ConvergenceError, NonFiniteError
from lora_privacy.noise import joint
from lora_privacy.noise.joint import joint_tv_to_gaussian, matrix_tv_to_gaussian

# Theory 2.6, published covariance, five decimals.
PINS = [
    (8, 16, 0.39758),
    (8, 64, 0.58412),
    (8, 768, 0.85600),
    (64, 768, 0.63431),
    (768, 768, 0.30616),
]


@pytest.mark.parametrize(("rank", "in_features", "expected"), PINS)
def test_pins(rank: int, in_features: int, expected: float) -> None:
    """Oracle: theory 2.6; half a unit of the fifth decimal."""
    value = joint_tv_to_gaussian(rank, in_features, covariance="published").value
    assert value == pytest.approx(expected, rel=0, abs=5e-6)


@pytest.mark.parametrize(("covariance", "along"), [("published", 1.0), ("exact", 2.0)])
@pytest.mark.parametrize(("rank", "in_features"), [(2, 3), (8, 16), (16, 6)])
def test_matches_the_likelihood_ratio_of_simulated_rows(
    rank: int, in_features: int, covariance: str, along: float
) -> None:
    """TV = E_P (1 − q/p)₊ = E_Q (1 − p/q)₊ by Monte Carlo, within 4.5 standard errors (7e-6).

    A distance 3 % too large must be rejected.
    P is drawn as q AᵀA with A itself, Q as a Gaussian row; the densities are in R^m.
    """
    rng = np.random.default_rng(20240918)
    draws = 160_000
    q = np.zeros(in_features)
    q[:2] = 0.6, -0.8
    a = rng.standard_normal((draws, rank, in_features)) / math.sqrt(rank)
    row = np.einsum("sri,sr->si", a, a @ q)
    shape = (np.eye(in_features) + (along - 1.0) * np.outer(q, q)) / rank
    gauss = stats.multivariate_normal(q, shape)

    def log_ratio(y: np.ndarray) -> np.ndarray:
        s = y @ q
        inside = np.where(s > 0, s, 1.0)
        log_p = stats.gamma.logpdf(inside, rank / 2, scale=2 / rank)
        rest = (y**2).sum(-1) - s**2
        log_p -= (in_features - 1) / 2 * np.log(2 * np.pi * inside / rank)
        log_p -= rank * rest / (2 * inside)
        return np.where(s > 0, log_p, -np.inf) - gauss.logpdf(y)

    value = joint_tv_to_gaussian(rank, in_features, covariance=covariance).value  # type: ignore[arg-type]
    for sign, y in ((1.0, row), (-1.0, gauss.rvs(draws, random_state=rng))):
        gain = np.maximum(-np.expm1(-sign * log_ratio(y)), 0.0)
        error = 4.5 * gain.std() / math.sqrt(draws)
        assert abs(gain.mean() - value) < error
        assert abs(gain.mean() - 1.03 * value) > error


@pytest.mark.parametrize("along", [1.0, 2.0])
@pytest.mark.parametrize("rank", [3, 40])
def test_matches_a_plain_two_dimensional_sum(rank: int, along: float) -> None:
    """Oracle: ½ Σ |p − q| on a grid over (√S, √w) with four perpendicular directions; 2e-6."""
    cells = 2400
    top_s, top_w = stats.chi2.isf(1e-9, rank) / rank, 0.0
    top_w = stats.chi2.isf(1e-9, 4) * top_s
    u = (np.arange(cells) + 0.5) / cells
    s = top_s * u**2
    w = (top_w * u**2)[:, None]
    jacobian = 2 * top_s * u * (2 * top_w * u)[:, None] / cells**2
    p = stats.gamma.pdf(s, rank / 2, scale=2 / rank) * stats.chi2.pdf(w / s, 4) / s
    q = stats.norm.pdf(s, 1.0, math.sqrt(along / rank)) * stats.chi2.pdf(w, 4)
    outside = stats.norm.cdf(0.0, 1.0, math.sqrt(along / rank))  # P puts no mass on S < 0
    expected = 0.5 * float(np.sum(np.abs(p - q) * jacobian)) + outside / 2
    value = joint_tv_to_gaussian(rank, 5, "exact" if along == 2.0 else "published").value
    assert value == pytest.approx(expected, rel=0, abs=2e-6)


@pytest.mark.parametrize("rank", [1, 2, 7, 300])
@pytest.mark.parametrize(("covariance", "along"), [("published", 1.0), ("exact", 2.0)])
def test_one_input_is_a_shifted_chi_square(rank: int, covariance: str, along: float) -> None:
    """With m = 1 the row is χ²_r/r alone.

    Oracle: χ² and normal CDFs between the sign changes on a grid of 2 million points; 1e-9.
    """
    x = 1 + np.linspace(-10, 60 if rank < 3 else 14, 2_000_001) * math.sqrt(2 / rank)
    scale = math.sqrt(along / rank)
    gap = stats.gamma.pdf(x, rank / 2, scale=2 / rank) - stats.norm.pdf(x, 1, scale)
    turn = np.flatnonzero(np.sign(gap[1:]) != np.sign(gap[:-1]))
    cut = (x[turn] + x[turn + 1]) / 2
    cut = np.where(np.abs(cut) < 1e-4, 0.0, cut)  # the jump at 0 is known exactly
    edges = np.concatenate([[-np.inf], cut, [np.inf]])
    p = np.diff(stats.chi2.cdf(rank * edges, rank))
    q = np.diff(stats.norm.cdf(edges, 1, scale))
    value = joint_tv_to_gaussian(rank, 1, covariance=covariance).value  # type: ignore[arg-type]
    assert value == pytest.approx(0.5 * np.abs(p - q).sum(), rel=0, abs=1e-9)


def test_grows_with_inputs_and_falls_with_rank() -> None:
    """Marginalising cannot raise the distance, so more inputs only raise it."""
    by_inputs = [joint_tv_to_gaussian(8, m).value for m in (1, 2, 3, 10, 100, 4096, 53_248)]
    assert by_inputs == sorted(by_inputs)
    by_rank = [joint_tv_to_gaussian(r, 768).value for r in (1, 8, 64, 768, 4096)]
    assert by_rank == sorted(by_rank, reverse=True)


@pytest.mark.parametrize("rank", [1, 2, 5, 64, 4096])
@pytest.mark.parametrize("in_features", [1, 2, 3, 4, 100, 53_248])
@pytest.mark.parametrize("covariance", ["exact", "published"])
def test_every_size_meets_the_promised_error(rank: int, in_features: int, covariance: str) -> None:
    """The exact covariance matches more moments, which never hurts here by more than rounding."""
    distance = joint_tv_to_gaussian(rank, in_features, covariance=covariance)  # type: ignore[arg-type]
    assert 0 < distance.value < 1
    assert distance.error < 1e-8


def test_two_rows_are_told_apart_surely() -> None:
    """Also parallel rows. The reason, from the definition: G Nᵀ is symmetric, G Eᵀ is not."""
    rng = np.random.default_rng(7)
    g = np.outer([1.0, -2.0], [3.0, 1.0, 0.5])
    assert matrix_tv_to_gaussian(g, rank=64).value == 1.0
    assert matrix_tv_to_gaussian(g, rank=64).error == 0.0
    a = rng.standard_normal((2, 3)) / math.sqrt(2)
    noise = g @ (a.T @ a - np.eye(3))
    other = rng.standard_normal(g.shape)
    assert np.allclose(g @ noise.T, (g @ noise.T).T, rtol=0, atol=1e-12)
    assert abs((g @ other.T)[0, 1] - (g @ other.T)[1, 0]) > 1e-3


def test_one_row_is_the_joint_distance() -> None:
    """Rows of zeros carry no noise; where the row lies and its entries do not matter."""
    g = np.zeros((3, 16))
    g[1] = np.arange(16)
    assert matrix_tv_to_gaussian(g, 8, covariance="published").value == pytest.approx(
        0.39758, rel=0, abs=5e-6
    )
    assert matrix_tv_to_gaussian(g, 8) == joint_tv_to_gaussian(8, 16)


def test_the_reference_is_the_one_that_was_asked_for() -> None:
    """Of one row, and of independent rows."""
    assert joint_tv_to_gaussian(8, 3).reference == "N(0, (‖q‖²I + qᵀq)/8)"
    assert joint_tv_to_gaussian(8, 3, "published").reference == "N(0, ‖q‖²I/8)"
    rows = [[1.0, 2.0], [3.0, 4.0]]
    assert "N(0, (‖q_i‖²I + q_iᵀq_i)/8)" in matrix_tv_to_gaussian(rows, 8).reference
    assert "N(0, ‖q_i‖²I/8)" in matrix_tv_to_gaussian(rows, 8, "published").reference


def test_bad_input_is_named() -> None:
    """Each message says what must hold."""
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        joint_tv_to_gaussian(0, 4)
    with pytest.raises(TypeError, match="in_features must be an integer"):
        joint_tv_to_gaussian(4, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="covariance must be one of"):
        joint_tv_to_gaussian(4, 4, covariance="paper")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="must be finite"):
        matrix_tv_to_gaussian([[1.0, math.nan], [1.0, 2.0]], 4)
    with pytest.raises(ValueError, match="non-zero row"):
        matrix_tv_to_gaussian(np.zeros((2, 3)), 4)
    for bad in ([1.0, 2.0], np.zeros((0, 3)), np.zeros((3, 0)), np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match="must be a matrix"):
            matrix_tv_to_gaussian(bad, 4)
    assert matrix_tv_to_gaussian([[7.0]], 4) == joint_tv_to_gaussian(4, 1)


def test_distance_prints_for_a_paper() -> None:
    """Law, reference, value, error and method in one line."""
    distance = joint_tv_to_gaussian(8, 16, covariance="published")
    assert str(distance).startswith(
        "total variation of the noise of one row, q(AᵀA − I), rank 8, 16 inputs, Gaussian A "
        "to N(0, ‖q‖²I/8) = 0.397584 (±1e-12, "
    )
    assert distance.to_dict()["references"] == ["p1-implicit-2024", "muirhead-1982"]


@pytest.mark.parametrize("along", [1.0, 2.0])
@pytest.mark.parametrize(("rank", "perpendicular"), [(1, 0), (2, 1), (8, 5), (64, 300)])
def test_the_inner_integral_is_over_the_positive_part(
    rank: int, perpendicular: int, along: float
) -> None:
    """∫(p − q)₊ dw at one S, times S. Oracle: both laws by mpmath, cut where they cross; 1e-10.

    Where p > q nowhere it is 0; both happen on both sides of S = 1.
    """
    positive = set[bool]()
    for y in np.array([-1.7, -0.6, -0.05, 0.04, 0.3, 1.1]) * 2 / math.sqrt(rank):
        found = float(joint._excess(np.array([y]), rank, perpendicular, along)[0])
        with mp.workdps(30):
            s, k, half = mp.exp(mp.mpf(y)), mp.mpf(rank) / 2, mp.mpf(perpendicular) / 2
            p = k**k * s ** (k - 1) * mp.exp(-k * s) / mp.gamma(k)
            q = mp.npdf(s, 1, mp.sqrt(mp.mpf(along) / rank))
            if perpendicular:
                # ln(p f(w/s)/s) − ln(q f(w)) = 0 at w, f the density of χ² of d freedoms
                w = (mp.log(p / q) - half * mp.log(s)) / ((1 / s - 1) / 2)
                below = [mp.gammainc(half, 0, max(w, 0) / 2 / c, regularized=True) for c in (s, 1)]
                part = [b if s < 1 else 1 - b for b in below]
                p, q = p * part[0], q * part[1]
            expected = float(max(p - q, 0) * s)
        positive.add(expected > 0)
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-14)
    assert True in positive


@pytest.mark.parametrize("rank", [1, 8, 5000])
def test_the_range_leaves_out_a_mass_of_1e_17(rank: int) -> None:
    """On each side, of the scale S ~ χ²_r/r; scipy's χ² at its ends, 1e-6."""
    for m in (1, 100):
        edges = joint._panels(rank, m, 2.0)
        ends = rank * np.exp(edges[[0, -1]])
        assert special.chdtr(rank, ends[0]) == pytest.approx(1e-17, rel=1e-6, abs=0)
        assert special.chdtrc(rank, ends[1]) == pytest.approx(1e-17, rel=1e-6, abs=0)


@pytest.mark.parametrize(("rank", "perpendicular"), [(1, 0), (8, 63), (64, 52_000), (4000, 10)])
def test_panels_are_narrow_at_the_middle(rank: int, perpendicular: int) -> None:
    """2⁻¹⁶ of the lesser of r^-1/2 and m^-1/2 next to S = 1, growing by √2, and at most .5."""
    edges = joint._panels(rank, perpendicular, 1.0)
    width = np.diff(edges)
    scale = 1 / math.sqrt(max(rank, perpendicular))
    assert np.all(width >= 0)
    assert width.max() <= 0.5 * (1 + 1e-12)
    assert 0.0 in edges
    assert np.abs(edges)[edges != 0].min() == pytest.approx(scale / 2**16, rel=1e-12)
    outer = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))
    inner = np.minimum(np.abs(edges[1:]), np.abs(edges[:-1]))
    near = (outer < 0.4) & (inner > 0)
    assert np.all(outer[near] <= math.sqrt(2) * inner[near] * (1 + 1e-12))


@pytest.mark.parametrize("along", [1.0, 2.0])
def test_panels_crowd_at_the_kinks(along: float) -> None:
    """Where the ratio at w = 0 is 1, found to rounding; ten edges on each side, six times nearer.

    Oracle: the log ratio from the densities of χ² and the Gaussian.
    """
    rank, d = 8, 5
    edges = np.linspace(-3.0, 2.5, 12)
    kinks = np.sort(joint._kinks(edges, rank, d, along))

    def ratio(y: float) -> float:
        s = math.exp(y)
        log_p = stats.gamma.logpdf(s, rank / 2, scale=2 / rank)
        return float(log_p - stats.norm.logpdf(s, 1, math.sqrt(along / rank)) - d / 2 * y)

    sign = np.sign([ratio(y) for y in edges])
    cells = np.flatnonzero(sign[1:] != sign[:-1])
    assert cells.size > 0
    assert kinks.size == 21 * cells.size
    for i in cells:
        mine = kinks[(kinks > edges[i]) & (kinks < edges[i + 1])]
        root = mine[10]
        assert ratio(root - 1e-9) * ratio(root + 1e-9) < 0
        assert root - mine[9::-1] == pytest.approx((root - edges[i]) / 6.0 ** np.arange(10, 0, -1))
        assert mine[11:] - root == pytest.approx(
            (edges[i + 1] - root) / 6.0 ** np.arange(10, 0, -1)
        )


def test_the_error_is_what_two_rules_differ_by_and_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is at most 1e-8; the distance is at most 1, which a quadrature may exceed."""
    for fine, coarse, error in ((0.5, 0.5 - 3e-10, 3.01e-10), (0.5, 0.5, 1e-12)):
        rules = {20: fine, 13: coarse}
        monkeypatch.setattr(joint, "_integrate", lambda _, nodes, *__, r=rules: r[nodes])
        found = joint_tv_to_gaussian(8, 4)
        assert found.value == fine
        assert found.error == pytest.approx(error, rel=1e-6, abs=0)
    monkeypatch.setattr(joint, "_integrate", lambda *_: 1.0 + 1e-9)
    assert joint_tv_to_gaussian(8, 4).value == 1.0
    for miss, fails in ((0.99e-8, False), (1.01e-8, True)):
        monkeypatch.setattr(joint, "_integrate", lambda _, nodes, *__, m=miss: m * (nodes == 20))
        if fails:
            with pytest.raises(
                ConvergenceError, match=r"rank 8 with 4 inputs .* error of 1\.0e-08"
            ):
                joint_tv_to_gaussian(8, 4)
        else:
            assert joint_tv_to_gaussian(8, 4).value == miss
