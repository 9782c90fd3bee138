"""Margins and borders of bounds on pairs and families, each by itself, against its proof.

Where a margin is a few units of rounding, the unit is made 1e-3 so that it shows. The proofs:
docs/theory/projection-pairs.md.
"""

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from scipy import integrate, stats

from lora_privacy.dp import (
    NoisedProjection,
    PldAccountant,
    PrivacyBound,
    PrivacyCurve,
    SketchRelease,
    VectorFamily,
    VectorProjection,
    _family_cover,
    curve,
    families,
    matrix_pairs,
    matrix_projection,
    noised,
    pairwise,
    privacy_curve,
    vector_projection_bound,
)
from lora_privacy.dp._family_cover import FamilyCover, _lower_tail
from lora_privacy.dp._vector_loss import VectorLoss
from lora_privacy.errors import UnsupportedEventError

UNIT = 1e-3

# --- noise after the projection


def release(first: object, second: object, rank: int = 3, noise: float = 2.0) -> NoisedProjection:
    return NoisedProjection(np.array(first, float), np.array(second, float), rank, noise)


@pytest.mark.parametrize(("freedom", "tail"), [(1, 1e-12), (7, 0.3), (4000, 1e-3)])
def test_a_quantile_is_moved_outwards(freedom: int, tail: float) -> None:
    """By 1e-9 of it; oracle: the quantile of scipy.stats."""
    found = noised._upper_chi_square(freedom, tail) / stats.chi2.isf(tail, freedom)
    assert found - 1 == pytest.approx(1e-9, rel=1e-4)


def test_a_shift_is_measured_in_noise_and_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float, float]] = []

    def interval(low: float, high: float, delta: float) -> tuple[float, float]:
        asked.append((low, high, delta))
        return 1.0, 5.0

    monkeypatch.setattr(noised._gaussian, "epsilon_interval", interval)
    law = release([[1.0], [0.0]], [[0.0], [1.0]], noise=4.0)
    assert law._gaussian(6.0, 0.25) == 5.0
    (low, high, delta) = asked[0]
    assert low == high
    assert high / 1.5 - 1 == pytest.approx(1e-12, rel=1e-2)
    assert delta == 0.25
    assert law._gaussian(0.0, 0.25) == 0.0
    assert len(asked) == 1


class FakePair:
    """In place of the exact profile: what it was asked for."""

    asked: list[tuple[int, int, float, float]]

    def __init__(self, m: int, r: int, cosine: float, ratio: float) -> None:
        FakePair.asked.append((m, r, cosine, ratio))

    def epsilon(self, delta: float) -> object:
        return matrix_pairs.PairDivergence(
            epsilon=2.0, forward=1.0, backward=2.0, delta=delta, method="", pair="", references=()
        )


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, float, float]]:
    FakePair.asked = []
    monkeypatch.setattr(noised, "VectorProjection", FakePair)
    monkeypatch.setattr(NoisedProjection, "_gaussian", lambda *_: 0.0)
    return FakePair.asked


