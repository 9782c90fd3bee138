"""One fresh projection at every ε: oracles are mpmath, densities and drawn projections."""

import json
import math

import mpmath as mp
import numpy as np
import pytest
from accountant_contract import AccountantContract
from hypothesis import given, settings
from hypothesis import strategies as st
from projected_oracle import (
    drawn_shares,
    gaussian_delta,
    hockey_stick,
    least_majorant,
    rank_one_composed_delta,
    rank_one_delta,
    shares,
)

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    PrivacyBound,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    _majorant,
)

DIRECTIONS = ("remove", "add")


class TestMixedRdp(AccountantContract):
    """A ledger that holds a projected release is an accountant like any other."""

    accountant = RdpAccountant()

    def test_composition_is_commutative(self) -> None:
        """Projected, sampled and plain releases in either order; 1e-12 relative."""
        events = [ProjectedGaussian([(64, 8)], 1.0, 0.1), SampledGaussian(1.0, 0.1)]
        events.append(GaussianEvent(3.0))
        one = two = self.accountant
        for event in events:
            one = one.compose(event, 3)
        for event in reversed(events):
            two = two.compose(event, 3)
        assert one.epsilon(1e-5).epsilon == pytest.approx(
            two.epsilon(1e-5).epsilon, rel=1e-12, abs=0
        )


@pytest.mark.parametrize(
    ("layers", "z", "expected"),
    [
        ([(768, 8)], 1.0, 0.440478),
        ([(768, 8)], 0.5, 0.963083),
        ([(768, 64)], 1.0, 1.136907),
        ([(8, 8)], 1.0, 4.377178),
        ([(8, 8)], 0.5, 9.997256),
    ],
)
def test_pinned_epsilons(layers: list[tuple[int, int]], z: float, expected: float) -> None:
    """Reference: one step at δ = 1e-5, six digits; the last two are the plain Gaussian."""
    bound = ProjectedGaussian(layers, z).epsilon(1e-5)
    assert bound.epsilon == pytest.approx(expected, rel=1.2e-6, abs=0)
    assert bound.method == ("plain Gaussian" if layers == [(8, 8)] else "convex majorant")


def test_rank_one_is_not_always_worst() -> None:
    """Reference (4, 2), z = 1, ε = .1: .2244 for rank one, .2411 for the isotropic record.

    The isotropic record keeps exactly r/m = 1/2 of its norm, so its δ is a Gaussian's; the bound
    meets it to 1e-8, and no bound below it would be one.
    """
    rank_one = float(rank_one_delta(4, 2, 1.0, 1.0, 0.1, "remove"))
    isotropic = float(gaussian_delta(0.1, np.array(math.sqrt(0.5))))
    assert rank_one == pytest.approx(0.2244, abs=5e-5)
    assert isotropic == pytest.approx(0.2411, abs=5e-5)
    bound = ProjectedGaussian([(4, 2)], 1.0).delta(0.1)
    assert bound.delta == pytest.approx(isotropic, rel=1e-8, abs=0)
    assert bound.delta >= isotropic
    assert bound.method == "convex majorant"


@pytest.mark.parametrize(
    ("features", "rank", "z", "p", "epsilon", "direction"),
    [
        (768, 8, 1.0, 1.0, 2.0, "remove"),
        (20, 3, 2.0, 1.0, 1.5, "add"),
        (20, 3, 2.0, 0.2, 0.5, "remove"),
        (20, 3, 2.0, 0.2, 0.1, "add"),
        (9, 8, 3.0, 0.05, 0.5, "remove"),
        (6, 1, 1.5, 0.3, 0.33, "add"),
    ],
)
def test_rank_one_is_exact_where_the_profile_is_convex(
    features: int, rank: int, z: float, p: float, epsilon: float, direction: str
) -> None:
    """Oracle: 30-digit quadrature over β. A record of rank one is then worst.

    Never below, and above by 2e-5 (1e-3 with the coarse points of profiles) as far out as 1e-22.
    """
    profile = ProjectedGaussian([(features, rank)], z, p).profile(direction)
    true = rank_one_delta(features, rank, z, p, epsilon, direction)
    inner = _majorant._inner(p, direction, np.array([epsilon]))[1][0]
    assert 2 * z * z * (math.sqrt(1 + inner * inner) - 1) >= 1, "the case must be convex"
    found = profile(np.array([epsilon]))[0]
    assert true <= found <= true * (1 + mp.mpf("1e-3"))
    fine = _majorant.upper_profile(
        ((features, rank),), z, p, direction, np.array([epsilon]), _majorant.FINE
    )[0][0]
    assert true <= fine <= true * (1 + mp.mpf("2e-5"))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.2, 1.2])
