"""Rényi divergences behind a fresh projection: oracles are mpmath and drawn projections."""

import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from projected_oracle import divergence, drawn_shares, log_excess, shares
from rdp_oracle import excess_backward, excess_forward
from scipy import stats

from lora_privacy.dp import (
    GaussianEvent,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    _hyp1f1,
    event_rdp,
)
from lora_privacy.errors import UnsupportedEventError

# (layers, z, p, α, ε_α, relative tolerance): reference numbers with the digits they have.
PINS = [
    ([(768, 8)], 1.0, 0.01, 4.0, 2.0974793e-6, 5e-8),
    ([(768, 8)], 1.0, 0.01, 16.0, 8.4032130e-6, 5e-8),
    ([(768, 8)], 1.0, 0.01, 32.0, 1.6842595e-5, 5e-8),
    ([(64, 8)], 1.0, 1.0, 4.0, 0.27178246, 5e-8),
    ([(64, 8)], 1.0, 1.0, 16.0, 4.0975593, 5e-8),
    ([(768, 8)], 0.5, 1.0, 4.0, 0.08601, 1e-4),
    ([(3072, 40)], 0.5, 1.0, 4.0, 0.10498, 1e-4),
    ([(768, 8)], 0.5, 1.0, 16.0, 1.77077, 1e-5),
    ([(3072, 40)], 0.5, 1.0, 16.0, 0.49773, 1e-5),
]
# (features, rank, x): either side of every switch, the largest layers, and both ends of x.
FUNCTION_CASES = [
    (2, 1, 1e-12),
    (2, 1, 5.0),
    (2, 1, 1e12),
    (3, 2, 0.7),
    (9, 2, 40.0),
    (64, 8, 120.0),
    (768, 8, 1e-3),
    (768, 8, 6.0),
    (768, 8, 384.0),
    (768, 8, 2500.0),
    (768, 8, 1e6),
    (768, 8, 1e12),
    (768, 767, 300.0),
    (4096, 4095, 20.0),
    (53248, 1, 1e-9),
    (53248, 1, 2000.0),
    (53248, 1, 1e6),
    (53248, 1, 1e12),
    (53248, 4096, 10.0),
    (53248, 4096, 2900.0),
    (53248, 53247, 1.0),
]


@pytest.mark.parametrize(("layers", "z", "p", "alpha", "expected", "tolerance"), PINS)
def test_pinned_divergences(
    layers: list[tuple[int, int]],
    z: float,
    p: float,
    alpha: float,
    expected: float,
    tolerance: float,
) -> None:
    """Reference numbers of the theory."""
    found = ProjectedGaussian(layers, z, p).rdp([alpha])[0]
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_a_hundred_fresh_steps() -> None:
    """Reference: 4.882 over orders 1.05 to 399; the plain Gaussian pays 96.1."""
    orders = tuple(np.concatenate([np.arange(1.05, 20, 0.05), np.arange(20.0, 400.0)]))
    accountant = RdpAccountant(orders=orders)
    event = ProjectedGaussian([(768, 8)], 1.0)
    found = accountant.compose(event, 100).epsilon(1e-5)
    assert found.epsilon == pytest.approx(4.882, abs=5e-4)
    assert accountant.compose(GaussianEvent(1.0), 100).epsilon(1e-5).epsilon == pytest.approx(
        96.1, abs=0.05
    )
    assert RdpAccountant().compose(event, 100).epsilon(1e-5).epsilon <= found.epsilon * (1 + 1e-5)
    assert "row space of A is Haar" in str(found)
    assert "p2-projections-2026" in found.references


@pytest.mark.parametrize(("features", "rank", "x"), FUNCTION_CASES)
def test_the_function_is_never_too_small(features: int, rank: int, x: float) -> None:
    """Oracle: ₁F₁ at 40 digits; above it by 2e-9 + 1e-15 x at most, and never below."""
    found = float(_hyp1f1.log_excess(features, rank, x))
    true = log_excess(features, rank, x)
    assert true <= found <= true + 2e-9 + 1e-15 * x


