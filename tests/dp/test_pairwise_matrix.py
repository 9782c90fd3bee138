"""Projected matrices and bare sketches: what tells a pair apart, and two closed forms."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from lora_privacy.dp import SketchRelease, VectorProjection, matrix_projection
from lora_privacy.dp._vector_loss import VectorLoss

V, W = np.random.default_rng(20260121).standard_normal((2, 6, 3))


def gaussian_product(rng: np.random.Generator, m: int, r: int) -> np.ndarray:
    a = rng.standard_normal((r, m)) / math.sqrt(r)
    return a.T @ a


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_symmetry_tells_matrices_apart(rank: int) -> None:
    """Draws of the definition: VᵀY is symmetric under V, and far from it under V'."""
    rng = np.random.default_rng(11)
    gaps: list[float] = []
    for matrix in (V, W):
        product = V.T @ gaussian_product(rng, 6, rank) @ matrix
        gaps.append(np.abs(product - product.T).max() / np.abs(product).max())
    assert gaps[0] < 1e-12
    assert gaps[1] > 1e-3
    found = matrix_projection(V, W, rank, 0.5)
    assert found.forward == found.backward == math.inf
    assert "symmetric with probability 1" in str(found)


@pytest.mark.parametrize("change", [1e-3, 1e-8, 1e-11])
def test_a_tiny_change_is_told_apart(change: float) -> None:
    """Exact arithmetic sees it; a tolerance of float32 does not see the two smaller ones."""
    near = V + change * W
    assert math.isinf(matrix_projection(V, near, 4, 1e-5).epsilon)
    assert math.isinf(matrix_projection(V, near, 4, 1e-5, tolerance=1e-6).epsilon) is (
        change == 1e-3
    )


def test_one_zero_column_more_is_told_apart() -> None:
    """V' with one column scaled is no multiple of V."""
    other = V.copy()
    other[:, 0] *= 1.01
    assert math.isinf(matrix_projection(V, other, 4, 0.9).epsilon)


def test_rank_one_with_a_common_factor_is_the_vector_case() -> None:
    """V = v aᵀ, V' = v' aᵀ, also with the sign of a flipped; with another factor ε is infinite."""
    a = np.random.default_rng(12).standard_normal(4)
    v, w = V[:, 0], V[:, 0] + 0.2 * W[:, 0]
    cosine = float(v @ w / np.linalg.norm(v) / np.linalg.norm(w))
    ratio = float(np.linalg.norm(w) / np.linalg.norm(v))
    expected = VectorProjection(6, 5, cosine, ratio).epsilon(0.01)
    for first, second in ((np.outer(v, a), np.outer(w, a)), (np.outer(-v, -a), np.outer(w, a))):
        found = matrix_projection(first, second, 5, 0.01)
        assert found.forward == pytest.approx(expected.forward, rel=1e-9)
        assert found.backward == pytest.approx(expected.backward, rel=1e-9)
    opposite = matrix_projection(np.outer(v, a), np.outer(-w, a), 5, 0.01)
    assert math.isinf(opposite.epsilon)
    assert math.isinf(matrix_projection(np.outer(v, a), np.outer(w, a + 0.1), 5, 0.01).epsilon)


@pytest.mark.parametrize(("rank", "columns"), [(2, 3), (5, 3), (1, 2), (3, 3)])
def test_a_scaled_matrix_has_a_chi_square_loss(rank: int, columns: int) -> None:
    """KS at level 1e-4 on the loss of V against 1.3 V, from the definition of the law of A.

    The likelihood of Y is that of B = A V up to a rotation, and of A on the rest, so the loss is a
    function of the free part of A. With one degree of freedom more it must be rejected.
    """
    rng = np.random.default_rng(5)
    c, m, size = 1.3, 6, 4000
    base, _ = np.linalg.qr(V[:, :columns])
    statistic = np.empty(size)
    for i in range(size):
        a = rng.standard_normal((rank, m)) / math.sqrt(rank)
        y = a.T @ (a @ base)  # Y of a matrix with orthonormal columns
        w = base.T @ y
        rest = y - base @ w
        inverse = np.linalg.pinv(w, rcond=1e-9, hermitian=True)
        statistic[i] = rank * (np.trace(w) + np.trace(inverse @ rest.T @ rest))
    q = min(columns, rank)
    freedom = q * (m + rank - q)
    assert stats.kstest(statistic, stats.chi2(freedom).cdf).pvalue > 1e-4
    assert stats.kstest(statistic, stats.chi2(freedom + 1).cdf).pvalue < 1e-4
    loss = 0.5 * freedom * math.log(c) + 0.5 * statistic * (1 / c - 1)
    gain = -np.expm1(np.minimum(0.5 - loss, 0.0))
    law = VectorLoss(freedom, 1, 1.0, c)
    assert law.delta(0.5) == pytest.approx(gain.mean(), abs=5 * gain.std() / math.sqrt(size))
    found = matrix_projection(V[:, :columns], c * V[:, :columns], rank, 1e-4)
    assert found.forward == pytest.approx(law.epsilon(1e-4), rel=1e-6)
    assert 0 < found.forward < found.backward < math.inf


