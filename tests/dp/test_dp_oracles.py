"""Second oracles of the numbers of ``dp``: closed forms, peers, and draws of A itself.

``docs/oracles.md`` lists both of each number.
"""

import math
import warnings

import dp_accounting
import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting.pld import privacy_loss_distribution as peer
from dp_accounting.rdp import rdp_privacy_accountant as peer_rdp
from opacus.accountants import RDPAccountant as OpacusAccountant
from opacus.accountants.utils import get_noise_multiplier
from projected_oracle import drawn_shares
from scipy import optimize, stats

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    SketchRelease,
    VectorFamily,
    VectorProjection,
    calibrate,
    calibrate_rank,
    calibrate_steps,
    matrix_projection,
    sampled_gaussian_bounds,
)

Array = npt.NDArray[np.float64]


def gaussian_distance(epsilon: float, delta: float) -> float:
    """μ at which N(0,1) and N(μ,1) are (ε, δ), by a root finder on Balle and Wang's δ."""

    def excess(mu: float) -> float:
        below = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - below) - delta

    return optimize.brentq(excess, 1e-3, 50.0, xtol=1e-14)


# Accounting and calibration.


def test_many_bounds_at_once_are_those_of_two_peers() -> None:
    """Oracles: Opacus on its orders, dp-accounting on whole ones; 1e-9."""
    noises, rate, steps, delta = [0.7, 1.3, 5.0], 0.02, 300, 1e-6
    orders = tuple(float(a) for a in OpacusAccountant.DEFAULT_ALPHAS)
    found = sampled_gaussian_bounds(noises, rate, steps=steps, delta=delta, orders=orders)
    for z, bound in zip(noises, found, strict=True):
        opacus = OpacusAccountant()
        opacus.history = [(z, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert bound.epsilon == pytest.approx(opacus.get_epsilon(delta), rel=1e-9, abs=0)
    whole = tuple(float(a) for a in range(2, 100))
    found = sampled_gaussian_bounds(noises, rate, steps=steps, delta=delta, orders=whole)
    for z, bound in zip(noises, found, strict=True):
        costs = steps * peer_rdp._compute_rdp_poisson_subsampled_gaussian(rate, z, whole)
        expected, _ = peer_rdp.compute_epsilon(whole, costs, delta)
        assert bound.epsilon == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("epsilon", "delta", "steps"), [(1.0, 1e-5, 1), (8.0, 1e-9, 40)])
def test_the_noise_of_plain_steps_is_in_closed_form(
    epsilon: float, delta: float, steps: int
) -> None:
    """Oracles: μ of the pair by a root finder, z = √T/μ; dp-accounting's σ for one step; 2e-4."""
    found = calibrate(GaussianEvent, epsilon=epsilon, delta=delta, steps=steps).value
    exact = math.sqrt(steps) / gaussian_distance(epsilon, delta)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 2e-4)
    theirs = math.sqrt(steps) * dp_accounting.get_sigma_gaussian(epsilon, delta)
    assert found == pytest.approx(theirs, rel=2e-4, abs=0)


def test_steps_and_ranks_are_whole_parts_of_closed_forms() -> None:
    """T = ⌊z²μ²⌋ plain steps; at noise 200/√r, 10 steps leave r = ⌊4000 μ²⌋. Oracle: μ above."""
    mu = gaussian_distance(2.0, 1e-6)
    steps = calibrate_steps(GaussianEvent(30.0), epsilon=2.0, delta=1e-6).value
    assert steps == math.floor(900 * mu**2)
    rank = calibrate_rank(
        lambda r: GaussianEvent(200 / math.sqrt(r)),
        epsilon=2.0,
        delta=1e-6,
        steps=10,
        max_rank=4096,
    ).value
    assert rank == math.floor(4000 * mu**2)
    assert rank > 100


def test_the_noise_of_sampled_steps_is_that_of_opacus() -> None:
    """Oracle: Opacus' search by Rényi divergences, which ends within .01 of ε; 1 % of z."""
    target = {"epsilon": 3.0, "delta": 1e-5, "steps": 500}
    found = calibrate(
        lambda z: SampledGaussian(z, 0.02), accountant=RdpAccountant(), **target
    ).value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_noise_multiplier(
            target_epsilon=3.0,
            target_delta=1e-5,
            sample_rate=0.02,
            steps=500,
            accountant="rdp",
            epsilon_tolerance=0.01,
        )
    assert found == pytest.approx(theirs, rel=0.01, abs=0)


