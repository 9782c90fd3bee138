"""The certified maximum over a declared family: never below a pair, rarely far above one."""

import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_privacy.dp import PrivacyBound, VectorFamily, VectorProjection, families
from lora_privacy.dp._family_cover import FamilyCover, _lower_tail


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 1500),
    st.integers(1, 200),
    st.floats(0.01, 1.5),
    st.floats(0, 0.3),
    st.floats(0.8, 1.2),
    st.floats(0, 0.05),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(0.01, 60),
)
def test_a_cell_lies_above_each_of_its_pairs(
    m: int,
    r: int,
    widest: float,
    depth: float,
    ratio: float,
    width: float,
    inside: tuple[float, float],
    epsilon: float,
) -> None:
    """Oracle: the exact profile, by quadrature, at a random pair of the cell."""
    angles = np.array([[widest * (1 - depth), widest]])
    ratios = np.array([[ratio, ratio * (1 + width)]])
    bound = FamilyCover(m, r, 1e-3).delta(epsilon, angles, ratios)[0]
    angle = angles[0, 0] + inside[0] * (widest - angles[0, 0])
    nu = ratios[0, 0] + inside[1] * (ratios[0, 1] - ratios[0, 0])
    assert VectorProjection(m, r, math.cos(angle), nu).delta(epsilon, "forward") <= bound


@pytest.mark.parametrize(
    ("m", "r", "angles", "ratios", "epsilon"),
    [
        (768, 8, (0.0, 0.05), (1.0, 1.0), 0.5),
        (20, 3, (0.1, 0.6), (1.0, 1.0), 0.3),
        (20, 3, (0.3, 0.4), (0.9, 1.1), 1.0),
        (5, 30, (0.2, 0.3), (0.95, 1.05), 2.0),
        (30, 12, (0.0, 0.3), (1.1, 1.2), 6.0),
        (200, 2, (0.0, 0.8), (1.0, 1.0), 0.5),
    ],
)
def test_a_cell_lies_above_the_largest_of_its_losses(
    m: int, r: int, angles: tuple[float, float], ratios: tuple[float, float], epsilon: float
) -> None:
    """Oracle: draws of θ and Q, for each the largest loss over 21 × 21 pairs of the cell.

    That is what is claimed, and more than the δ of any one pair. Five standard errors; where all
    norms are equal the bound is above it by 10 % of δ at most.
    """
    rng = np.random.default_rng(31)
    tangent = rng.standard_t(r, 20_000) / math.sqrt(r)
    q = rng.chisquare(m + r - 1, 20_000)
    largest = np.full(20_000, -math.inf)
    for angle in np.linspace(*angles, 21):
        g = math.cos(angle) + math.sin(angle) * tangent
        for nu in np.unique(np.linspace(*ratios, 21)):
            ratio = np.where(g > 0, nu * g, 1.0)
            loss = (
                (r - 1) * math.log(nu) + (m + 1 - r) / 2 * np.log(ratio) + q / 2 * (1 / ratio - 1)
            )
            largest = np.maximum(largest, np.where(g > 0, loss, math.inf))
    share = -np.expm1(np.minimum(epsilon - largest, 0.0))
    error = 5 * share.std() / math.sqrt(len(share))
    bound = FamilyCover(m, r, 1e-3).delta(epsilon, np.array([angles]), np.array([ratios]))[0]
    assert share.mean() - error <= bound
    assert bound <= 1.1 * share.mean() + error or ratios[0] < ratios[1]


@pytest.mark.parametrize(
    ("m", "r", "cosine", "ratio", "epsilon"),
    [
        (768, 8, 0.999, 1.0, 4.0),
        (768, 8, 0.9, 1.1, 126.0),
        (400, 400, 0.9, 1.0, 71.0),
        (4, 20, 0.9, 1.1, 3.0),
        (5, 6, 0.7, 0.8, 2.0),
    ],
)
def test_a_cell_of_one_pair_is_tight(
    m: int, r: int, cosine: float, ratio: float, epsilon: float
) -> None:
    """Within 1.5 % of δ, which is about .1 % of ε: the rest is the width of the bins."""
    exact = VectorProjection(m, r, cosine, ratio).delta(epsilon, "forward")
    angle = math.acos(cosine)
    cell = np.array([[angle, angle]]), np.array([[ratio, ratio]])
    bound = FamilyCover(m, r, exact).delta(epsilon, *cell)[0]
    assert exact < bound < 1.015 * exact