def test_a_pair_treated_as_proportional_says_so() -> None:
    """Only a product with a power of two is not rounded; any other pair may have ε = ∞."""
    for other in (V + 1e-13 * W, 3 * V, 0.1 * V):
        found = matrix_projection(V, other, 2, 1e-3, tolerance=2e-12)
        assert found.epsilon < math.inf
        assert found.method == "exact profile, of a pair treated as proportional"
        assert "treated as proportional within a relative tolerance of 2e-12" in found.pair
        assert "ε = ∞" in found.pair
    exact = matrix_projection(V, 0.5 * V, 2, 1e-3)
    assert exact.method == "exact profile"
    assert "tolerance" not in exact.pair
    column = matrix_projection(V[:, :1], 3 * V[:, :1], 2, 1e-3)
    assert "another ε" in column.pair  # vectors are not told apart surely
    assert "ε = ∞" not in column.pair


def test_a_pair_treated_as_of_rank_one_says_so() -> None:
    """An outer product is rounded; a single column is of rank one exactly."""
    found = matrix_projection(np.outer(V[:, 0], W[0]), np.outer(W[:, 1], W[0]), 5, 0.9)
    assert found.method == "exact profile, of a pair treated as of rank one"
    assert "relative tolerance of 1e-12; in exact arithmetic another pair has ε = ∞" in found.pair
    column = matrix_projection(V[:, :1], W[:, :1], 5, 0.9)
    assert column.method == "exact profile"


def test_a_tiny_singular_value_counts() -> None:
    """It may be no rounding, and a larger K is a larger ε; rows and columns of zeros do not count.

    Expected: K = q (m + r - q) by hand.
    """
    for size, freedom in ((1e-17, 4), (1e-300, 4), (0.0, 3)):
        matrix = np.diag([1.0, size])
        found = matrix_projection(matrix, 2 * matrix, 2, 1e-3)
        law = VectorLoss(freedom, 1, 1.0, 0.5)
        assert found.backward == pytest.approx(law.epsilon(1e-3), rel=1e-9)
    assert VectorLoss(4, 1, 1.0, 0.5).epsilon(1e-3) > VectorLoss(3, 1, 1.0, 0.5).epsilon(1e-3)


def test_matrices_that_need_no_proof() -> None:
    """Equal ones cost nothing; a zero one, or an opposite one, is told apart surely."""
    assert matrix_projection(V, V.copy(), 4, 1e-9).epsilon == 0
    assert "zero" in str(matrix_projection(V, 0 * V, 4, 0.9).reason)
    assert "c < 0" in str(matrix_projection(V, -2 * V, 4, 0.9).reason)
    assert math.isinf(matrix_projection(1e200 * V, 1e200 * W, 4, 0.9).epsilon)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (V, W[:, :2], "must have one shape"),
        (V[:, 0], W[:, 0], "non-empty matrix"),
        (V, W * math.nan, "must be finite"),
    ],
)
def test_shapes_and_numbers_are_checked(first: np.ndarray, second: np.ndarray, match: str) -> None:
    """By both entry points."""
    with pytest.raises(ValueError, match=match):
        matrix_projection(first, second, 4, 0.1)
    with pytest.raises(ValueError, match=match):
        SketchRelease(first, second, 4)