def test_sampling_covers_the_densities(direction: str, epsilon: float) -> None:
    """Oracle: hockey-stick integrals of the two densities, averaged over β by Gauss-Jacobi.

    At 1.2 > -log(1 - p) adding costs nothing. The bound is for every record, so it may be above
    that of rank one, by 60 % at most here.
    """
    features, rank, z, p = 12, 3, 0.8, 0.6
    beta, weight = shares(features, rank, 24)
    true = weight @ [hockey_stick(z, p, epsilon, b, direction) for b in beta]
    found = ProjectedGaussian([(features, rank)], z, p).profile(direction)(np.array([epsilon]))[0]
    assert true * (1 - 1e-6) <= found <= 1.6 * true + 1e-12
    assert (true < 1e-12) == (direction == "add" and epsilon > -math.log(1 - p))


@pytest.mark.parametrize(("p", "direction"), [(1.0, "remove"), (0.3, "remove"), (0.3, "add")])
@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.2, 0.35, 1.0, 3.0])
def test_every_record_is_covered(p: float, direction: str, epsilon: float) -> None:
    """Drawn A, records of many spectra, over two layers: δ given A is exact, then averaged.

    Level: five standard errors of 20,000 draws.
    """
    rng = np.random.default_rng(77)
    layers, z = [(6, 2), (5, 1)], 0.7
    first, second = (drawn_shares(rng, m, r, 4, 20_000) for m, r in layers)
    scale, inner = 1.0, epsilon
    if p < 1 and direction == "remove":
        scale, inner = p, math.log(1 + math.expm1(epsilon) / p)
    elif p < 1:
        scale = 1 - math.exp(epsilon) * (1 - p)
        inner = math.log(math.exp(epsilon) * p / scale) if scale > 0 else 1.0
    scale = max(scale, 0.0)
    event = ProjectedGaussian(layers, z, p)
    bound = event.profile(direction)(np.array([epsilon]))[0]
    worst = 0.0
    for split in (1.0, 0.8, 0.4, 0.0):
        for spectrum in ([1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.9, 0.05, 0.05, 0]):
            w = np.array(spectrum)
            share = split * (first @ w) + (1 - split) * (second @ w)
            deltas = scale * gaussian_delta(inner, np.sqrt(share) / z)
            lower = deltas.mean() - 5 * deltas.std() / math.sqrt(20_000)
            assert lower <= bound
            worst = max(worst, deltas.mean())
    assert bound <= 1.35 * worst + 1e-12, "a bound that is merely large must fail"


@pytest.mark.parametrize(
    ("features", "rank", "z"),
    [
        (4, 2, 1.0),
        (20, 3, 0.7),
        (9, 8, 1.0),
        (64, 8, 0.3),
        (768, 8, 1.0),
        (5, 1, 0.2),
        (768, 700, 2.0),
    ],
)
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5, 2.0])
def test_the_majorant_is_the_least_one(features: int, rank: int, z: float, epsilon: float) -> None:
    """Oracle: 150 tangents, each with a plain sum; never below, and by 2e-4 above at most."""
    true = least_majorant(features, rank, z, epsilon)
    if true > 1e-8:  # the oracle has no more digits
        found = ProjectedGaussian([(features, rank)], z).delta(epsilon).delta
        assert true * (1 - 1e-4) <= found <= true * (1 + 2e-4)