def test_the_bins_hold_all_of_the_law() -> None:
    """Masses sum to at least 1; each tail is that of t_r, by scipy.stats, to 1e-9."""
    for r in (1, 8, 4096):
        cover = FamilyCover(768, r, 1e-5)
        assert 1 <= cover._masses.sum() < 1 + 1e-8
        tangent = np.array([-3.0, -0.3, -0.05, -1e-3]) / math.sqrt(r)
        expected = stats.t.sf(-tangent * math.sqrt(r), r)
        np.testing.assert_allclose(_lower_tail(r, tangent), expected, rtol=1e-9)


def test_tails_keep_the_precision_they_are_granted() -> None:
    """Oracle: mpmath at 30 digits; the slack of 1e-12 covers the largest k in use."""
    cover = FamilyCover(400, 401, 1e-5)
    for start, end in ((500.0, 700.0), (900.0, math.inf), (1200.0, 1300.0)):
        low, high = cover._mass(np.array([start]), np.array([end]))
        with mp.workdps(30):
            exact = mp.gammainc(
                400, start / 2, end / 2 if end < math.inf else mp.inf, regularized=True
            )
        assert low[0] <= float(exact) <= high[0] <= low[0] * (1 + 1e-11)


def test_the_corner_is_not_the_worst_pair() -> None:
    """δ(.5) at ν = 1.1 falls and rises again with the cosine; the bound covers its maximum.

    The larger direction does so too, less far: equal directions beat a cosine of .997.
    """
    values = [
        VectorProjection(768, 8, cosine, 1.1).delta(0.5, "forward")
        for cosine in (0.9, 0.99, 0.9999)
    ]
    assert values == pytest.approx([0.692, 0.516, 0.557], abs=6e-4)
    family = VectorFamily(768, 8, 0.997, (1.1, 1.1))
    corner = VectorProjection(768, 8, 0.997, 1.1).delta(0.5)
    cosines = np.cos(np.linspace(0, math.acos(0.997), 30))
    worst = max(VectorProjection(768, 8, float(c), 1.1).delta(0.5) for c in cosines)
    bound = family.delta(0.5)
    assert corner < 0.99 * worst
    assert worst <= bound.delta <= 1.02 * worst


class Peak:
    """ε(δ) = level + ln(1/δ) of each pair, with one narrow peak of the level."""

    def __init__(self, angle: float, ratio: float) -> None:
        self.angle, self.ratio = angle, ratio

    def level(self, angle: float, ratio: float) -> float:
        distance = math.hypot(angle - self.angle, math.log(ratio / self.ratio))
        return 1.0 + 4.0 * max(0.0, 1.0 - 20.0 * distance)

    def over(self, cells: list[tuple[float, float, float, float]]) -> np.ndarray:
        """Largest level over each cell: at the point of it next to the peak."""
        return np.array(
            [
                self.level(min(max(self.angle, a), b), min(max(self.ratio, low), high))
                for a, b, low, high in cells
            ]
        )


