"""Sampled laws of an entry, against enumeration and draws of the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lora_privacy.errors import NonFiniteError
from lora_privacy.laws import LAW_NAMES, LawName
from lora_privacy.noise import EmpiricalNoise, EntryNoise, empirical

Array = npt.NDArray[np.float64]
ROW = np.array([0.9, -0.4, 0.3, 1.1, -0.2])


def defined(law: str, rank: int, row: Array, index: int, draws: int) -> Array:
    """Draws of an entry of q (AᵀA/(vr) - I) from A itself, row by row of the definition."""
    rng, m = np.random.default_rng(99), row.size
    if law == "orthonormal":
        frames = np.linalg.qr(rng.standard_normal((draws, m, rank)))[0]
        a = np.swapaxes(frames, 1, 2) * math.sqrt(m)
    elif law == "uniform":
        a = rng.uniform(-math.sqrt(3), math.sqrt(3), (draws, rank, m))
    elif law == "rademacher":
        a = rng.choice([-1.0, 1.0], (draws, rank, m))
    else:
        a = rng.standard_normal((draws, rank, m))
    return np.einsum("ski,skj,j->si", a, a, row)[:, index] / rank - row[index]


@pytest.mark.parametrize("law", LAW_NAMES)
@pytest.mark.parametrize(("rank", "size"), [(1, 2), (2, 5), (4, 5)])
def test_draws_match_the_definition(law: LawName, rank: int, size: int) -> None:
    """Two-sample KS at level 1e-4; twice the scale must be rejected (but for a constant)."""
    row, index = ROW[:size], 1
    samples = EmpiricalNoise(law, rank, row, index, 20_000, np.random.default_rng(1)).samples
    expected = defined(law, rank, row, index, 20_000)
    # Rademacher noise is discrete: rounding must not split an atom.
    samples, expected = samples.round(9), expected.round(9)
    assert stats.ks_2samp(samples, expected).pvalue > 1e-4
    assert stats.ks_2samp(2 * samples + 0.01, expected).pvalue < 1e-4


@pytest.mark.parametrize("law", LAW_NAMES)
def test_moments_are_exact(law: LawName) -> None:
    """The sample agrees with the exact moments at 4.5 standard errors (1e-5 each)."""
    noise = EmpiricalNoise(law, 3, ROW, 3, 50_000, np.random.default_rng(2))
    sample = noise.samples
    assert noise.mean() == 0.0
    assert abs(sample.mean()) < 4.5 * noise.std() / math.sqrt(sample.size)
    error = 4.5 * (sample**2).std() / math.sqrt(sample.size)
    assert abs((sample**2).mean() - noise.var()) < error < 0.1 * noise.var()
    assert noise.std() ** 2 == pytest.approx(noise.var(), rel=1e-14)


def test_band_holds_for_an_enumerated_law() -> None:
    """All 2⁶ sign matrices give the exact law; the band at 1 - 1e-6 must hold it.

    The law for a Gaussian A, which has the same variance here, must leave it.
    """
    row = np.array([0.0, 1.0, -0.7])
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=6))).reshape(-1, 2, 3)
    exact = np.einsum("ski,skj,j->si", signs, signs, row)[:, 0] / 2
    noise = EmpiricalNoise("rademacher", 2, row, 0, 20_000, np.random.default_rng(4))
    points = np.linspace(-2, 2, 401) + 1e-4
    truth = (exact[:, None] <= points).mean(axis=0)
    band = noise.band(1 - 1e-6)
    assert np.abs(noise.cdf(points) - truth).max() <= band
    gaussian = EntryNoise(2, float(np.linalg.norm(row)), 0.0)
    assert gaussian.var() == pytest.approx(noise.var())
    assert np.abs(noise.cdf(points) - gaussian.cdf(points)).max() > band


def test_band_is_massarts() -> None:
    """√(ln(2/α)/(2n)): at n = 10⁴ and 95 % the classical .01358."""
    noise = EmpiricalNoise("gaussian", 1, ROW, 0, 10_000, np.random.default_rng(0))
    assert noise.band(0.95) == pytest.approx(0.0135810, rel=1e-5)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must lie in"):
            noise.band(bad)


def test_cdf_and_ppf_are_inverse_steps() -> None:
    """A quantile is the smallest draw whose cdf reaches p."""
    noise = EmpiricalNoise("uniform", 2, ROW, 0, 1_000, np.random.default_rng(0))
    p = np.arange(1, 1_001) / 1_000
    assert np.array_equal(noise.ppf(p), noise.samples)
    assert np.array_equal(noise.cdf(noise.samples), p)
    assert noise.ppf(0.0) == noise.samples[0]
    assert noise.cdf([-math.inf, math.inf]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("law", ["uniform", "rademacher"])
def test_blocks_do_not_change_the_law(law: LawName, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks smaller than a row of A the law is the same: KS at 1e-4 and exact moments."""
    monkeypatch.setattr(empirical, "_BLOCK", 4)
    small = EmpiricalNoise(law, 3, ROW, 0, 3_000, np.random.default_rng(5)).samples
    assert stats.ks_2samp(small.round(9), defined(law, 3, ROW, 0, 20_000).round(9)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("block", "sizes"),
    [(24, [4] * 6 + [3]), (20, [4, 4, 4, 4, 2, 4, 4, 1]), (7, [1] * 27), (2, [1] * 27)],
)
def test_blocks_hold_what_memory_allows(
    block: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine draws of rank 3 and five inputs, so many products at a time, and so many entries of A.

    What comes out is the mean over the rows a of A of a_i (a·q), less q_i.
    """
    drawn, unit = list[Array](), ROW / np.linalg.norm(ROW)

    def entries(_law: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
        drawn.append(rng.standard_normal(shape))
        return drawn[-1]

    monkeypatch.setattr(empirical, "_BLOCK", block)
    monkeypatch.setattr(empirical, "_entries", entries)
    found = empirical._independent("uniform", 3, unit, 1, 9, np.random.default_rng(0))
    a = np.concatenate(drawn).reshape(9, 3, 5)
    assert found == pytest.approx(np.einsum("sk,sk->s", a @ unit, a[:, :, 1]) / 3 - unit[1])
    # 24: eight draws, which are 24 rows in blocks of four, and then one; 20: six, and then three.
    assert [len(rows) for rows in drawn] == sizes


def test_a_sign_costs_a_bit() -> None:
    """Signs of 3 × 27 entries are the first 81 bits of eleven bytes."""
    rng, twin = np.random.default_rng(5), np.random.default_rng(5)
    signs = empirical._entries("rademacher", (3, 27), rng)
    bits = "".join(f"{byte:08b}" for byte in twin.bytes(11))
    assert signs.ravel().tolist() == [1.0 if bit == "1" else -1.0 for bit in bits[:81]]
    assert rng.bit_generator.state == twin.bit_generator.state


def test_uniform_entries_have_variance_one() -> None:
    """On ±√3: 100,000 draws reach both ends to 1e-3, and no further."""
    draws = empirical._entries("uniform", (1000, 100), np.random.default_rng(6))
    assert draws.shape == (1000, 100)
    assert -math.sqrt(3) <= draws.min() < -math.sqrt(3) + 1e-3
    assert math.sqrt(3) - 1e-3 < draws.max() < math.sqrt(3)


def test_a_cosine_above_one_by_rounding_leaves_no_rest() -> None:
    """With one entry the noise is q (S - 1), or q (mβ/r - 1), and no root of a negative number."""
    rho = math.nextafter(1.0, 2.0)
    s = np.random.default_rng(7).chisquare(3, 50) / 3
    assert empirical._gaussian(3, rho, 50, np.random.default_rng(7)) == pytest.approx(s - 1)
    beta = np.random.default_rng(7).beta(1.5, 1.0, 50)
    noise = empirical._orthonormal(3, 5, rho, 50, np.random.default_rng(7))
    assert noise == pytest.approx(beta * 5 / 3 - 1)


def test_full_rank_orthonormal_noise_is_zero() -> None:
    """(m/r) P = I at r = m."""
    noise = EmpiricalNoise("orthonormal", 5, ROW, 0, 100, np.random.default_rng(0))
    assert not noise.samples.any()
    assert noise.var() == 0.0


def test_bad_input_is_refused() -> None:
    """Fail closed, with what must hold."""
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="law must be one of"):
        EmpiricalNoise("unknown", 2, ROW, 0, 10, rng)
    with pytest.raises(ValueError, match="rank must be at most in_features"):
        EmpiricalNoise("orthonormal", 6, ROW, 0, 10, rng)
    with pytest.raises(IndexError, match="index must be below 5"):
        EmpiricalNoise("uniform", 2, ROW, 5, 10, rng)
    with pytest.raises(ValueError, match="index must be at least 0"):
        EmpiricalNoise("uniform", 2, ROW, -1, 10, rng)
    with pytest.raises(NonFiniteError, match="must be finite"):
        EmpiricalNoise("uniform", 2, [1.0, math.nan], 0, 10, rng)
    with pytest.raises(ValueError, match="not all zero"):
        EmpiricalNoise("uniform", 2, [0.0, 0.0], 0, 10, rng)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        EmpiricalNoise("uniform", 2, ROW, 0, 0, rng)
    with pytest.raises(TypeError, match="Generator"):
        EmpiricalNoise("uniform", 2, ROW, 0, 10, 7)
    noise = EmpiricalNoise("uniform", 2, ROW, 0, 10, rng)
    with pytest.raises(ValueError, match="NaN"):
        noise.cdf(math.nan)
    with pytest.raises(ValueError, match="probability must lie"):
        noise.ppf(1.5)
