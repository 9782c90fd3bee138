"""Moments of the noise, against exact integration over the entries of A itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from lora_privacy.errors import NonFiniteError, UnsupportedLawError
from lora_privacy.laws import EntryLaw, LawName, entry_law, peft_default_law
from lora_privacy.noise import (
    EntryNoise,
    expected_noise_energy,
    noise_covariance,
    noise_energy_variance,
    noise_variance,
    wishart_moments,
)

Array = npt.NDArray[np.float64]
UNKNOWN = EntryLaw("unknown", math.nan, math.nan)
CASES: list[tuple[LawName, int, int]] = [
    ("gaussian", 1, 3),
    ("gaussian", 2, 2),
    ("gaussian", 3, 2),
    ("gaussian", 3, 1),
    ("uniform", 2, 2),
    ("uniform", 1, 3),
    ("rademacher", 2, 3),
    ("rademacher", 3, 2),
    ("orthonormal", 1, 3),
    ("orthonormal", 2, 3),
    ("orthonormal", 1, 2),
    ("orthonormal", 1, 1),
]


def product_rule(law: str, rank: int, m: int) -> tuple[Array, Array]:
    """Weights and matrices M = AᵀA/(vr): exact for polynomials of degree 9 in each entry of A."""
    if law == "gaussian":
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    elif law == "uniform":
        nodes, weights = np.polynomial.legendre.leggauss(5)
        nodes = nodes * math.sqrt(3)
    else:
        nodes, weights = np.array([-1.0, 1.0]), np.ones(2)
    weights = weights / weights.sum()
    index = np.array(list(itertools.product(range(nodes.size), repeat=rank * m)))
    a = nodes[index].reshape(-1, rank, m)
    return weights[index].prod(axis=1), np.einsum("ski,skj->sij", a, a) / rank


def haar_rule(rank: int, m: int) -> tuple[Array, Array]:
    """Weights and matrices (m/r)P for a Haar projection P in dimension up to 3, exact."""
    if m == 1:
        return np.ones(1), np.ones((1, 1, 1))
    angle = 2 * math.pi * np.arange(24) / 24
    if m == 2:
        u, weights = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.full(24, 1 / 24)
    else:
        z, w = np.polynomial.legendre.leggauss(12)
        height, turn = (v.ravel() for v in np.meshgrid(z, angle, indexing="ij"))
        across = np.sqrt(1 - height**2)
        u = np.stack([across * np.cos(turn), across * np.sin(turn), height], axis=1)
        weights = np.repeat(w / 2, 24) / 24
    line = np.einsum("si,sj->sij", u, u)
    projection = line if rank == 1 else np.eye(m) - line
    return weights, (m / rank) * projection


def rule(law: str, rank: int, m: int) -> tuple[Array, Array]:
    return haar_rule(rank, m) if law == "orthonormal" else product_rule(law, rank, m)


ROWS = np.array([[0.8, -0.3, 0.5], [0.1, 0.9, -0.4]])


@pytest.mark.parametrize(("law", "rank", "m"), CASES)
def test_second_moments(law: LawName, rank: int, m: int) -> None:
    """Oracle: exact integration over A of N_i N'_j; 1e-12 absolute at entries of size 1."""
    weights, matrices = rule(law, rank, m)
    q, other = ROWS[0, :m], ROWS[1, :m]
    noise, other_noise = matrices @ q - q, matrices @ other - other
    assert weights @ noise == pytest.approx(np.zeros(m), abs=1e-13)
    cross = np.einsum("s,si,sj->ij", weights, noise, other_noise)
    assert noise_covariance(q, other, law, rank) == pytest.approx(cross, abs=1e-12)
    own = np.einsum("s,si,sj->ij", weights, noise, noise)
    assert noise_covariance(q, q, law, rank) == pytest.approx(own, abs=1e-12)
    variance = noise_variance(ROWS[:, :m], entry_law(law, rank, m), rank)
    assert variance[0] == pytest.approx(np.diag(own), abs=1e-12)
    assert variance.shape == (2, m)


@pytest.mark.parametrize(("law", "rank", "m"), CASES)
def test_energy_of_a_gradient(law: LawName, rank: int, m: int) -> None:
    """E and Var of ‖G(M - I)‖², integrated exactly; 1e-12 relative."""
    weights, matrices = rule(law, rank, m)
    g = ROWS[:, :m]
    energy = (np.einsum("ni,sij->snj", g, matrices - np.eye(m)) ** 2).sum(axis=(1, 2))
    mean = float(weights @ energy)
    assert expected_noise_energy(g, entry_law(law, rank, m), rank) == pytest.approx(
        mean, rel=1e-12, abs=1e-13
    )
    if law in ("uniform", "rademacher"):
        with pytest.raises(UnsupportedLawError, match="take the sample variance"):
            noise_energy_variance(g, law, rank)
        return
    variance = float(weights @ (energy - mean) ** 2)
    assert noise_energy_variance(g, law, rank) == pytest.approx(variance, rel=1e-11, abs=1e-13)
    assert noise_energy_variance(g[0], law, rank) == pytest.approx(
        float(
            weights
            @ (
                ((matrices @ g[0] - g[0]) ** 2).sum(axis=1)
                - expected_noise_energy(g[0], law, rank)
            )
            ** 2
        ),
        rel=1e-11,
        abs=1e-13,
    )


