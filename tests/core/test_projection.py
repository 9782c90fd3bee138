"""A as a value: reproducible, independent across layers and steps, of the law it names."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_privacy.core import RandomProjection
from lora_privacy.laws import LAW_NAMES

LEVEL = 1e-4
IID = ("gaussian", "uniform", "rademacher")
PINNED = [-1.4204314945208516, 0.5129752219583446, -0.21251400770496204]


def draws(law: str, rank: int, in_features: int, count: int, seed: int = 11) -> np.ndarray:
    """Stack A_0, A_1, … in float64."""
    projection = RandomProjection(rank, in_features, law, seed=seed)
    return np.stack([projection.matrix(t, torch.float64).numpy() for t in range(count)])


@pytest.mark.parametrize("law", LAW_NAMES)
def test_matrix_is_a_function_of_seed_layer_and_step(law: str) -> None:
    """Equal arguments give equal matrices, and any other one gives another."""
    first = RandomProjection(4, 12, law, seed=5, layer="q").matrix(3)
    assert torch.equal(first, RandomProjection(4, 12, law, seed=5, layer="q").matrix(3))
    others = [
        RandomProjection(4, 12, law, seed=5, layer="q").matrix(4),
        RandomProjection(4, 12, law, seed=6, layer="q").matrix(3),
        RandomProjection(4, 12, law, seed=5, layer="v").matrix(3),
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert not torch.equal(one, other)


def test_first_draw_is_pinned() -> None:
    """A stored run is replayed from its seeds: the stream may never change unnoticed."""
    row = RandomProjection(1, 3, seed=2**200, layer="layer.0").matrix(7, torch.float64)[0]
    assert row.tolist() == pytest.approx(PINNED, rel=1e-15, abs=0)


def test_seeds_that_agree_in_32_bits_differ() -> None:
    """The CPU generator of torch reads 32 bits of a seed; our key keeps them all."""
    low = torch.randn(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(low, torch.randn(4, generator=torch.Generator().manual_seed(3 + 2**32)))
    ours = [RandomProjection(1, 4, seed=3 + k * 2**32).matrix(0) for k in (0, 1, 2**60)]
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], ours[2])


def test_names_and_steps_have_no_common_encoding() -> None:
    """('a', step 11) and ('a1', step 1) and seed 1 with 'a' must be three keys."""
    ambiguous = [
        RandomProjection(1, 8, seed=1, layer="a").matrix(11),
        RandomProjection(1, 8, seed=1, layer="a1").matrix(1),
        RandomProjection(1, 8, seed=11, layer="a").matrix(1),
        RandomProjection(1, 8, seed=1, layer="1a").matrix(1),
    ]
    for one, other in itertools.combinations(ambiguous, 2):
        assert not torch.equal(one, other)


def test_float32_is_the_float64_matrix_rounded() -> None:
    """The type changes the rounding only."""
    projection = RandomProjection(4, 12, seed=0)
    double = projection.matrix(0, torch.float64)
    assert torch.equal(projection.matrix(0), double.float())
    assert projection.matrix(0, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("law", LAW_NAMES)
def test_global_generators_are_untouched(law: str) -> None:
    """Neither torch's nor numpy's global state is moved or read."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is watched
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    projection = RandomProjection(3, 9, law, seed=4)
    first = projection.matrix(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(projection.matrix(0), first)


@pytest.mark.parametrize("law", IID)
def test_entries_have_the_law_named(law: str) -> None:
    """KS (Gaussian, uniform) and χ² on signs at level 1e-4; 3 % more variance is rejected."""
    x = draws(law, 8, 500, 100).ravel() * math.sqrt(8)
    named = {"gaussian": stats.norm(), "uniform": stats.uniform(-math.sqrt(3), math.sqrt(12))}
    if law == "rademacher":
        assert np.abs(np.abs(x) - 1).max() < 1e-12
        assert stats.binomtest(int((x > 0).sum()), x.size).pvalue > LEVEL
        assert stats.binomtest(int((x > 0).sum()), x.size, 0.505).pvalue < LEVEL
        return
    wrong = named["uniform" if law == "gaussian" else "gaussian"]
    assert stats.kstest(x, named[law].cdf).pvalue > LEVEL
    assert stats.kstest(x, wrong.cdf).pvalue < LEVEL
    assert stats.kstest(x / math.sqrt(1.03), named[law].cdf).pvalue < LEVEL


@pytest.mark.parametrize("law", LAW_NAMES)
def test_stated_moments_are_those_of_the_draws(law: str) -> None:
    """Mean second and fourth power of a column within 4 standard errors; 6 % off is not."""
    projection = RandomProjection(8, 10, law, seed=3)
    assert projection.variance == 1 / 8
    # The mean over a column is one observation a matrix: entries of a frame are dependent.
    x = draws(law, 8, 10, 6_000, seed=3)[:, :, 5]
    expected = {2: 1 / 8, 4: projection.kurtosis / 64}
    for power, moment in expected.items():
        values = (x**power).mean(1)
        error = max(values.std() / math.sqrt(len(values)), 1e-12)
        assert abs(values.mean() - moment) < 4 * error
        assert abs(values.mean() - 1.06 * moment) > 4 * error


@pytest.mark.parametrize("law", LAW_NAMES)
def test_mean_of_the_gram_matrix_is_the_identity(law: str) -> None:
    """E AᵀA = I, from 4,000 draws; level 1e-4 a family of 36 entries by Bonferroni."""
    a = draws(law, 3, 8, 4_000)
    gram = np.einsum("sri,srj->sij", a, a)
    upper = np.triu_indices(8)
    mean, error = gram.mean(0)[upper], gram.std(0)[upper] / math.sqrt(len(a)) + 1e-12
    z = np.abs(mean - np.eye(8)[upper]) / error
    assert z.max() < stats.norm.isf(LEVEL / 72)
    assert (np.abs(mean - 1.1 * np.eye(8)[upper]) / error).max() > 6


def test_layers_and_steps_are_independent() -> None:
    """Correlation and rank correlation of 200,000 pairs at level 1e-4; ρ = .02 is seen."""
    size = (8, 500)
    one = [RandomProjection(*size, seed=1, layer="a").matrix(t).numpy().ravel() for t in range(51)]
    other = [
        RandomProjection(*size, seed=1, layer="b").matrix(t).numpy().ravel() for t in range(50)
    ]
    x = np.concatenate(one[:50])
    for y in (np.concatenate(other), np.concatenate(one[1:])):
        assert stats.pearsonr(x, y).pvalue > LEVEL
        assert stats.spearmanr(x, y).pvalue > LEVEL
        assert stats.pearsonr(np.abs(x), np.abs(y)).pvalue > LEVEL
        assert stats.pearsonr(x, y + 0.02 * x).pvalue < LEVEL


def test_orthonormal_rows_are_a_scaled_frame() -> None:
    """A Aᵀ = (m/r) I, and AᵀA = I for a square A."""
    a = draws("orthonormal", 5, 12, 3)
    gram = np.einsum("sri,sqi->srq", a, a)
    assert np.abs(gram - np.eye(5) * 12 / 5).max() < 1e-12
    square = RandomProjection(6, 6, "orthonormal", seed=1).matrix(0, torch.float64)
    assert torch.allclose(square.T @ square, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_orthonormal_row_space_is_haar() -> None:
    """β = ‖P x‖² ~ Beta(r/2, (m−r)/2) for two fixed x, KS at 1e-4; Beta of r + ½ is rejected."""
    r, m = 3, 10
    a = draws("orthonormal", r, m, 4_000) * math.sqrt(r / m)
    for x in (np.eye(m)[0], np.ones(m) / math.sqrt(m)):
        beta = (np.einsum("sri,i->sr", a, x) ** 2).sum(1)
        assert stats.kstest(beta, stats.beta(r / 2, (m - r) / 2).cdf).pvalue > LEVEL
        assert stats.kstest(beta, stats.beta((r + 0.5) / 2, (m - r) / 2).cdf).pvalue < LEVEL


def test_orthonormal_frame_is_haar_not_only_its_space() -> None:
    """Without the sign fix the first row of Q is biased: Q₁₁ must be symmetric about 0."""
    first = draws("orthonormal", 3, 10, 3_000)[:, 0, 0]
    assert stats.binomtest(int((first > 0).sum()), first.size).pvalue > LEVEL
    rng = np.random.default_rng(0)
    raw = np.array([np.linalg.qr(rng.standard_normal((10, 3)))[0][0, 0] for _ in range(2_000)])
    assert stats.binomtest(int((raw > 0).sum()), raw.size).pvalue < LEVEL


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"in_features": 0}, ValueError, "in_features must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"law": "normal"}, ValueError, "law must be one of"),
        ({"law": "orthonormal", "rank": 13}, ValueError, "rank must be at most in_features"),
        ({"layer": 3}, TypeError, "layer must be a string"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], match: str) -> None:
    """Each error names the argument and what must hold."""
    with pytest.raises(error, match=match):
        RandomProjection(**({"rank": 4, "in_features": 12, "seed": 0} | arguments))


def test_seed_is_required_and_step_is_checked() -> None:
    """No seed, no projection; numpy integers are taken as plain ones."""
    with pytest.raises(TypeError, match="seed"):
        RandomProjection(4, 12)  # pyright: ignore[reportCallIssue]
    projection = RandomProjection(np.int64(4), 12, seed=np.int64(9))
    assert projection == RandomProjection(4, 12, seed=9)
    with pytest.raises(ValueError, match="step must be at least 0"):
        projection.matrix(-1)
    with pytest.raises(TypeError, match="floating-point"):
        projection.matrix(0, torch.int64)