def test_the_worst_record_beats_rank_one_in_a_draw() -> None:
    """The wrong alternative, E φ(β) for every record, is rejected at five standard errors."""
    rng = np.random.default_rng(8)
    share = drawn_shares(rng, 4, 2, 4, 20_000).mean(axis=1)
    deltas = gaussian_delta(0.1, np.sqrt(share))
    wrong = float(rank_one_delta(4, 2, 1.0, 1.0, 0.1, "remove"))
    assert deltas.mean() - 5 * deltas.std() / math.sqrt(20_000) > wrong


@pytest.mark.parametrize(("features", "rank"), [(768, 8), (2, 1), (53248, 1), (3072, 3071)])
def test_points_are_a_dilation_of_the_beta_law(features: int, rank: int) -> None:
    """Mass and mean are kept, and e^{xβ}, which is convex, has no smaller expectation.

    Oracle: ₁F₁ by mpmath; 1e-2 relative above at most with the coarse points.
    """
    points, masses = _majorant._dilated(features, rank, _majorant.COARSE)
    assert np.all(np.diff(points) >= 0)
    assert points[0] == 0
    assert points[-1] == 1
    assert np.all(masses >= 0)
    assert masses.sum() == pytest.approx(1, rel=1e-13)
    assert masses @ points == pytest.approx(rank / features, rel=1e-9)
    for x in (0.1, 10.0, 60.0):
        true = float(mp.hyp1f1(mp.mpf(rank) / 2, mp.mpf(features) / 2, x))
        assert true * (1 - 1e-9) <= masses @ np.exp(x * points) <= 1.01 * true