def test_the_function_at_the_ends_of_double_precision() -> None:
    """Oracle: the leading terms, x r/m for small and x + (a-b) log x for huge arguments."""
    assert float(_hyp1f1.log_excess(768, 8, 1e-200)) == pytest.approx(math.log(1e-200 / 96))
    with mp.workdps(40):
        x = mp.mpf(1e200)
        true = x - 380 * mp.log(x) + mp.loggamma(384) - mp.loggamma(4)
    assert _hyp1f1.log_excess(768, 8, 1e200) >= true
    assert _hyp1f1.log_excess(768, 8, 1e200) <= float(true) * (1 + 1e-15)
    assert _hyp1f1.log_excess(768, 8, math.inf) == math.inf
    assert _hyp1f1.log_excess(768, 8, np.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(
    ("features", "rank", "z", "p", "alpha"),
    [(768, 8, 1.0, 0.01, 7), (64, 8, 0.5, 0.3, 12), (5, 4, 2.0, 1e-5, 3), (768, 64, 0.3, 0.9, 20)],
)
def test_sampled_sum_at_whole_orders(
    features: int, rank: int, z: float, p: float, alpha: int
) -> None:
    """Oracle: the sum with mpmath's ₁F₁ at 40 digits; never below, 1e-9 relative above."""
    found = ProjectedGaussian([(features, rank)], z, p).rdp(float(alpha))
    true = divergence(features, rank, z, p, alpha)
    assert true <= found <= true * (1 + mp.mpf("1e-9"))


@pytest.mark.parametrize(
    ("features", "rank", "z", "p", "alpha"), [(20, 3, 1.0, 0.2, 3.0), (6, 2, 1.5, 0.05, 3.4)]
)
def test_sampled_divergence_covers_its_definition(
    features: int, rank: int, z: float, p: float, alpha: float
) -> None:
    """Oracle: E over β (Gauss-Jacobi) of the moment, itself a quadrature of two densities.

    Whole orders are met to 1e-6; at fractional ones the chord is above, by under 15 % here. The
    other direction of the adjacency is never larger, before or after the average.
    """
    beta, weight = shares(features, rank, 6)
    forward = [float(excess_forward(z / math.sqrt(b), p, alpha, 20)) for b in beta]
    backward = [float(excess_backward(z / math.sqrt(b), p, alpha, 20)) for b in beta]
    true = math.log1p(weight @ np.array(forward)) / (alpha - 1)
    found = ProjectedGaussian([(features, rank)], z, p).rdp(alpha)
    if alpha == 3.0:
        assert found == pytest.approx(true, rel=1e-6, abs=0)
    else:
        assert true <= found <= 1.15 * true
    assert math.log1p(weight @ np.array(backward)) / (alpha - 1) <= true


@pytest.mark.parametrize("z", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("p", [1e-4, 0.2, 1.0])
def test_full_rank_is_the_plain_gaussian(z: float, p: float) -> None:
    """With rank = in_features nothing is projected away, at every order; 1e-9 relative.

    Also one full layer among narrow ones is enough.
    """
    orders = [1.01, 1.5, 2.0, 4.7, 33.0, 300.0]
    expected = event_rdp(SampledGaussian(z, p), orders)
    for layers in ([(16, 16)], [(768, 8), (16, 16)]):
        found = ProjectedGaussian(layers, z, p).rdp(orders)
        assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_layers_are_maximised_at_each_order() -> None:
    """Which layer is worst depends on the order, and the small-δ end is decided by another."""
    narrow, wide = (768, 8), (3072, 40)
    both = ProjectedGaussian([narrow, wide], 0.5)
    orders = np.array([4.0, 16.0])
    alone = np.array([ProjectedGaussian([one], 0.5).rdp(orders) for one in (narrow, wide)])
    assert alone[0, 0] < alone[1, 0]
    assert alone[0, 1] > alone[1, 1]
    assert np.all(both.rdp(orders) == alone.max(axis=0))
    sampled = ProjectedGaussian([narrow, wide], 0.5, 0.01).rdp(orders)
    parts = [ProjectedGaussian([one], 0.5, 0.01).rdp(orders) for one in (narrow, wide)]
    assert np.all(sampled == np.maximum(*parts))
    epsilon = RdpAccountant().compose(both).epsilon(1e-8).epsilon
    alone = RdpAccountant().compose(ProjectedGaussian([narrow], 0.5)).epsilon(1e-8).epsilon
    assert epsilon == pytest.approx(alone, rel=1e-12, abs=0)


@pytest.mark.parametrize("alpha", [1.2, 1.7, 2.5])
def test_the_sampled_moment_is_convex_in_the_share(alpha: float) -> None:
    """Oracle: quadrature of the densities at three shares; docs say so for every order above 1."""
    low, middle, high = (excess_forward(1 / math.sqrt(b), 0.3, alpha, 20) for b in (1, 3, 5))
    assert middle < (low + high) / 2


def test_chords_are_of_the_maximum_over_layers() -> None:
    """Between whole orders at which different layers are worst, (α-1) ε_α is their common chord.

    Convexity in the order alone does not say that the larger of the layers' own chords, which is
    smaller, bounds a record over both.
    """
    layers, z, p = [(768, 8), (3072, 40)], 0.5, 0.3
    alone = np.array([ProjectedGaussian([one], z, p).rdp(np.arange(2.0, 20.0)) for one in layers])
    switch = 2 + int(np.argmax(alone[0] > alone[1])) - 1
    low, high = alone[:, switch - 2] * (switch - 1), alone[:, switch - 1] * switch
    assert low[0] < low[1]
    assert high[0] > high[1]
    found = ProjectedGaussian(layers, z, p).rdp(switch + 0.5) * (switch - 0.5)
    assert found == pytest.approx((low.max() + high.max()) / 2, rel=1e-12, abs=0)
    assert found > ((low + high) / 2).max() * (1 + 1e-6)


@given(
    features=st.integers(2, 300),
    share=st.floats(0.01, 0.99),
    z=st.floats(0.1, 50),
    p=st.sampled_from([1e-6, 0.01, 0.4, 1.0]),
    alpha=st.floats(1.01, 200),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_limits_of_the_divergence(
    features: int, share: float, z: float, p: float, alpha: float
) -> None:
    """Grows with rank and p, falls with z, never above the Gaussian without a projection.

    Twice the rounding is allowed: 2e-9.
    """
    rank = max(1, int(share * features))
    value = ProjectedGaussian([(features, rank)], z, p).rdp(alpha)
    room = 1 + 2e-9
    assert 0 < value <= event_rdp(SampledGaussian(z, p), alpha) * room
    assert (
        value <= ProjectedGaussian([(features, min(rank + 1, features))], z, p).rdp(alpha) * room
    )
    assert ProjectedGaussian([(features, rank)], 1.1 * z, p).rdp(alpha) <= value * room
    assert value <= ProjectedGaussian([(features, rank)], z, min(1.0, 1.5 * p)).rdp(alpha) * room
    assert value <= ProjectedGaussian([(features, rank)], z, p).rdp(1.1 * alpha) * room


def test_sampling_with_certainty_is_no_sampling() -> None:
    """Rate 1 is the default, and the limit of rates below."""
    assert ProjectedGaussian([(768, 8)], 1.0, 1.0) == ProjectedGaussian([(768, 8)], 1.0)
    orders = np.array([2.0, 5.0, 60.0])
    limit = ProjectedGaussian([(768, 8)], 1.0, 1 - 1e-12).rdp(orders)
    assert limit == pytest.approx(ProjectedGaussian([(768, 8)], 1.0).rdp(orders), rel=1e-8, abs=0)


def test_replace_moves_twice_as_far() -> None:
    """Under replace a record moves the sum by 2C: half the noise. With sampling, no proof."""
    orders = [1.5, 4.0, 40.0]
    event = ProjectedGaussian([(768, 8)], 2.0)
    assert np.all(
        event.rdp(orders, adjacency="replace") == ProjectedGaussian([(768, 8)], 1.0).rdp(orders)
    )
    assert RdpAccountant("replace").compose(event).epsilon(1e-5).epsilon == pytest.approx(
        RdpAccountant().compose(ProjectedGaussian([(768, 8)], 1.0)).epsilon(1e-5).epsilon
    )
    sampled = ProjectedGaussian([(768, 8)], 2.0, 0.5)
    with pytest.raises(UnsupportedEventError, match="no proof for ProjectedGaussian"):
        sampled.rdp(orders, adjacency="replace")
    with pytest.raises(UnsupportedEventError, match="no proof for ProjectedGaussian"):
        RdpAccountant("replace").compose(sampled)
    with pytest.raises(ValueError, match="adjacency must be one of"):
        event.rdp(orders, adjacency="swap")


@pytest.mark.parametrize("z", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("p", [1e-7, 0.5, 1.0])
@pytest.mark.parametrize("layer", [(53248, 1), (53248, 4096), (2, 1)])
def test_extremes_are_numbers(layer: tuple[int, int], z: float, p: float) -> None:
    """A million steps at the largest layers: positive, no more than without the projection."""
    found = RdpAccountant().compose(ProjectedGaussian([layer], z, p), 10**6).epsilon(1e-12)
    plain = RdpAccountant().compose(SampledGaussian(z, p), 10**6).epsilon(1e-12)
    assert 0 < found.epsilon <= plain.epsilon * (1 + 2e-9)
    assert math.isfinite(found.epsilon)
    assert found.reason is None


def test_no_finite_divergence_is_infinite_with_a_reason() -> None:
    """Noise of 1e-200: beyond double precision, and said."""
    event = ProjectedGaussian([(768, 8)], 1e-200, 0.5)
    assert event.rdp(2.0) == math.inf
    bound = RdpAccountant().compose(event).epsilon(1e-5)
    assert bound.epsilon == math.inf
    assert "beyond double precision" in bound.reason


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([], 1.0), ValueError, "at least one layer"),
        (([(8, 9)], 1.0), ValueError, "rank must be at most in_features, got rank 9 of 8"),
        (([(8, 0)], 1.0), ValueError, "rank must be at least 1"),
        (([(0, 0)], 1.0), ValueError, "in_features must be at least 1"),
        (([(8, 2.5)], 1.0), TypeError, "rank must be an integer"),
        (([8, 2], 1.0), TypeError, "layers must hold pairs"),
        (([(8, 2, 1)], 1.0), TypeError, "layers must hold pairs"),
        ((8, 1.0), TypeError, "layers must be a sequence of pairs"),
        (([(8, 2)], 0.0), ValueError, "noise_multiplier must be positive"),
        (([(8, 2)], -1.0), ValueError, "noise_multiplier must be positive"),
        (([(8, 2)], math.nan), ValueError, "noise_multiplier must be positive"),
        (([(8, 2)], math.inf), ValueError, "noise_multiplier must be positive"),
        (([(8, 2)], 1.0, 1.5), ValueError, r"sample_rate must lie in \(0, 1\]"),
        (([(8, 2)], 1.0, 0.0), ValueError, r"sample_rate must lie in \(0, 1\]"),
        (([(8, 2)], 1.0, math.nan), ValueError, r"sample_rate must lie in \(0, 1\]"),
    ],
)
def test_refuses_what_means_nothing(
    arguments: tuple[object, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ProjectedGaussian(*arguments)


@pytest.mark.parametrize("orders", [[1.0], [0.5], [math.nan], [math.inf], [2.0, -3.0]])
def test_refuses_orders_out_of_range(orders: list[float]) -> None:
    with pytest.raises(ValueError, match="orders must be finite and above 1"):
        ProjectedGaussian([(8, 2)], 1.0).rdp(orders)


def test_there_is_no_flag_for_another_projection() -> None:
    """A frozen A is SampledGaussian; a misspelt or hopeful argument must not vanish."""
    with pytest.raises(TypeError, match="fresh"):
        ProjectedGaussian([(8, 2)], 1.0, fresh=False)


# --- the law of the share, and what breaks without each condition


@pytest.mark.parametrize(("features", "rank"), [(12, 3), (5, 4)])
def test_the_share_is_beta(features: int, rank: int) -> None:
    """KS at level 1e-4 on drawn Gaussian A; Beta(r/2, m/2) must be rejected."""
    rng = np.random.default_rng(20240917)
    share = drawn_shares(rng, features, rank, 1, 20_000)[:, 0]
    assert stats.kstest(share, stats.beta(rank / 2, (features - rank) / 2).cdf).pvalue > 1e-4
    assert stats.kstest(share, stats.beta(rank / 2, features / 2).cdf).pvalue < 1e-4


@pytest.mark.parametrize("x", [1.0, 8.0])
def test_no_record_beats_rank_one(x: float) -> None:
    """E exp(x Σ w_i β_i) on drawn A, jointly for the singular directions, is at most ₁F₁.

    Level: five standard errors. The mean alone, E β = r/m, would be beaten by rank one itself.
    """
    rng = np.random.default_rng(5)
    share = drawn_shares(rng, 6, 2, 6, 40_000)
    bound = float(np.exp(_hyp1f1.log_excess(6, 2, x)) + 1)
    for weights in (
        [1, 0, 0, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0, 0],
        [0.7, 0.1, 0.1, 0.1, 0, 0],
        [1 / 6] * 6,
    ):
        moments = np.exp(x * share @ np.array(weights))
        error = 5 * moments.std() / 200
        assert moments.mean() - error <= bound
    rank_one = np.exp(x * share[:, 0])
    assert abs(rank_one.mean() - bound) < 5 * rank_one.std() / 200
    assert rank_one.mean() - 5 * rank_one.std() / 200 > math.exp(x * 2 / 6)


def test_a_new_draw_each_step_is_needed() -> None:
    """Condition (i). One A for T steps: log E e^{Txβ} instead of T log E e^{xβ}, exactly.

    100 steps at (768, 8), z = 1, α = 4: 21.1, ten times the divergence of fresh draws, 2.10.
    """
    argument, steps = 6.0, 100
    fresh = ProjectedGaussian([(768, 8)], 1.0).rdp(4.0) * steps
    reused = float(log_excess(768, 8, argument * steps)) / 3
    assert fresh == pytest.approx(2.1, abs=0.05)
    assert reused > 10 * fresh


def test_entries_must_be_gaussian() -> None:
    """Condition (ii). u = (1,1,1,1)/2, rank 1: Rademacher and uniform A keep more of it.

    Rademacher is exact: β = S²/16, S = ±4, ±2, 0 with probabilities 1/8, 1/2, 3/8. Uniform is
    drawn (standard error .01). Reference: 17.92 and 15.64 against 14.97.
    """
    argument = 20.0
    haar = float(_hyp1f1.log_excess(4, 1, argument))
    rademacher = math.log(math.exp(20.0) / 8 + math.exp(5.0) / 2 + 3 / 8)
    rng = np.random.default_rng(11)
    A = rng.uniform(-1, 1, (400_000, 4))
    moments = np.exp(argument * np.square(A.sum(axis=1) / 2) / np.square(A).sum(axis=1))
    assert haar == pytest.approx(14.97, abs=0.005)
    assert rademacher == pytest.approx(17.92, abs=0.005)
    assert math.log(moments.mean()) == pytest.approx(15.64, abs=0.03)
    assert math.log(moments.mean() - 5 * moments.std() / math.sqrt(len(moments))) > haar + 0.3


@pytest.mark.parametrize("condition", ["clip after projection", "aligned", "unprojected"])
def test_a_record_that_uses_what_a_condition_forbids(condition: str) -> None:
    """Conditions (iii) to (v): drawn A, a record of norm at most the clip norm by the wrong rule.

    The shift of the released sum, in units of C, is then 1 in every draw, as without a projection;
    with the right rule it is a Beta variable of mean r/m.
    """
    rng = np.random.default_rng(3)
    features, rank, draws = 24, 2, 2_000
    shares_kept = []
    for _ in range(draws):
        Q = np.linalg.qr(rng.standard_normal((features, rank))).Q
        G = rng.standard_normal(features)
        if condition == "clip after projection":  # (iii): the clip sees ‖G Aᵀ‖ only
            G *= 1e6
            seen = Q.T @ G
            shares_kept.append(np.sum(np.square(seen / max(1.0, np.linalg.norm(seen)))))
        elif condition == "aligned":  # (iv): with B ≠ 0 the gradient may depend on A
            G = Q @ (Q.T @ G)
            G /= np.linalg.norm(G)
            shares_kept.append(np.sum(np.square(Q.T @ G)))
        else:  # (v): all of the norm in a bias that is released as it is
            shares_kept.append(1.0)
    shift = np.mean(np.exp(6 * np.array(shares_kept)))
    allowed = math.exp(3 * ProjectedGaussian([(features, rank)], 1.0).rdp(4.0))
    assert shift == pytest.approx(math.exp(6), rel=1e-6)
    assert shift > 50 * allowed