def test_the_trade_off_is_that_of_a_peers_profile() -> None:
    """Oracle: min over ε of e^ε·FPR + δ(ε), δ by dp-accounting; the advantage is δ(0). 2 %."""
    accountant = PldAccountant().compose(SampledGaussian(1.0, 0.2), 5)
    low, high = (
        peer.from_gaussian_mechanism(
            1.0,
            sampling_prob=0.2,
            value_discretization_interval=2e-3,
            pessimistic_estimate=upper,
            use_connect_dots=upper,
        ).self_compose(5)
        for upper in (False, True)
    )
    grid = np.linspace(0, 6, 61)
    for fpr in (1e-3, 0.05):
        least, most = (
            float(np.min(np.exp(grid) * fpr + one.get_delta_for_epsilon(grid)))
            for one in (low, high)
        )
        assert least * (1 - 1e-3) <= accountant.tpr_bound(fpr) <= 1.02 * most
    assert low.get_delta_for_epsilon(0.0) <= accountant.advantage()
    assert accountant.advantage() <= 1.02 * high.get_delta_for_epsilon(0.0)


def test_a_composed_projection_covers_drawn_matrices() -> None:
    """Four fresh A a run, 20,000 runs: mean of (1 − e^{ε−loss})₊ for a record of rank one.

    5 errors; no accountant is below, and loss distributions are at most 1.6 times above.
    """
    rng, z, steps = np.random.default_rng(11), 0.8, 4
    share = drawn_shares(rng, 6, 2, 1, 20_000 * steps).reshape(20_000, steps)
    loss = (share / (2 * z * z) + np.sqrt(share) / z * rng.standard_normal(share.shape)).sum(1)
    event = ProjectedGaussian([(6, 2)], z)
    tight, loose = (one.compose(event, steps) for one in (PldAccountant(), RdpAccountant()))
    for epsilon in (0.3, 1.0, 2.0):
        gain = -np.expm1(np.minimum(epsilon - loss, 0.0))
        error = 5 * gain.std() / math.sqrt(len(gain))
        bound = tight.delta(epsilon).delta
        assert gain.mean() - error <= bound <= 1.6 * gain.mean() + error
        assert gain.mean() - error <= loose.delta(epsilon).delta


# Projected pairs.


def log_density(y: Array, v: Array, rank: int) -> Array:
    """Of AᵀAv at ``y`` (…, m), up to a constant that is common to all v."""
    along, m = y @ v, y.shape[-1]
    safe = np.where(along > 0, along, 1.0)
    value = (rank - m - 1) / 2 * np.log(safe) - rank * np.sum(y**2, axis=-1) / (2 * safe)
    return np.where(along > 0, value - (rank - 1) * math.log(np.linalg.norm(v)), -math.inf)


def plane_delta(rank: int, v: Array, w: Array, epsilon: float, cells: int = 700) -> float:
    """∫(p_v − e^ε p_w)₊ over the plane, in the logarithm of y·v and in y⊥/√(y·v)."""
    u = np.linspace(-14.0 / max(1.0, rank / 2), math.log(12.0), cells)
    t = np.linspace(-7.0, 7.0, cells) / math.sqrt(rank / 2)
    along, across = np.exp(u)[:, None], t * np.exp(u / 2)[:, None]
    size = np.linalg.norm(v)
    unit = v / size
    y = along[..., None] * unit + across[..., None] * np.array([-unit[1], unit[0]])
    jacobian = np.exp(1.5 * u)[:, None]
    p, q = (np.exp(log_density(size * y, x, rank)) * jacobian for x in (v, w))
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum() / p.sum())


@pytest.mark.parametrize(
    ("rank", "rho", "nu"), [(3, 0.9, 1.0), (3, 0.8, 1.4), (2, 0.95, 0.8), (9, 0.6, 1.1)]
)
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_profile_of_a_pair_in_the_plane(
    rank: int, rho: float, nu: float, epsilon: float
) -> None:
    """Oracle: the two densities of AᵀAv, written out and summed on a grid; 3e-3, for its kinks.

    ε at that δ is found again, to 3e-2.
    """
    v = np.array([1.0, 0.0])
    w = nu * np.array([rho, math.sqrt(1 - rho**2)])
    law = VectorProjection(2, rank, rho, nu)
    for direction, (one, other) in (("forward", (v, w)), ("backward", (w, v))):
        delta = plane_delta(rank, one, other, epsilon)
        found = law.delta(epsilon, direction)  # type: ignore[arg-type]
        assert found == pytest.approx(delta, rel=3e-3, abs=1e-5)
        assert getattr(law.epsilon(delta), direction) == pytest.approx(epsilon, abs=0.03)


def test_the_density_of_the_plane_is_that_of_draws() -> None:
    """Share of 50,000 draws of AᵀAv in a sector, against the same grid; 4.5 errors."""
    rng = np.random.default_rng(12)
    a = rng.standard_normal((50_000, 3, 2)) / math.sqrt(3)
    y = np.einsum("ski,sk->si", a, a[:, :, 0])
    share = np.mean((np.abs(y[:, 1]) < 0.3 * y[:, 0]) & (y[:, 0] < 1.2))
    x1, x2 = np.linspace(1e-3, 9, 900), np.linspace(-6, 6, 901)
    grid = np.stack(np.meshgrid(x1, x2, indexing="ij"), axis=-1)
    mass = np.exp(log_density(grid, np.array([1.0, 0.0]), 3))
    inside = (np.abs(grid[..., 1]) < 0.3 * grid[..., 0]) & (grid[..., 0] < 1.2)
    expected = mass[inside].sum() / mass.sum()
    assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 50_000) + 2e-3