@given(
    features=st.integers(2, 400),
    share=st.floats(0.01, 1.0),
    z=st.floats(0.1, 30),
    p=st.sampled_from([1e-3, 0.2, 1.0]),
    direction=st.sampled_from(DIRECTIONS),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_limits_of_the_profile(
    features: int, share: float, z: float, p: float, direction: str
) -> None:
    """In [0, 1]; falls with ε and z; grows with rank; at most the plain sampled Gaussian.

    The chords of the points are above by up to 1e-3.
    """
    rank = max(1, int(share * features))
    epsilons = np.concatenate([[0.0], np.geomspace(1e-4, 8 / z, 60)])
    event = ProjectedGaussian([(features, rank)], z, p)
    values = event.profile(direction)(epsilons)
    assert np.all((values >= 0) & (values <= 1))
    assert np.all(np.diff(values) <= 1e-9 * values[:-1])
    wider = ProjectedGaussian([(features, min(features, rank + 1))], z, p).profile(direction)
    assert np.all(values <= wider(epsilons) * 1.001 + 1e-290)
    noisier = ProjectedGaussian([(features, rank)], 1.1 * z, p).profile(direction)
    assert np.all(noisier(epsilons) <= values * 1.001 + 1e-290)
    plain = ProjectedGaussian([(features, features)], z, p).profile(direction)
    assert np.all(values <= plain(epsilons))


@pytest.mark.parametrize("z", [0.3, 1.0, 10.0])
def test_full_rank_is_the_plain_gaussian(z: float) -> None:
    """Oracle: the exact δ of the Gaussian, at δ it can be subtracted at; 1e-9 relative."""
    epsilons = np.linspace(0, 2 / z, 9)
    true = gaussian_delta(epsilons, np.full(9, 1 / z))
    for direction in DIRECTIONS:
        found = ProjectedGaussian([(7, 7), (768, 8)], z).profile(direction)(epsilons)
        assert np.all(found >= true * (1 - 1e-12))
        assert found == pytest.approx(true, rel=1e-9, abs=0)
    bound = ProjectedGaussian([(7, 7)], z).epsilon(1e-5)
    exact = PldAccountant().compose(GaussianEvent(z)).epsilon(1e-5).epsilon
    assert bound.epsilon == pytest.approx(exact, rel=1e-8, abs=0)
    assert bound.method == "plain Gaussian"


def test_many_epsilons_are_chords_above_the_few() -> None:
    """Above 2048 ε the profile is interpolated in e^ε: never below, and 1e-3 above at most."""
    profile = ProjectedGaussian([(64, 8)], 1.0).profile("remove")
    many = np.linspace(0, 4, 9_001)
    few = slice(3, None, 487)
    dense, sparse = profile(many)[few], profile(many[few])
    assert np.all(dense >= sparse * (1 - 1e-12))
    assert np.all(dense <= sparse * 1.001)
    assert profile(np.full((2, 3), 0.5)).shape == (2, 3)


def test_layers_never_cost_less_than_one_of_them() -> None:
    """At least the bound of each, at every ε, and equal to the larger where one layer rules."""
    epsilons = np.linspace(0, 3, 40)
    both = ProjectedGaussian([(768, 8), (3072, 40)], 0.5).profile("remove")(epsilons)
    alone = [
        ProjectedGaussian([layer], 0.5).profile("remove")(epsilons)
        for layer in [(768, 8), (3072, 40)]
    ]
    assert np.all(both >= np.maximum(*alone) * (1 - 1e-12))
    assert np.all(both <= np.maximum(*alone) * 1.1)
    assert both[-1] == pytest.approx(alone[0][-1], rel=1e-9, abs=0)


# --- composition


def test_a_hundred_fresh_steps_through_loss_distributions() -> None:
    """Reference: rank one alone composes to 4.511, Rényi divergences to 4.882.

    Rank one by a contour integral, exactly. The guarantee for every record lies between them.
    """
    event = ProjectedGaussian([(768, 8)], 1.0)
    bound = PldAccountant().compose(event, 100).epsilon(1e-5)
    rdp = RdpAccountant().compose(event, 100).epsilon(1e-5).epsilon
    assert rank_one_composed_delta(768, 8, 1.0, 100, 4.5106) < 1e-5
    assert rank_one_composed_delta(768, 8, 1.0, 100, 4.5105) > 1e-5
    assert rdp == pytest.approx(4.882, abs=5e-4)
    assert 4.5106 < bound.epsilon < 0.96 * rdp
    assert "row space of A is Haar" in str(bound)


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 6.0])
def test_composed_rank_one_is_covered(epsilon: float) -> None:
    """Oracle: the contour integral for rank one; no accountant may be below it."""
    exact = rank_one_composed_delta(64, 8, 2.0, 60, epsilon)
    event = ProjectedGaussian([(64, 8)], 2.0)
    for accountant in (PldAccountant(), RdpAccountant()):
        assert exact <= accountant.compose(event, 60).delta(epsilon).delta
    assert PldAccountant().compose(event, 60).delta(epsilon).delta <= 1.5 * exact


@pytest.mark.parametrize(
    ("layer", "z", "p", "steps"),
    [
        ((64, 8), 1.0, 1.0, 5),
        ((768, 8), 0.6, 0.05, 200),
        ((16, 12), 2.0, 0.3, 40),
        ((3, 1), 1.5, 1.0, 9),
    ],
)
def test_the_two_accountants_agree_in_order(
    layer: tuple[int, int], z: float, p: float, steps: int
) -> None:
    """Loss distributions are no worse than Rényi divergences, and within a factor of two."""
    event = ProjectedGaussian([layer], z, p)
    pld = PldAccountant().compose(event, steps).epsilon(1e-6).epsilon
    rdp = RdpAccountant().compose(event, steps).epsilon(1e-6).epsilon
    assert rdp / 2 < pld <= rdp * (1 + 1e-9)


# --- one step as a bound


def test_a_bound_of_one_step_can_be_quoted() -> None:
    bound = ProjectedGaussian([(768, 8)], 1.0, 0.1).epsilon(1e-5)
    assert isinstance(bound, PrivacyBound)
    assert json.loads(json.dumps(bound.to_dict()))["kind"] == "guarantee"
    for needed in ("convex majorant", "Poisson", "drawn anew", "Haar", "folded", "projected"):
        assert needed in str(bound)