@pytest.mark.parametrize(
    "shapes", [((3, 2), (3, 4)), ((3, 4), (3, 2)), ((2, 3), (4, 3)), ((4, 3), (2, 3))]
)
def test_two_shapes_are_refused_in_either_order(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        matrix_projection(np.ones(shapes[0]), np.ones(shapes[1]), 2, 0.1)


def test_other_arguments_are_checked() -> None:
    """δ, rank, tolerance, orders, and gradients that are all zero."""
    with pytest.raises(ValueError, match="delta must lie in"):
        matrix_projection(V, W, 4, 1.0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        matrix_projection(V, W, 0, 0.1)
    with pytest.raises(ValueError, match="tolerance must lie in"):
        matrix_projection(V, W, 4, 0.1, tolerance=0.1)
    with pytest.raises(ValueError, match="gradient_prime must not be all zero"):
        SketchRelease(V, 0 * V, 4)
    with pytest.raises(ValueError, match="orders must be"):
        SketchRelease(V.T, W.T, 4).rdp([1.0])
    with pytest.raises(ValueError, match="delta must lie in"):
        SketchRelease(V.T, W.T, 4).epsilon(0.0)


def moment(p: Any, q: Any, order: float) -> float:
    """∫ p^α q^{1-α} over the line."""

    def integrand(x: float) -> float:
        return math.exp(order * p.logpdf(x) + (1 - order) * q.logpdf(x))

    return integrate.quad(integrand, -60, 60, epsabs=0, epsrel=1e-12, limit=500)[0]


def test_sketch_divergence_matches_quadrature() -> None:
    """Oracle: ∫ p^α q^{1-α} of two normals by adaptive quadrature; 1e-9 relative."""
    g, h = np.array([[1.0, 2.0, 2.0]]), np.array([[2.0, 2.0, 1.5]])
    s, t = float(g[0] @ g[0]), float(h[0] @ h[0])
    release = SketchRelease(g, h, 4)
    for backward, (one, two) in ((False, (s, t)), (True, (t, s))):
        for order in (1.5, 2.0, 4.0):
            p, q = stats.norm(0, math.sqrt(one)), stats.norm(0, math.sqrt(two))
            if order * two + (1 - order) * one <= 0:
                assert math.isinf(release.rdp(order, backward=backward))
                continue
            total = moment(p, q, order)
            expected = 4 * math.log(total) / (order - 1)
            got = float(release.rdp(order, backward=backward))
            assert got == pytest.approx(expected, rel=1e-9, abs=0)


def test_sketch_divergence_matches_determinants() -> None:
    """Oracle: the formula in determinants, for square full ranks; backward exchanges the two."""
    g, h = np.random.default_rng(13).standard_normal((2, 3, 20))
    s, t = g @ g.T, h @ h.T
    release = SketchRelease(g, h, 8)
    for order in (1.1, 1.5):
        for backward, (a, b) in ((False, (s, t)), (True, (t, s))):
            mixed = order * b + (1 - order) * a
            value = math.inf
            if np.linalg.eigvals(np.linalg.solve(a, mixed)).real.min() > 0:
                logs = [np.linalg.slogdet(x)[1] for x in (mixed, b, a)]
                value = 8 / (2 * (1 - order)) * (logs[0] - order * logs[1] - (1 - order) * logs[2])
            assert float(release.rdp(order, backward=backward)) == pytest.approx(value, rel=1e-9)


def test_sketch_bound_holds_for_its_law() -> None:
    """Draws of the sketch: the tail of its loss beyond ε, weighted, stays below δ.

    At a third of ε it does not, so the bound is not vacuous.
    """
    rng = np.random.default_rng(3)
    g = rng.standard_normal((3, 20))
    h = g + 0.3 * rng.standard_normal((3, 20))
    rank, delta, size = 8, 0.01, 100_000
    found = SketchRelease(g, h, rank).epsilon(delta)
    for epsilon, (one, two) in ((found.forward, (g, h)), (found.backward, (h, g))):
        s, t = one @ one.T / rank, two @ two.T / rank
        y = np.einsum("ij,skj->ski", np.linalg.cholesky(s), rng.standard_normal((size, rank, 3)))
        loss = (
            stats.multivariate_normal(np.zeros(3), s).logpdf(y)
            - stats.multivariate_normal(np.zeros(3), t).logpdf(y)
        ).sum(axis=1)

        def delta_at(level: float, loss: np.ndarray = loss) -> float:
            return float(-np.expm1(np.minimum(level - loss, 0.0)).mean())

        assert delta_at(epsilon) <= delta
        assert delta_at(epsilon / 3) > delta
    assert found.epsilon == max(found.forward, found.backward)
    assert "upper bound" in found.method


def test_sketches_with_other_ranges_are_told_apart() -> None:
    """A new direction, a lost one, or tall gradients; the same range in other numbers is not."""
    rng = np.random.default_rng(14)
    g = rng.standard_normal((4, 2)) @ rng.standard_normal((2, 9))  # rank 2 of 4
    same = g @ rng.standard_normal((9, 9))
    assert SketchRelease(g, same, 3).epsilon(1e-3).epsilon < math.inf
    new, lost = rng.standard_normal((4, 9)), np.outer(g[:, 0], np.ones(9))
    for other in (new, lost):
        found = SketchRelease(g, other, 3).epsilon(0.5)
        assert math.isinf(found.epsilon)
        assert "column spaces" in str(found)
        assert np.isinf(SketchRelease(g, other, 3).rdp([1.5, 2.0])).all()
    assert math.isinf(SketchRelease(V, W, 3).epsilon(0.5).epsilon)


def test_a_sketch_names_the_tolerance_of_its_ranges() -> None:
    """A part out of range of 1e-16 passes for rounding; full row ranks have one range surely."""
    g = np.zeros((4, 9))
    g[:2] = np.random.default_rng(15).standard_normal((2, 9))
    h = 1.1 * g
    h[2, 0] = 1e-16
    found = SketchRelease(g, h, 3).epsilon(0.5)
    assert found.epsilon < math.inf
    assert "column spaces treated as equal within a relative tolerance of 1.6e-14" in found.pair
    assert "ε = ∞" in found.pair
    assert "tolerance" not in SketchRelease(V.T, W.T, 3).epsilon(0.5).pair
    h[2, 0] = 1e-12
    assert math.isinf(SketchRelease(g, h, 3).epsilon(0.5).epsilon)


def test_equal_sketches_cost_nothing() -> None:
    """Also the divergences."""
    release = SketchRelease(V, V.copy(), 8)
    assert release.epsilon(1e-9).epsilon == 0
    assert float(release.rdp(1e6)) == 0