@pytest.mark.parametrize(("m", "rank", "rho"), [(5, 1, 0.3), (5, 3, 0.5), (2, 6, 0.2)])
def test_the_floor_is_how_often_the_sign_flips(m: int, rank: int, rho: float) -> None:
    """Share of 50,000 draws with (Av)·(Av') ≤ 0, 4.5 errors; acos(ρ)/π at rank 1, 1e-9."""
    rng = np.random.default_rng(13)
    a = rng.standard_normal((50_000, rank, m))
    v, w = np.eye(m)[0], np.zeros(m)
    w[:2] = rho, math.sqrt(1 - rho**2)
    share = float(np.mean(np.einsum("sk,sk->s", a @ v, a @ w) <= 0))
    floor = VectorProjection(m, rank, rho).floor
    assert abs(share - floor) < 4.5 * math.sqrt(share * (1 - share) / 50_000)
    if rank == 1:
        assert floor == pytest.approx(math.acos(rho) / math.pi, rel=1e-9)


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (1 / 1.1, 1.1)])
def test_a_family_covers_drawn_pairs(ratios: tuple[float, float]) -> None:
    """δ of 8 or 24 pairs by 8,000 draws of A and the densities written out; 5 errors.

    The bound is at most 15 % above the largest of them, and that of a narrower family below.
    """
    rng, m, rank, epsilon = np.random.default_rng(14), 20, 5, 2.0
    a = rng.standard_normal((8_000, rank, m)) / math.sqrt(rank)
    v = np.eye(m)[0]
    y = np.einsum("ski,sk->si", a, a @ v)
    own, worst, error = log_density(y, v, rank), 0.0, 0.0
    for angle in np.linspace(0, math.acos(0.9), 8):
        for nu in {ratios[0], 1.0, ratios[1]}:
            w = np.zeros(m)
            w[:2] = nu * math.cos(angle), nu * math.sin(angle)
            gain = -np.expm1(np.minimum(epsilon - own + log_density(y, w, rank), 0.0))
            if gain.mean() > worst:
                worst, error = gain.mean(), 5 * gain.std() / math.sqrt(gain.size)
    bound = VectorFamily(m, rank, 0.9, ratios).delta(epsilon).delta
    assert worst - error <= bound <= 1.15 * worst + error
    assert VectorFamily(m, rank, 0.95, (1.0, 1.0)).delta(epsilon).delta < worst - error


@pytest.mark.parametrize(("shape", "rank", "c"), [((6, 3), 2, 1.3), ((5, 2), 7, 0.8)])
def test_a_scaled_matrix_is_a_difference_of_chi_square_tails(
    shape: tuple[int, int], rank: int, c: float
) -> None:
    """Oracle: scipy's χ² of K = q(m + r − q) freedoms, q = min(rank, columns); 1e-6 of δ.

    The loss (K/2) ln c + (X/2)(1/c − 1) exceeds ε on one side of an X. One freedom more differs.
    """
    v = np.random.default_rng(15).standard_normal(shape)
    q = min(shape[1], rank)
    found = matrix_projection(v, c * v, rank, 1e-3).forward

    def delta(freedom: int, epsilon: float) -> float:
        edge = 2 * (epsilon - freedom / 2 * math.log(c)) / (1 / c - 1)
        law = stats.chi2(freedom)
        part = law.cdf if c > 1 else law.sf
        return float(part(edge) - math.exp(epsilon) * part(edge / c))

    freedom = q * (shape[0] + rank - q)
    assert delta(freedom, found) == pytest.approx(1e-3, rel=1e-6)
    assert delta(freedom + 1, found) != pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("c", [1.2, 0.7])
def test_a_sketch_of_one_row_covers_its_exact_loss(c: float) -> None:
    """One row: r normal numbers of two variances. Oracle: scipy's χ² tails; at most 1.6 times."""
    rank, delta = 12, 1e-4
    row = np.array([[3.0, -1.0, 2.0]])
    found = SketchRelease(row, math.sqrt(c) * row, rank).epsilon(delta)

    def excess(epsilon: float, ratio: float) -> float:
        edge = 2 * (epsilon - rank / 2 * math.log(ratio)) / (1 / ratio - 1)
        law = stats.chi2(rank)
        part = law.cdf if ratio > 1 else law.sf
        return float(part(edge) - math.exp(epsilon) * part(edge / ratio)) - delta

    for ratio, bound in ((c, found.forward), (1 / c, found.backward)):
        exact = optimize.brentq(excess, 1e-3, 30.0, args=(ratio,))
        assert exact <= bound <= 1.6 * exact