@pytest.mark.parametrize("seed", range(24))
def test_a_peak_between_all_samples_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the family, at its widest angle too, and in either order of the pair.

    Losses and their bounds over cells are replaced by ones with a known maximum: what is returned
    lies above it, and by no more than the looseness that is stated.
    """
    rng = np.random.default_rng(seed)
    family = VectorFamily(20, 5, 0.4, (0.8, 1.5))
    widest = math.acos(0.4)
    ratio = math.exp(rng.uniform(math.log(0.8), math.log(1.5)))
    peak = Peak(widest if seed % 4 == 0 else rng.uniform(0, widest), ratio ** rng.choice([-1, 1]))

    class Loss:
        def __init__(self, _m: int, _r: int, cosine: float, nu: float) -> None:
            self.level = peak.level(math.acos(cosine), nu)

        def epsilon(self, delta: float) -> float:
            return self.level - math.log(delta)

        def delta(self, epsilon: float) -> float:
            return math.exp(min(self.level - epsilon, 0.0))

    def cover(_cover: FamilyCover, epsilon: float, cells: list) -> np.ndarray:
        return np.exp(np.minimum(peak.over(cells) - epsilon, 0.0))

    monkeypatch.setattr(families, "VectorLoss", Loss)
    monkeypatch.setattr(families, "_cover", cover)
    monkeypatch.setattr(families, "projected_sign_flip", lambda _r, _c: 0.0)
    bound = family.epsilon(0.1)
    assert 5.0 + math.log(10) <= bound.epsilon * (1 + 1e-12) <= 1.05 * (5.0 + math.log(10))
    assert "within 1 % of its worst pair" in bound.method
    bound = family.delta(9.0)
    assert math.exp(-4.0) <= bound.delta * (1 + 1e-12) <= 1.05 * math.exp(-4.0)


@pytest.mark.parametrize(
    ("family", "delta"),
    [
        (VectorFamily(768, 8, 0.999, (1.0, 1.05)), 1e-5),
        (VectorFamily(768, 8, 0.99, (0.9, 1.1)), 1e-4),
        (VectorFamily(400, 400, 0.9, (0.9, 1.1)), 1e-2),
        (VectorFamily(5, 9, 0.9, (0.5, 1.2)), 1e-2),
    ],
)
def test_every_pair_of_the_family_meets_the_bound(family: VectorFamily, delta: float) -> None:
    """Oracle: exact profiles of 40 pairs and the corners; one of them needs all but 1.5 %."""
    bound = family.epsilon(delta)
    rng = np.random.default_rng(7)
    low, high = family.norm_ratios
    pairs = [(family.min_cosine, ratio) for ratio in (low, 1.0, high) if low <= ratio <= high]
    angles = math.acos(family.min_cosine) * rng.random(40) ** 0.5
    pairs += [
        (math.cos(a), low + (high - low) * u) for a, u in zip(angles, rng.random(40), strict=True)
    ]
    laws = [VectorProjection(family.in_features, family.rank, c, n) for c, n in pairs]
    assert max(law.delta(bound.epsilon) for law in laws) <= delta
    assert max(law.delta(0.985 * bound.epsilon) for law in laws) > delta
    assert f"cosine at least {family.min_cosine!r}" in str(bound)
    assert bound.adjacency == "replace"


def test_a_wider_family_costs_more() -> None:
    """In the cosine and in the ratios."""
    narrow = VectorFamily(64, 4, 0.999, (1.0, 1.02)).epsilon(1e-3).epsilon
    assert narrow < VectorFamily(64, 4, 0.99, (1.0, 1.02)).epsilon(1e-3).epsilon
    assert narrow < VectorFamily(64, 4, 0.999, (1.0, 1.2)).epsilon(1e-3).epsilon


def test_equal_vectors_cost_next_to_nothing() -> None:
    """The bound is rounded up by at most .001."""
    family = VectorFamily(768, 8, 1.0, (1.0, 1.0))
    assert 0 <= family.epsilon(1e-6).epsilon <= 1e-3
    assert family.delta(0.5).delta <= 1e-12


@pytest.mark.parametrize(
    ("bound", "match"),
    [
        (
            VectorFamily(768, 8, 0.999, (1.0, 1.0), "add-remove").epsilon(1e-3),
            "v' = 0 a neighbour",
        ),
        (VectorFamily(768, 8, 0.9, (1.0, 1.0)).epsilon(1e-5), "least cosine.*not below δ"),
        (VectorFamily(768, 8, -0.2, (1.0, 1.0)).epsilon(0.4), "least cosine.*not below δ"),
    ],
)
def test_no_bound_says_why(bound: PrivacyBound, match: str) -> None:
    """ε is infinite, with the reason."""
    assert math.isinf(bound.epsilon)
    assert str(bound).startswith("No guarantee")
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(bound.reason)


def test_a_maximum_out_of_reach_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of two cells nothing is proved, so ε is infinite."""
    monkeypatch.setattr("lora_privacy.dp.families._MAX_CELLS", 2)
    bound = VectorFamily(400, 400, 0.9, (0.9, 1.1)).epsilon(1e-2)
    assert math.isinf(bound.epsilon)
    assert "certified" in str(bound.reason)


def test_add_remove_has_no_delta_below_one() -> None:
    """δ = 1, with the reason."""
    bound = VectorFamily(768, 8, 0.999, (1.0, 1.0), "add-remove").delta(1.0)
    assert bound.delta == 1
    assert "v' = 0" in str(bound.reason)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((768, 8, 1.1, (1.0, 1.0)), "cosine must lie in"),
        ((768, 0, 0.9, (1.0, 1.0)), "rank must be at least 1"),
        ((768, 8, 0.9, (1.1, 1.0)), "norm_ratios must be"),
        ((768, 8, 0.9, (0.0, 1.0)), "least norm ratio must lie in"),
        ((768, 8, 0.9, (1.0, math.nan)), "largest norm ratio must lie in"),
        ((768, 8, 0.9, (1.0, 1.0), "both"), "adjacency must be one of"),
    ],
)
def test_families_that_make_no_sense_are_refused(
    arguments: tuple[int, int, float, tuple[float, float]], match: str
) -> None:
    """Each with what must hold; so are δ outside (0, 1) and ε = 0."""
    with pytest.raises(ValueError, match=match):
        VectorFamily(*arguments)
    family = VectorFamily(768, 8, 0.99, (1.0, 1.0))
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta must lie in"):
            family.epsilon(delta)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        family.delta(0.0)