@pytest.mark.parametrize("p", [1e-7, 0.1, 1.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-6, 1e-15])
def test_epsilon_and_delta_are_inverse(p: float, delta: float) -> None:
    """δ at the returned ε is at most the target, and above it just below that ε."""
    event = ProjectedGaussian([(40, 3)], 0.4, p)
    epsilon = event.epsilon(delta).epsilon
    assert event.delta(epsilon).delta <= delta * (1 + 1e-6)
    if epsilon > 0:
        assert event.delta(epsilon * (1 - 1e-3)).delta > delta


def test_one_step_takes_the_larger_direction() -> None:
    """Removing a record costs more here; oracle: the exact δ of rank one in both directions."""
    remove, add = (float(rank_one_delta(6, 1, 1.5, 0.3, 0.2, way)) for way in DIRECTIONS)
    event = ProjectedGaussian([(6, 1)], 1.5, 0.3)
    assert add < remove * 0.8
    assert remove <= event.delta(0.2).delta <= 1.1 * remove
    assert event.epsilon(remove).epsilon >= 0.2


def test_where_the_points_end_the_divergence_speaks() -> None:
    """Below a mass of 1e-60 the points say nothing more; the Rényi bound goes on."""
    event = ProjectedGaussian([(768, 8)], 1.0)
    bound = event.delta(40.0)
    assert bound.method == "rdp"
    assert 0 < bound.delta < 1e-100
    assert "canonne-discrete-2020" in bound.references
    assert (
        event.epsilon(1e-200).epsilon
        < PldAccountant().compose(GaussianEvent(1.0)).epsilon(1e-200).epsilon
    )


def test_replace_moves_twice_as_far() -> None:
    """Half the noise, one step; test_replaced.py has it under sampling."""
    event, half = ProjectedGaussian([(768, 8)], 2.0), ProjectedGaussian([(768, 8)], 1.0)
    bound = event.epsilon(1e-5, adjacency="replace")
    assert bound.epsilon == half.epsilon(1e-5).epsilon
    assert bound.adjacency == "replace"
    assert event.delta(0.3, adjacency="replace").delta == half.delta(0.3).delta


@pytest.mark.parametrize("z", [1e-2, 1e3])
@pytest.mark.parametrize("layer", [(53248, 1), (53248, 4096), (3072, 3071)])
@pytest.mark.parametrize("p", [1e-7, 1.0])
def test_extremes_are_numbers(layer: tuple[int, int], z: float, p: float) -> None:
    """No overflow, no NaN, at most the plain Gaussian."""
    event = ProjectedGaussian([layer], z, p)
    bound = event.epsilon(1e-9)
    plain = ProjectedGaussian([(4, 4)], z, p).epsilon(1e-9)
    assert 0 <= bound.epsilon <= plain.epsilon * (1 + 1e-9)
    values = event.profile("remove")(np.array([0.0, 1e-12, 1.0, 1e4, 1e9, 1e300]))
    assert np.all((values > 0) & (values <= 1))


def test_too_little_noise_is_infinite_with_a_reason() -> None:
    bound = ProjectedGaussian([(8, 2)], 1e-160).epsilon(1e-5)
    assert bound.epsilon == math.inf
    assert "noise is too small" in bound.reason
    assert ProjectedGaussian([(8, 2)], 1e-160).delta(1.0).delta == 1
    assert ProjectedGaussian([(8, 2)], 1e200).epsilon(1e-5).epsilon == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_refuses_a_delta_out_of_range(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must lie in"):
        ProjectedGaussian([(8, 2)], 1.0).epsilon(delta)


@pytest.mark.parametrize("epsilon", [-1.0, math.inf, math.nan])
def test_refuses_an_epsilon_out_of_range(epsilon: float) -> None:
    event = ProjectedGaussian([(8, 2)], 1.0)
    with pytest.raises(ValueError, match="epsilon must be finite"):
        event.delta(epsilon)
    with pytest.raises(ValueError, match="epsilons must be finite"):
        event.profile("add")(np.array([0.1, epsilon]))
    with pytest.raises(ValueError, match="direction must be one of"):
        event.profile("both")