def test_the_rounding_of_residuals_reaches_their_cosine(
    pairs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M units of each column over the length of its residual; none where nothing is removed."""
    seen: list[float] = []
    inner = noised.cosine_between

    def watched(first: np.ndarray, second: np.ndarray, error: float = 0.0) -> float:
        seen.append(error)
        return inner(first, second, 0.0)

    monkeypatch.setattr(noised, "cosine_between", watched)
    monkeypatch.setattr(noised, "_EPS", 1e-12)
    first = [[3.0, 1.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    second = [[-7.0, 1.0], [0.0, 0.0], [0.2, 0.0], [0.1, 0.0]]
    assert len(release(first, second)._split(0.1)) == 4
    one, two = 0.5, math.hypot(0.2, 0.1)
    expected = 4 * 1e-12 * (math.hypot(3.0, one) / one + math.hypot(7.0, two) / two)
    assert seen == pytest.approx([expected], rel=1e-12)
    assert pairs[0][:2] == (3, 2)
    assert pairs[0][2:] == pytest.approx((0.0, two / one), abs=1e-12)
    seen.clear()
    assert release([[3.0], [0.5]], [[1.0], [0.2]])._split(0.1) == [(1.0, 2.0)]
    assert seen == [0.0]
    assert pairs[1][:2] == (2, 3)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("size", "found"), [(1.1e-8, 4), (0.9e-8, 0)])
def test_either_residual_may_be_too_small(
    which: int, size: float, found: int, pairs: list
) -> None:
    """1e-8 of its own column: the other column may be far longer or far shorter."""
    for scale in (1e-3, 1e3):
        small = np.array([[1.0, 1.0], [size, 0.0], [0.0, 0.0]])
        other = np.array([[1.0, 1.0], [0.0, 0.0], [0.7, 0.0]])
        other[:, 0] *= scale
        matrices = [small, other] if which == 0 else [other, small]
        assert len(release(*matrices)._split(0.1)) == found


def test_a_split_needs_rank_and_room(pairs: list) -> None:
    """K < min(r, m), k the rank of the other columns; in one dimension the cosine is ±1."""
    v = np.eye(3)[:, [2, 0, 1]]
    w = v.copy()
    w[:, 0] = (0.0, 0.5, -2.0)
    assert release(v, w, rank=2)._split(0.1) == []
    assert len(release(v, w, rank=3)._split(0.1)) == 4
    assert pairs == [(1, 1, -1.0, 2.0)]
    u = np.eye(3)[:, [0, 0, 1, 2]]
    assert release(u, u + np.eye(4)[0] * 0.5, rank=9)._split(0.1) == []


def test_directions_above_rounding_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values beyond max(shape) units of the largest; at any scale of the columns."""
    monkeypatch.setattr(noised, "_EPS", UNIT)
    for shape in ((5, 2), (2, 5)):
        for part, rank in ((1.05, 2), (0.95, 1)):
            others = np.zeros(shape)
            others[0, 0], others[1, 1] = 1.0, part * 5 * UNIT
            for scale in (1.0, 1e300, 1e-300):
                basis = NoisedProjection._span(scale * others)
                assert basis is not None
                assert basis.shape == (shape[0], rank)
                assert np.abs(basis[:2, :rank]) == pytest.approx(np.eye(2)[:, :rank], abs=1e-12)
    assert NoisedProjection._span(np.zeros((3, 2))) is None


def test_norms_neither_overflow_nor_vanish() -> None:
    for scale in (1.0, 1e300, 1e-300):
        assert NoisedProjection._norm(scale * np.array([3.0, -4.0])) == pytest.approx(5 * scale)
    assert NoisedProjection._norm(np.zeros(3)) == 0.0


def test_the_norm_of_what_is_shown() -> None:
    """‖F‖ ‖FΔ‖ for four events of a quarter each; oracle: Davidson & Szarek and χ² quantiles."""
    v = np.random.default_rng(50).standard_normal((12, 3))
    law = release(v, v, rank=7)
    for k, failure in ((1, 0.04), (5, 1e-6)):
        inner, outer = np.array([0.3, 0.4]), np.array([0.0, 1.2, 0.5])
        part = failure / 4
        t = math.sqrt(-2 * math.log(part))
        shown = (1 + (math.sqrt(k) + t) / math.sqrt(7)) ** 2
        shown += ((math.sqrt(k) + math.sqrt(12 - k) + t) / math.sqrt(7)) ** 2
        length = 0.5 * math.sqrt(stats.chi2.isf(part, 7) / 7)
        length += 1.3 * math.sqrt(stats.chi2.isf(part, k) / 7)
        expected = math.sqrt(shown) * length
        assert law._shown(k, inner, outer, failure) / expected - 1 == pytest.approx(
            5e-10, rel=0.01
        )


def test_the_best_of_all_bounds_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its larger direction counts, its method names it, and an infinite one has a reason."""
    monkeypatch.setattr(NoisedProjection, "_revealed", lambda *_: (5.0, 4.0))
    monkeypatch.setattr(NoisedProjection, "_split", lambda *_: [(1.0, 9.0), (3.0, 4.5)])
    law = release([[1.0], [0.0]], [[0.0], [1.0]])
    found = law.epsilon(0.1)
    assert (found.epsilon, found.forward, found.backward) == (4.5, 3.0, 4.5)
    assert found.method == "upper bound, split"
    assert found.reason is None
    monkeypatch.setattr(NoisedProjection, "_split", lambda *_: [])
    assert law.epsilon(0.1).method == "upper bound, A revealed"
    monkeypatch.setattr(NoisedProjection, "_revealed", lambda *_: (math.inf, 4.0))
    assert "hides this pair" in str(law.epsilon(0.1).reason)


# --- pairs of matrices


@pytest.mark.parametrize("error", [0.0, 2e-3])
@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.02, 0.9])
def test_a_chord_is_lengthened_by_rounding(
    angle: float, side: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is 1 - chord²/2, the chord 2 sin(φ/2) made longer by 4 units and by the stated error."""
    monkeypatch.setattr(matrix_pairs, "_EPS", UNIT)
    first = np.array([1.0, 0.0])
    second = side * np.array([math.cos(angle), math.sin(angle)])
    found = matrix_pairs.cosine_between(first, second, error)
    if angle == error == 0:
        assert found == side
    else:
        chord = 2 * math.sin(angle / 2) + 4 * UNIT + error
        assert found == pytest.approx(side * (1 - chord**2 / 2), rel=1e-12)


def test_orthogonal_vectors_are_off_on_the_positive_side() -> None:
    found = matrix_pairs.cosine_between(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert 0 >= found >= -4e-15 or 0 <= found <= 4e-15


@pytest.mark.parametrize(("part", "finite"), [(0.99, True), (1.01, False)])
def test_the_tolerance_is_that_of_either_exception(part: float, finite: bool) -> None:
    """Relative to the second matrix where one is a multiple, to each of them at rank one."""
    tolerance = 1e-3
    step = part * tolerance
    first, second = np.diag([1.0, 0.0]), np.diag([5.0, 5.0 * step / math.sqrt(1 - step**2)])
    assert math.isfinite(
        matrix_projection(first, second, 2, 0.1, tolerance=tolerance).epsilon
    ) == (finite)
    # v aᵀ with a = e₁ but for a part of the first, or of the second, matrix elsewhere.
    v, w = np.array([[1.0], [0.2], [0.0]]), np.array([[1.0], [0.0], [0.3]])
    for broken in (0, 1):
        pair = []
        for i, column in enumerate((v, w)):
            matrix = np.hstack([column, np.zeros((3, 1))])
            if i == broken:
                size = float(np.linalg.norm(column))
                matrix[0, 1] = size * step / math.sqrt(1 - step**2)
                # Off the range of the first column's row, a stays e₁ to first order.
            pair.append(matrix)
        if broken == 0:
            pair[0][0, 1] = 0.0
            # A row of the first matrix that is not the largest one bends.
            size = float(np.linalg.norm(pair[0]))
            pair[0][1] = (0.2, size * step / math.sqrt(1 - step**2))
        found = matrix_projection(*pair, 4, 0.3, tolerance=tolerance)
        assert math.isfinite(found.epsilon) == finite


def test_scales_of_pairs_cancel() -> None:
    """Squares of 1e-170 or 1e170 leave doubles; ε of a pair does not change, nor that of 3 V."""
    rng = np.random.default_rng(51)
    v = rng.standard_normal((4, 1))
    w = v + 0.1 * rng.standard_normal((4, 1))
    plain = matrix_projection(v, w, 9, 0.4)
    parallel = matrix_projection(v, 3 * v, 3, 0.4)
    for scale in (1e-170, 1e170):
        found = matrix_projection(scale * v, scale * w, 9, 0.4)
        assert found.forward == pytest.approx(plain.forward, rel=1e-9)
        assert found.backward == pytest.approx(plain.backward, rel=1e-9)
        found = matrix_projection(scale * v, 3 * scale * v, 3, 0.4)
        assert found.forward == pytest.approx(parallel.forward, rel=1e-9)


def test_rows_and_columns_of_zeros_do_not_count() -> None:
    matrix = np.zeros((4, 5))
    matrix[:3, 1:3] = 1.0
    assert matrix_pairs._most_rank(matrix) == 2
    assert matrix_pairs._most_rank(matrix.T) == 2
    assert matrix_pairs._most_rank(np.ones((2, 7))) == 2


def test_rounding_of_a_sketch_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a unit of 1e-3: 8 of each logarithm of r/(2(1-α)) Σ ln(αμ+1-α) - α ln μ."""
    g, h, rank = np.diag([1.0, 2.0]), np.diag([1.5, 1.8]), 5
    law = SketchRelease(g, h, rank)
    monkeypatch.setattr(matrix_pairs, "_EPS", UNIT)
    orders = np.array([1.1, 2.0, 4.0])
    for backward in (False, True):
        found = law.rdp(orders, backward=backward)
        mu = np.array([2.25, 0.81]) ** (-1.0 if backward else 1.0)
        for alpha, value in zip(orders.tolist(), found.tolist(), strict=True):
            mixed = alpha * mu + 1 - alpha
            if mixed.min() <= 0:
                assert value == math.inf
                continue
            logs = np.log(mixed), alpha * np.log(mu)
            total = (logs[1] - logs[0]).sum() + 8e-3 * (np.abs(logs[0]) + np.abs(logs[1])).sum()
            assert value == pytest.approx(rank / 2 / (alpha - 1) * total, rel=1e-9)


def test_ranges_of_sketches_are_compared_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 max(shape) units of the second matrix may lie outside; singular values above an eighth.

    With a unit of 1e-4, and 6 columns.
    """
    monkeypatch.setattr(matrix_pairs, "_EPS", 1e-4)
    g = np.zeros((3, 6))
    g[0, 0], g[1, 1] = 1.0, 0.5
    assert matrix_pairs._range_rtol(3, 6) == matrix_pairs._range_rtol(6, 3) == pytest.approx(48e-4)
    for part, same in ((0.9, True), (1.1, False)):
        h = 2 * g
        h[2, 2] = part * 48e-4 * np.linalg.norm(h)
        h[2, 0] = 0.0
        # A third singular value that counts is a third dimension: it must not count as one.
        ratios = matrix_pairs._variance_ratios(g, h)
        assert ratios is None
        h = 2 * g
        h[2, 1] = part * 48e-4 * np.linalg.norm(h)  # leans, but spans two dimensions
        ratios = matrix_pairs._variance_ratios(g, h)
        assert (ratios is not None) == same
        if ratios is not None:
            assert sorted(ratios) == pytest.approx([4.0, 4.0], rel=1e-3)
    for part, rank in ((0.9, 1), (1.1, 2)):
        g[1, 1] = part * 6e-4
        ratios = matrix_pairs._variance_ratios(g, 2 * g)
        assert ratios is not None
        assert ratios == pytest.approx([4.0] * rank, rel=1e-9)
        lost = 2 * g
        lost[1, 1] = 2 * 1.3e-3
        assert (matrix_pairs._variance_ratios(g, lost) is not None) == (rank == 2)
    assert matrix_pairs._variance_ratios(g, g.copy()).tolist() == [1.0]


def test_the_search_over_orders_starts_at_the_divergence_of_kullback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: quadrature of p ln(p/q) of each normal coordinate of a sketch."""
    seen: list[float] = []
    inner = matrix_pairs.least_epsilon

    def watched(cost: object, plain: np.ndarray, delta: float, grid: None) -> np.ndarray:
        seen.extend(plain.tolist())
        return inner(cost, plain, delta, grid)

    monkeypatch.setattr(matrix_pairs, "least_epsilon", watched)
    g, h = np.diag([1.0, 2.0]), np.diag([1.5, 1.8])
    SketchRelease(g, h, 5).epsilon(1e-3)
    for found, (one, two) in zip(seen, ((g, h), (h, g)), strict=True):
        total = 0.0
        for i in range(2):
            p, q = one[i, i], two[i, i]
            x = np.linspace(-12 * p, 12 * p, 4001)
            log_ratio = math.log(q / p) - x**2 / 2 * (p**-2 - q**-2)
            density = np.exp(-((x / p) ** 2) / 2) / p / math.sqrt(2 * math.pi)
            total += integrate.trapezoid(density * log_ratio, x)
        assert found == pytest.approx(5 * total, rel=1e-7)


# --- pairs of vectors


@pytest.mark.parametrize(
    ("m", "r", "rho", "delta"),
    [(400, 8, 0.9999, 0.01), (400, 100, 0.9, 0.01), (5, 30, 0.99, 0.1), (9, 10, 0.999, 0.2)],
)
@pytest.mark.parametrize("slack", [1e-9, 0.01])
def test_the_closed_bound_is_the_theorem(
    m: int, r: int, rho: float, delta: float, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 2, with both quantiles moved outwards; 1e-14 of ε for rounding."""
    monkeypatch.setattr(pairwise, "_QUANTILE_SLACK", slack)
    t = stats.t.isf(delta / 3, r) * (1 + slack)
    x = stats.chi2.isf(delta / 3, m + r - 1) * (1 + slack)
    c, reach = (m - r + 1) / 2, t * math.sqrt((1 - rho**2) / r)
    first = c * math.log(rho - reach) + (1 - rho + reach) * x / (2 * (rho - reach))
    second = max(c, 0.0) * max(math.log(rho + reach), 0.0)
    found = vector_projection_bound(m, r, rho, delta)
    assert found.epsilon == pytest.approx(max(first, second, 0.0), rel=1e-11)
    assert found.forward == found.backward == found.epsilon
    if c >= 0:
        first += c * (math.log(rho + reach) - math.log(rho - reach))
        wide = vector_projection_bound(m, r, rho, delta, shape="published")
        assert wide.epsilon == pytest.approx(max(first, 0.0), rel=1e-11)


def test_both_directions_are_the_larger_one() -> None:
    law, back = VectorProjection(20, 10, 0.99, 1.2), VectorProjection(20, 10, 0.99, 1 / 1.2)
    forward, backward = law.delta(1.0, "forward"), law.delta(1.0, "backward")
    assert backward == pytest.approx(back.delta(1.0, "forward"), rel=1e-9)
    assert forward != backward
    assert law.delta(1.0) == max(forward, backward)
    same = VectorProjection(20, 10, 0.99)
    assert same.delta(1.0) == same.delta(1.0, "backward") == same.delta(1.0, "forward")


@pytest.mark.parametrize("ratio", [1e-100, 1e100])
def test_ratios_at_the_limit_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="norm_ratio must lie in"):
        VectorProjection(9, 2, 0.9, ratio)
    assert VectorProjection(9, 2, 0.9, ratio ** (1 - 1e-9)).norm_ratio


# --- covers of families


@pytest.mark.parametrize(
    ("rank", "resolution", "bins"), [(1, 0.1, 2400), (9, 1e-3, 60), (300, 1e-8, 60)]
)
def test_masses_of_the_bins(
    rank: int, resolution: float, bins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both outer bins hold 1e-4 of δ together; the rest is the law of t_r, by scipy.stats.

    With a slack of 1e-3 each tail is that much larger, the one of an inner bin the larger one.
    """
    monkeypatch.setattr(_family_cover, "_TAIL_SLACK", UNIT)
    if bins < _family_cover._BINS:
        monkeypatch.setattr(_family_cover, "_BINS", bins)
    cover = FamilyCover(7, rank, resolution)
    half = bins // 2
    tangents, masses = cover._tangents, cover._masses
    assert len(tangents) == bins + 1
    assert len(masses) == bins + 2
    assert np.all(np.diff(tangents) > 0)
    assert tangents[half] == 0
    assert tangents == pytest.approx(-tangents[::-1], abs=0)
    assert masses == pytest.approx(masses[::-1], rel=1e-15)
    assert masses[0] == pytest.approx(resolution * 1e-4 / 2 * (1 + UNIT), rel=1e-9)
    tails = stats.t.cdf(tangents[: half + 1] * math.sqrt(rank), rank)
    expected = np.diff(tails) + UNIT * tails[1:]
    assert masses[1 : half + 1] == pytest.approx(expected, rel=1e-9, abs=1e-13)
    # Equal steps of the normal score.
    scores = stats.norm.ppf(tails)
    assert np.diff(scores) == pytest.approx(np.full(half, -scores[0] / half), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 7, 500])
def test_tails_of_the_angle_keep_their_digits(rank: int) -> None:
    """On both sides of where the two forms meet; oracle: mpmath at 40 digits.

    No bin is closer to 0 than 1e-3 / √r.
    """
    tangents = -np.array([1e-3 / math.sqrt(rank), 1e-2, 0.0999, 0.1001, 0.7, 30.0])
    with mp.workdps(40):
        expected = [
            float(
                mp.betainc(
                    mp.mpf(rank) / 2, mp.mpf(1) / 2, 0, 1 / (1 + mp.mpf(t) ** 2), regularized=True
                )
                / 2
            )
            for t in tangents.tolist()
        ]
    assert _lower_tail(rank, tangents) == pytest.approx(expected, rel=3e-13, abs=0)


@pytest.mark.parametrize("unit", [0.0, UNIT])
def test_ranges_of_the_ratio_over_a_cell(unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """R = ν (cos φ + tan θ sin φ): least and largest over a fine grid of the cell and its bin.

    With a unit of 1e-3 the two terms, the largest at φ = θ, and the product are moved by it.
    """
    monkeypatch.setattr(_family_cover, "_ROUNDING", unit)
    cover = FamilyCover(7, 3, 0.1)
    tangents = np.array([-2.0, -0.3, 0.0, 0.2, 0.6, 5.0])
    object.__setattr__(cover, "_tangents", tangents)
    angles, ratios = np.array([[0.1, 0.5], [0.7, 0.7]]), np.array([[0.9, 1.2], [1.5, 1.5]])
    low, high = cover._ranges(angles, ratios)
    assert low.shape == high.shape == (2, 5)
    for i, j in itertools.product(range(2), range(5)):
        grid = np.linspace(*angles[i], 2001)
        left, right = tangents[j], tangents[j + 1]
        least = np.cos(grid) + left * np.sin(grid)
        most = np.cos(grid) + right * np.sin(grid)
        at_end = np.argmin(least)
        margin = unit * (1 + abs(left * math.sin(grid[at_end])))
        if unit == 0:
            assert low[i, j] == pytest.approx(ratios[i, 0] * least.min(), rel=1e-12)
            assert high[i, j] == pytest.approx(ratios[i, 1] * most.max(), rel=1e-6)
            continue
        assert low[i, j] == pytest.approx(ratios[i, 0] * (least.min() - margin) * (1 - unit))
        inside = angles[i, 0] <= math.atan(right) <= angles[i, 1]
        at = grid[np.argmax(most)]
        margin = unit * most.max() if inside else unit * (1 + abs(right * math.sin(at)))
        assert high[i, j] == pytest.approx(
            ratios[i, 1] * (most.max() + margin) * (1 + unit), rel=1e-6
        )


def q_integral(k: int, of: object, start: float, end: float) -> float:
    """∫ of(q) f_k(q) dq over the interval, by a rule of many nodes in √q."""
    s, w = np.polynomial.legendre.leggauss(400)
    top = min(end, k + 60 * math.sqrt(k) + 400)
    cuts = np.linspace(math.sqrt(start), math.sqrt(top), 9) if top > start else [0.0]
    total = 0.0
    for a, b in itertools.pairwise(cuts):
        root = (a + b) / 2 + (b - a) / 2 * s
        density = stats.chi2.pdf(root**2, k) * 2 * root
        total += float((w * of(root**2) * density).sum() * (b - a) / 2)
    return total


LINES = [
    (20, 5, 0.7, 1.1, 0.5, 0.0, math.inf),
    (20, 5, 0.7, 1.1, 0.5, 10.0, 35.0),
    (20, 5, 1.6, 1.0, 0.5, 0.0, 30.0),
    (20, 5, 1.6, 1.3, 4.0, 0.0, math.inf),
    (3, 9, 0.6, 0.8, 0.4, 0.0, math.inf),
    (3, 9, 1.2, 1.5, 0.1, 2.0, 40.0),
    (9, 10, 0.5, 0.9, 1.0, 0.0, 50.0),
    (20, 5, 1.0, 1.0, 0.5, 0.0, math.inf),
    (20, 5, 1.0, 1.5, 0.5, 3.0, 30.0),
]


@pytest.mark.parametrize(("m", "r", "ratio", "nu", "epsilon", "start", "end"), LINES)
def test_the_share_of_one_line(
    m: int,
    r: int,
    ratio: float,
    nu: float,
    epsilon: float,
    start: float,
    end: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: (1 - e^{ε - line})₊ against the χ² density, by quadrature; then with its margins.

    A slack of 1e-3 adds that much of a tail to the mass, and takes twice that from what is saved.
    """
    monkeypatch.setattr(_family_cover, "_TAIL_SLACK", 0.0)
    cover, k, c = FamilyCover(m, r, 0.1), m + r - 1, (m + 1 - r) / 2

    def loss(q: np.ndarray) -> np.ndarray:
        return (r - 1) * math.log(nu) + c * math.log(ratio) + q / 2 * (1 / ratio - 1)

    def share(q: np.ndarray) -> np.ndarray:
        return -np.expm1(np.minimum(epsilon - loss(q), 0.0))

    slope = (1 / ratio - 1) / 2
    constant = float(loss(np.zeros(1))[0])
    if slope:
        at = (epsilon - constant) / slope
        begin, stop = (max(start, at), end) if slope > 0 else (start, min(end, at))
    else:
        begin, stop = (start, end) if constant > epsilon else (0.0, 0.0)
    begin = max(begin, 0.0)
    expected = q_integral(k, share, begin, max(stop, begin))
    arguments = [np.array([v]) for v in (ratio, math.log(nu), start, end)]
    found = cover._line(epsilon, *arguments)[0]
    assert found == pytest.approx(expected, rel=2e-8, abs=1e-11)
    monkeypatch.setattr(_family_cover, "_TAIL_SLACK", UNIT)
    more = cover._line(epsilon, *arguments)[0]
    if begin >= stop:
        assert more == 0
        return

    def tail(a: float, b: float) -> float:
        return stats.chi2.sf(a, k) if a > k else stats.chi2.cdf(b, k)

    mass = stats.chi2.cdf(stop, k) - stats.chi2.cdf(begin, k) + UNIT * tail(begin, stop)
    p, q = begin / ratio, stop / ratio
    saved = max(stats.chi2.cdf(q, k) - stats.chi2.cdf(p, k) - UNIT * tail(p, q), 0.0)
    saved *= math.exp(epsilon + (r - 1) * math.log(ratio / nu)) * (1 - UNIT)
    assert more == pytest.approx(min(max(mass - saved, 0.0), 1.0), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    ("m", "r", "low", "high"),
    [(20, 5, 0.7, 1.3), (20, 5, 0.9, 0.9), (3, 9, 0.6, 0.8), (9, 10, 0.5, 1.4), (20, 5, 1.1, 1.6)],
)
def test_the_envelope_is_the_larger_of_two_lines(m: int, r: int, low: float, high: float) -> None:
    """Oracle: E_Q (1 - e^{ε - max})₊ by quadrature."""
    k, c, epsilon, top = m + r - 1, (m + 1 - r) / 2, 0.6, 0.05

    def share(q: np.ndarray) -> np.ndarray:
        lines = [c * math.log(g) + q / 2 * (1 / g - 1) for g in (low, high)]
        return -np.expm1(np.minimum(epsilon - (r - 1) * top - np.maximum(*lines), 0.0))

    found = FamilyCover(m, r, 0.1)._envelope(
        epsilon, np.array([low]), np.array([high]), np.array([top])
    )
    assert found[0] == pytest.approx(q_integral(k, share, 0.0, math.inf), rel=1e-3, abs=1e-12)


def test_a_cell_counts_bins_that_may_flip_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where R <= 0 is possible a bin counts in full, and both outer bins always do.

    ε is lowered by 1e-12 of it and by 1e-14 of each degree of freedom.
    """
    asked: list[float] = []

    def envelope(
        _self: object, epsilon: float, low: np.ndarray, _high: np.ndarray, top: np.ndarray
    ) -> np.ndarray:
        asked.append(epsilon)
        assert np.all(low > 0)
        assert top == pytest.approx(np.full(low.shape, math.log(1.2)))
        return np.full(low.shape, 0.25)

    monkeypatch.setattr(FamilyCover, "_envelope", envelope)
    cover = FamilyCover(5000, 9, 0.1)
    angles, ratios = np.array([[0.2, 0.5]]), np.array([[0.9, 1.2]])
    low, _ = cover._ranges(angles, ratios)
    found = cover.delta(2.0, angles, ratios)
    inner = np.where(low[0] > 0, 0.25, 1.0) @ cover._masses[1:-1]
    assert found[0] == pytest.approx(inner + cover._masses[0] + cover._masses[-1], rel=1e-12)
    assert 2.0 - asked[0] == pytest.approx(2e-12 + 5008e-14, rel=1e-4)
    monkeypatch.setattr(FamilyCover, "_ranges", lambda *_: (-np.ones((1, 2400)),) * 2)
    assert cover.delta(2.0, angles, ratios)[0] == 1.0


def test_a_family_is_covered_in_both_orders() -> None:
    """Each range of ratios and its inverse, once, up to the widest angle and its rounding."""
    family = VectorFamily(20, 5, 0.4, (0.8, 1.5))
    widest = math.acos(0.4)
    roots = family._roots()
    assert [cell[2:] for cell in roots] == [(1 / 1.5, 1 / 0.8), (0.8, 1.5)]
    for low, high, _, _ in roots:
        assert low == 0.0
        assert widest + 1e-15 <= high <= widest * (1 + 4e-15)
    assert len(VectorFamily(20, 5, 0.4, (0.5, 2.0))._roots()) == 1
    assert VectorFamily(20, 5, -1.0, (1.0, 1.0))._roots()[0][1] == math.pi


def test_samples_hold_the_corners() -> None:
    """Angles from the widest to 0, with both ends of the ratios, their middle, and 1 between."""
    family = VectorFamily(20, 5, 0.4, (0.8, 1.5))
    samples = list(family._samples())
    angles = {a for a, _ in samples}
    assert angles == {math.acos(0.4) * part for part in (1.0, 0.7, 0.4, 0.1, 0.01, 0.0)}
    ratios = {n for _, n in samples}
    middle = math.sqrt(0.8 * 1.5)
    inverse = {1 / 1.5, math.sqrt(1 / 1.5 / 0.8), 1 / 0.8}
    assert sorted(ratios) == pytest.approx(sorted({0.8, 1.0, middle, 1.5} | inverse))
    assert len(samples) == 2 * 6 * 4  # a ratio of 1 is in both ranges
    one = VectorFamily(20, 5, 0.4, (1.0, 1.0))
    assert {n for _, n in one._samples()} == {1.0}


def test_the_widest_angle_has_the_declared_cosine() -> None:
    """cos(acos(ρ)) may be rounded; any other angle has its own cosine."""
    family = VectorFamily(20, 5, 0.1, (1.0, 1.0))
    assert family._loss(math.acos(0.1), 1.0) == VectorLoss(20, 5, 0.1, 1.0)
    assert family._loss(0.3, 1.2) == VectorLoss(20, 5, math.cos(0.3), 1.2)


def test_a_delta_at_the_floor_is_refused_before_any_search() -> None:
    family = VectorFamily(20, 3, 0.9, (1.0, 1.0))
    floor = VectorProjection(20, 3, 0.9).floor
    assert "least cosine" in str(family._no_bound(floor * (1 + 0.9e-9)))
    assert family._no_bound(floor * (1 + 1.1e-9)) is None


@pytest.mark.parametrize("wide", [0, 1])
def test_a_cell_is_halved_where_it_is_wide(wide: int) -> None:
    """At the middle of its angles, or the geometric one of its ratios."""
    family = VectorFamily(20, 5, 0.4, (0.8, 1.5))
    cell = (0.1, 0.9, 1.0, 1.001) if wide == 0 else (0.1, 0.101, 0.8, 1.5)
    one, two = family._split(cell)
    if wide == 0:
        assert one == (0.1, 0.5, 1.0, 1.001)
        assert two == (0.5, 0.9, 1.0, 1.001)
    else:
        middle = math.sqrt(0.8 * 1.5)
        assert one == (0.1, 0.101, 0.8, middle)
        assert two == (0.1, 0.101, middle, 1.5)


@pytest.mark.parametrize(("m", "r"), [(768, 8), (5, 60), (400, 400), (3, 1)])
@pytest.mark.parametrize("widest", [1e-4, 0.8])
def test_a_cell_is_halved_along_the_side_that_moves_the_loss(
    m: int, r: int, widest: float
) -> None:
    """By the derivatives at R = 1 of (r-1) ln ν + c ln R + (Q/2)(1/R - 1), R = ν g.

    There Q - (m+r-1) is 4 standard deviations √(2(m+r)), and tan θ = 4/√r, so that g moves with φ
    by tan θ + φ at most. 2 % to either side of where both move it equally the other one is halved.
    """
    by_r = abs((m + 1 - r) / 2 - ((m + r - 1) + 4 * math.sqrt(2 * (m + r))) / 2)
    by_angle = (4 / math.sqrt(r) + widest) * by_r * widest / 10
    by_ratio = by_r + (r - 1)
    family = VectorFamily(m, r, 0.4, (0.8, 1.5))
    for factor, halved in ((0.98, "angle"), (1.02, "ratio")):
        cell = (0.9 * widest, widest, 1.0, math.exp(by_angle / by_ratio * factor))
        one, _ = family._split(cell)
        assert (one[1] < widest) == (halved == "angle")


def test_bins_follow_the_level_of_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for the power of ten below it, at most .1, once for each; a level of 0 has bins too."""
    made: list[float] = []

    class Cover:
        def __init__(self, m: int, r: int, resolution: float) -> None:
            assert (m, r) == (20, 5)
            made.append(resolution)

    levels = (0.5, 0.03, 0.012, 2e-7, 1e-7, 0.0)
    monkeypatch.setattr(families, "FamilyCover", Cover)
    monkeypatch.setattr(families, "_cover", lambda _c, _e, _cells: np.full(1, 0.02))

    def certify(_self: object, _w: object, excess: object, limit: float, grain: float) -> tuple:
        assert (limit, grain) == (1.0, 1e-13)
        with np.errstate(divide="ignore"):
            found = [float(excess(np.float64(level), [])[0]) for level in levels]
        assert found[:5] == pytest.approx([0.02 / level for level in levels[:5]])
        return 0.25, 0.01

    monkeypatch.setattr(VectorFamily, "_certify", certify)
    bound = VectorFamily(20, 5, 0.9, (1.0, 1.0)).delta(1.0)
    assert made == pytest.approx([0.1, 0.01, 1e-7, 1e-290], rel=1e-9, abs=0)
    assert bound.delta == 0.25
    assert bound.reason is None
    monkeypatch.setattr(VectorFamily, "_certify", lambda *_: (1.0, None))
    bound = VectorFamily(20, 5, 0.9, (1.0, 1.0)).delta(1.0)
    assert bound.delta == 1
    assert "no δ below 1 is certified at ε = 1.0" in str(bound.reason)


def test_pairs_below_the_level_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """δ at the level says that their ε is below it; only what raises the level is searched for."""
    searched: list[float] = []
    checked: list[float] = []

    class Loss:
        def __init__(self, _m: int, _r: int, _cosine: float, nu: float) -> None:
            self.true = 2.0 + 3.0 * abs(math.log(nu))

        def epsilon(self, delta: float) -> float:
            assert delta == 0.1
            searched.append(self.true)
            return self.true

        def delta(self, epsilon: float) -> float:
            checked.append(epsilon)
            return 0.1 if epsilon >= self.true else 0.11

    monkeypatch.setattr(families, "VectorLoss", Loss)
    monkeypatch.setattr(families, "_cover", lambda _c, _e, cells: np.zeros(len(cells)))
    monkeypatch.setattr(families, "projected_sign_flip", lambda _r, _c: 0.0)
    family = VectorFamily(20, 5, 0.4, (1.0, 2.0))
    found = family.epsilon(0.1)
    worst = 2.0 + 3.0 * math.log(2.0)
    assert found.epsilon == pytest.approx(1.01 * worst)
    # The first sample, and then those above it only.
    assert len(searched) <= 2
    assert len(searched) + len(checked) >= len(list(family._samples()))
    assert all(level > 0 for level in checked)


def certified(
    true: float, cells_needed: int, family: VectorFamily, seen: list[float]
) -> tuple[float, float | None]:
    """Certify a level of ``true`` at every pair, where cells above a size are not yet proved."""
    start = family._roots()[0]
    area = (start[1] - start[0]) / cells_needed

    def worst(_angle: float, _ratio: float, found: float) -> float:
        return true if found < true else 0.0

    def excess(level: float, cells: list) -> np.ndarray:
        seen.append(level)
        return np.array(
            [0.5 if c[1] - c[0] <= area * 1.01 and level >= true else 2.0 for c in cells]
        )

    return family._certify(worst, excess, 100.0, 0.1)


def test_a_level_is_one_per_cent_above_the_worst_pair() -> None:
    """Or .001 where that is more; all cells are proved, and no more than needed are asked for."""
    family = VectorFamily(20, 5, 0.4, (1.0, 1.0))
    for true, level in ((5.0, 5.05), (0.02, 0.021)):
        seen: list[float] = []
        assert certified(true, 8, family, seen) == pytest.approx((level, 0.01))
        assert len(seen) <= 1 + 1 + 1 + 1
    assert certified(200.0, 8, family, []) == (100.0, None)


def test_looser_levels_are_tried_when_cells_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 5, 25 and 100 % above the worst pair; then none."""
    family = VectorFamily(20, 5, 0.4, (1.0, 1.0))
    seen: list[float] = []
    assert certified(5.0, 10**9, family, seen) == (100.0, None)
    assert sorted(set(seen)) == pytest.approx([5.05, 5.25, 6.25, 10.0])
    monkeypatch.setattr(families, "_MAX_CELLS", 20)
    seen.clear()
    certified(5.0, 10**9, family, seen)
    # Two cells each are pushed for every one that is open, eight at a time.
    assert len(seen) == 4 * 4


# --- curves


def bound(epsilon: float, delta: float, **changes: object) -> PrivacyBound:
    fields = {
        "epsilon": epsilon,
        "delta": delta,
        "adjacency": "add-remove",
        "method": "rdp",
        "assumptions": (),
        "references": (),
    }
    return PrivacyBound(**{**fields, **changes})


def test_lines_of_a_trade_off_are_rounded_down() -> None:
    """1 - δ - e^ε α and e^-ε (1 - δ - α), less 1e-15."""
    one = PrivacyCurve((bound(1.0, 0.25),))
    for rate in (0.0, 0.01, 0.3, 0.7):
        true = max(0.75 - math.e * rate, math.exp(-1.0) * (0.75 - rate), 0.0)
        assert one.trade_off(rate) == pytest.approx(max(true - 1e-15, 0.0), rel=0, abs=2.3e-16)
    assert one.trade_off(0.0) < 0.75


def test_the_advantage_is_rounded_up() -> None:
    """By 1e-15 and one double; the best of several bounds, and at most 1."""
    first, second = bound(0.1, 1e-3), bound(3.0, 1e-9)
    for pair in ((first, second), (second, first), (first,)):
        true = math.tanh(0.05) + 1e-3 * (1 - math.tanh(0.05))
        found = PrivacyCurve(pair).advantage()
        assert found - true == pytest.approx(1e-15, abs=1e-17)
    assert PrivacyCurve((bound(800.0, 0.9),)).advantage() == 1.0


class Steps:
    """A history whose ε is infinite below some δ."""

    def __init__(self, least: float, epsilon: float = 2.0) -> None:
        self.least, self.end, self.asked = least, epsilon, list[float]()

    def epsilon(self, delta: float) -> PrivacyBound:
        self.asked.append(delta)
        if delta < self.least:
            return bound(math.inf, delta, reason="too little noise.")
        return bound(self.end, delta)

    def delta(self, epsilon: float) -> PrivacyBound:
        self.asked.append(epsilon)
        return bound(epsilon, 0.5 * math.exp(-epsilon))


def test_a_curve_ends_where_something_is_proved() -> None:
    """Ten times larger δ, up to .1; equally spaced ε from 0."""
    history = Steps(3e-4)
    found = privacy_curve(history, least_delta=1e-6, points=5)
    assert history.asked == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 0.0, 0.5, 1.0, 1.5])
    assert [b.epsilon for b in found.bounds] == [0.0, 0.5, 1.0, 1.5, 2.0]
    history = Steps(0.2)
    with pytest.raises(UnsupportedEventError, match=r"up to δ = 0\.1\. too little"):
        privacy_curve(history, least_delta=1e-2)
    assert history.asked == pytest.approx([0.01, 0.1])
    history = Steps(0.0, 0.0)
    assert [b.epsilon for b in privacy_curve(history, points=2).bounds] == [0.0, 0.0]


def test_chords_are_straight_in_the_exponential() -> None:
    """δ = .9 - .2 e^ε is met; it is 1 before the first point, and stands still after the last."""
    at = np.array([0.1, 0.4, 1.0])
    delta = 0.9 - 0.2 * np.exp(at)
    asked = np.array([0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 5.0, 900.0])
    found = curve._chord(at, delta, asked)
    inside = 0.9 - 0.2 * np.exp(np.clip(asked, 0.1, 1.0))
    assert found == pytest.approx(np.where(asked < 0.1, 1.0, inside), rel=1e-14)
    single = curve._chord(at[:1], delta[:1], asked[:4])
    assert single == pytest.approx([1.0, delta[0], delta[0], delta[0]])


def test_a_curve_takes_the_best_grid_at_each_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids for the end, a middle one, 1e-3 and .3; the last where δ(0) is so large.

    Each is the worse of both directions, and ε is lowered by 1e-12 before it is looked up.
    """
    levels: list[float] = []
    looked: list[np.ndarray] = []

    def points(_sources: object, level: float) -> list[tuple[np.ndarray, float]]:
        levels.append(level)
        return [(np.array([0.0]), level), (np.array([0.0]), 0.5)]

    def chord(_at: np.ndarray, size: float, epsilons: np.ndarray) -> np.ndarray:
        looked.append(epsilons)
        base = 0.35 if size == 0.5 else 0.2 + abs(math.log10(size) + 3) / 10
        return base * np.exp(-epsilons)

    monkeypatch.setattr(curve._solve, "upper_points", points)
    monkeypatch.setattr(curve, "_chord", chord)
    monkeypatch.setattr(PldAccountant, "_sources", lambda _: (None, []))
    epsilons = np.array([0.0, 1.0, 2.0])
    end = bound(3.0, 1e-5, method="pld")
    found = curve._from_grids(PldAccountant(), epsilons, end)
    assert levels == pytest.approx([1e-5, 1e-4, 1e-3, 0.3])
    assert looked[0] == pytest.approx(epsilons * (1 - 1e-12), rel=1e-15)
    assert looked[0][1] < 1 - 0.9e-12
    expected = 0.35 * np.exp(-looked[0])
    assert [b.delta for b in found] == pytest.approx(expected.tolist(), rel=1e-14)
    assert [b.epsilon for b in found] == [0.0, 1.0, 2.0]
    assert all(b.reason is None for b in found)
    levels.clear()
    monkeypatch.setattr(curve, "_chord", lambda _a, _s, e: np.full(e.shape, 0.29))
    curve._from_grids(PldAccountant(), epsilons, end)
    assert levels == pytest.approx([1e-5, 1e-4, 1e-3])
    monkeypatch.setattr(curve, "_chord", lambda _a, _s, e: np.full(e.shape, 2.0))
    found = curve._from_grids(PldAccountant(), epsilons, end)
    assert [b.delta for b in found] == [1.0] * 3
    assert all("no δ below 1" in str(b.reason) for b in found)
    monkeypatch.setattr(curve, "_chord", lambda _a, _s, e: np.full(e.shape, 1e-9))
    assert [b.delta for b in curve._from_grids(PldAccountant(), epsilons, end)] == [1e-5] * 3