@pytest.mark.parametrize(("law", "rank", "m"), CASES)
def test_wishart_moments(law: LawName, rank: int, m: int) -> None:
    """Each field against exact integration; 1e-12."""
    weights, matrices = rule(law, rank, m)

    def mean(f: Callable[[Array], Array]) -> float:
        return float(weights @ f(matrices))

    moments = wishart_moments(rank, law, m)
    assert moments.var_diagonal == pytest.approx(mean(lambda x: (x[:, 0, 0] - 1) ** 2), abs=1e-12)
    square = np.einsum("s,sij->ij", weights, matrices @ matrices)
    assert square == pytest.approx(moments.mean_square * np.eye(m), abs=1e-12)
    assert moments.mean_trace_square == pytest.approx(np.trace(square), abs=1e-12)
    if m > 1:
        assert moments.var_offdiagonal == pytest.approx(mean(lambda x: x[:, 0, 1] ** 2), abs=1e-12)
        assert moments.cov_diagonal == pytest.approx(
            mean(lambda x: (x[:, 0, 0] - 1) * (x[:, 1, 1] - 1)), abs=1e-12
        )
    else:
        assert (moments.var_offdiagonal, moments.cov_diagonal) == (0.0, 0.0)


def test_orthonormal_differs_from_its_iid_look_alike() -> None:
    """The i.i.d. formula with the kurtosis of an orthonormal entry is far off: m = 3, r = 2."""
    law = entry_law("orthonormal", 2, 3)
    exact = noise_variance([1.0, 0.0, 0.0], law, 2)
    alike = noise_variance([1.0, 0.0, 0.0], EntryLaw("uniform", law.variance, law.kurtosis), 2)
    assert np.all(exact < 0.7 * alike)


def test_large_sizes_by_draws() -> None:
    """Mean and variance of the energy at m = 40, r = 8, n = 3 on 4,000 draws of a Gaussian A.

    At 4.5 standard errors (level 1e-5); a variance 25 % off must be rejected.
    """
    rng = np.random.default_rng(11)
    g, draws = rng.standard_normal((3, 40)), 4_000
    a = rng.standard_normal((draws, 8, 40)) / math.sqrt(8)
    noise = np.einsum("ni,ski,skj->snj", g, a, a, optimize=True) - g
    energy = (noise**2).sum(axis=(1, 2))
    mean, variance = (f(g, "gaussian", 8) for f in (expected_noise_energy, noise_energy_variance))
    assert abs(energy.mean() - mean) < 4.5 * math.sqrt(variance / draws)
    spread = (energy - mean) ** 2
    error = 4.5 * spread.std() / math.sqrt(draws)
    assert abs(spread.mean() - variance) < error < 0.25 * variance


def test_gaussian_variance_is_that_of_the_entry_law() -> None:
    """Two modules, one number; and PEFT's default has a kurtosis of 9/5, whatever its variance."""
    q = np.array([3.0, 0.0, -4.0])
    for i, value in enumerate(noise_variance(q, "gaussian", 5)):
        assert value == pytest.approx(EntryNoise(5, 5.0, q[i]).var(), rel=1e-14)
    peft = noise_variance(q, peft_default_law(3), 5)
    assert peft == pytest.approx((25 - q**2 + 0.8 * q**2) / 5, rel=1e-14)


def test_bad_input_is_refused() -> None:
    """Unknown law, NaN, a scalar, unequal rows, an impossible rank or kurtosis."""
    q = np.ones(3)
    for call in (
        lambda: noise_variance(q, UNKNOWN, 2),
        lambda: noise_covariance(q, q, UNKNOWN, 2),
        lambda: expected_noise_energy(q, UNKNOWN, 2),
        lambda: noise_energy_variance(q, UNKNOWN, 2),
        lambda: wishart_moments(2, UNKNOWN, 3),
    ):
        with pytest.raises(ValueError, match="law of A is unknown"):
            call()
    with pytest.raises(NonFiniteError, match="must be finite"):
        noise_variance([1.0, math.nan], "gaussian", 2)
    with pytest.raises(ValueError, match="non-empty vector"):
        noise_variance(1.0, "gaussian", 2)
    with pytest.raises(ValueError, match="vectors of one length"):
        noise_covariance(q, q[:2], "gaussian", 2)
    with pytest.raises(ValueError, match="rank must be at most in_features"):
        noise_variance(q, EntryLaw("orthonormal", 0.25, 1.8), 4)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        expected_noise_energy(q, "gaussian", 0)
    with pytest.raises(ValueError, match="kurtosis must lie in"):
        noise_variance(q, EntryLaw("uniform", 1.0, math.nan), 2)
    with pytest.raises(ValueError, match="law must be one of"):
        noise_variance(q, "cauchy", 2)
