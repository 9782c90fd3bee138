"""The implied ε: its formula against Monte Carlo, its numbers, and what it refuses to promise."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from lora_privacy.dp import (
    ImpliedPrivacy,
    RdpAccountant,
    SampledGaussian,
    implied_noise_multiplier,
    implied_privacy,
)

RUN = {"batch_size": 32, "dataset_size": 3200, "steps": 100, "delta": 1e-5}
PAGE = Path(__file__).parents[2] / "docs" / "theory" / "implicit-privacy.md"


def _read(layers: list[tuple[int, int]], batch: int, **options: object) -> ImpliedPrivacy:
    """The run of the page's tables: 60,000 records, 3 epochs, δ = 1e-5."""
    return implied_privacy(
        layers=layers,
        batch_size=batch,
        dataset_size=60_000,
        steps=3 * 60_000 // batch,
        delta=1e-5,
        **{"distortion": 0.0, **options},  # type: ignore[arg-type]
    )


def _is_rounded_up(printed: str, value: float) -> bool:
    """Whether ``printed`` is ``value`` rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.isclose(
        float(printed.replace(",", "")), math.ceil(value / unit) * unit, rel_tol=1e-9
    )


def _noise_std(per_sample: np.ndarray, rank: int, draws: int) -> float:
    """Root mean square entry of (Σ G_i)(AᵀA - I), by drawing A. ``per_sample`` is (b, n, m)."""
    rng = np.random.default_rng(20240917)
    total = per_sample.sum(axis=0)
    m = total.shape[1]
    square = 0.0
    for _ in range(draws):
        a = rng.standard_normal((rank, m)) / math.sqrt(rank)
        square += float(np.mean((total @ a.T @ a - total) ** 2))
    return math.sqrt(square / draws)


@pytest.mark.parametrize(
    ("aggregation", "other"), [("independent", "coherent"), ("coherent", "independent")]
)
def test_formula_matches_the_noise_of_drawn_projections(aggregation: str, other: str) -> None:
    """Monte Carlo from the definition at τ = 0: noise per entry over the norm of one sample.

    Rows of norm 1; orthogonal samples for "independent", equal ones for "coherent". 400 draws of
    A at m = 512 give 2 % at 4 standard errors, a bias of 1/m included; the other formula is off
    by √b = 3.
    """
    b, n, m, rank = 9, 4, 512, 8
    samples = np.zeros((b, n, m))
    for i in range(b):
        for row in range(n):
            samples[i, row, (i * n + row) if aggregation == "independent" else row] = 1.0
    clip_norm = math.sqrt(n)
    measured = _noise_std(samples, rank, 400) / clip_norm
    shape = {"rank": rank, "out_features": n, "batch_size": b, "distortion": 0.0}
    assert implied_noise_multiplier(**shape, aggregation=aggregation) == pytest.approx(
        measured, rel=0.02
    )
    assert implied_noise_multiplier(**shape, aggregation=other) != pytest.approx(measured, rel=0.5)


def test_gradients_that_cancel_leave_no_noise() -> None:
    """Why neither aggregation is a lower bound: two opposite samples, and the noise is 0."""
    sample = np.random.default_rng(1).standard_normal((1, 3, 64))
    assert _noise_std(np.concatenate([sample, -sample]), 4, 5) == 0


@pytest.mark.parametrize("distortion", [0.0, 0.2, 0.9])
def test_distortion_is_the_worst_case_over_the_rescaling(distortion: float) -> None:
    """Noise from the shortest row, 1/(1+τ), against the clip of the longest, 1/(1-τ)."""
    flat = implied_noise_multiplier(rank=8, out_features=768, batch_size=32, distortion=0.0)
    found = implied_noise_multiplier(
        rank=8, out_features=768, batch_size=32, distortion=distortion
    )
    shortest, longest = 1 / (1 + distortion), 1 / (1 - distortion)
    assert found == pytest.approx(flat * shortest / longest, rel=1e-14, abs=0)


def test_published_size_of_the_multiplier() -> None:
    """N = 768, r = 8, b = 32 gives at most .0722, even without distortion."""
    shape = {"rank": 8, "out_features": 768, "batch_size": 32}
    assert implied_noise_multiplier(**shape, distortion=0.0) == pytest.approx(0.07217, abs=5e-6)
    coherent = implied_noise_multiplier(**shape, distortion=0.0, aggregation="coherent")
    assert coherent == pytest.approx(0.40825, abs=5e-6)
    assert implied_noise_multiplier(**shape, distortion=1.0) == 0
    assert implied_noise_multiplier(**shape, distortion=7.0) == 0


def test_no_honest_distortion_exists_at_rank_eight() -> None:
    """24,576 rows at total failure .05 leave no τ < 1; at rank 64 there is one. Oracle: chi2."""

    def total(distortion: float, rank: int) -> float:
        low, high = rank * (1 - distortion) ** 2, rank * (1 + distortion) ** 2
        return 24_576 * float(stats.chi2.cdf(low, rank) + stats.chi2.sf(high, rank))

    assert total(1 - 1e-12, 8) > 0.05
    tau = float(optimize.brentq(lambda t: total(t, 64) - 0.05, 0.01, 0.99))
    for rank, distortion in [(8, 0.999), (64, tau), (64, 0.3)]:
        reading = implied_privacy(layers=[(768, rank)], distortion=distortion, **RUN)
        expected = total(distortion, rank)
        assert reading.failure_probability_per_step == pytest.approx(
            min(1.0, expected), rel=1e-9, abs=0
        )
        assert reading.failure_probability == pytest.approx(
            min(1.0, 100 * expected), rel=1e-9, abs=0
        )


def test_distortion_probability_matches_drawn_projections() -> None:
    """One row, one step: the share of draws of A outside [1-τ, 1+τ], binomial test at 1e-4.

    The squared-norm event [1-τ, 1+τ] on ‖Ax‖²/‖x‖² must be rejected.
    """
    rng = np.random.default_rng(7)
    x = rng.standard_normal(20)
    norms = np.linalg.norm(rng.standard_normal((20_000, 5, 20)) @ x, axis=1)
    ratio = norms / math.sqrt(5) / np.linalg.norm(x)
    outside = int(np.sum(np.abs(ratio - 1) > 0.4))
    reading = implied_privacy(
        layers=[(1, 5)], batch_size=1, dataset_size=10, steps=1, delta=1e-5, distortion=0.4
    )
    p = reading.failure_probability
    assert stats.binomtest(outside, len(ratio), p).pvalue > 1e-4
    squared = float(stats.chi2.cdf(5 * 0.6, 5) + stats.chi2.sf(5 * 1.4, 5))
    assert stats.binomtest(outside, len(ratio), squared).pvalue < 1e-4


def test_layers_add_as_one_gaussian_shift() -> None:
    """z⁻² adds up; four equal layers halve z. ε is the accountant's at that z."""
    one = implied_privacy(layers=[(384, 4)], distortion=0.3, **RUN)
    four = implied_privacy(layers=[(384, 4)] * 4, distortion=0.3, **RUN)
    assert one.noise_multiplier == pytest.approx(2 * four.noise_multiplier, rel=1e-14, abs=0)
    mixed = implied_privacy(layers=[(384, 4), (1536, 16)], distortion=0.3, **RUN)
    parts = [
        implied_noise_multiplier(rank=r, out_features=n, batch_size=32, distortion=0.3)
        for n, r in [(384, 4), (1536, 16)]
    ]
    expected = sum(z**-2 for z in parts) ** -0.5
    assert mixed.noise_multiplier == pytest.approx(expected, rel=1e-14, abs=0)
    bound = RdpAccountant().compose(SampledGaussian(mixed.noise_multiplier, 0.01), 100)
    assert mixed.epsilon == bound.epsilon(1e-5).epsilon
    assert mixed.sample_rate == 0.01


def test_the_implied_epsilon_is_useless_at_ordinary_sizes() -> None:
    """MiniLM's query and value maps at rank 8, two epochs: thousands of nats, and it says so."""
    reading = implied_privacy(layers=[(384, 8)] * 12, distortion=0.5, **RUN)
    assert reading.epsilon > 1000
    text = str(reading)
    assert text.startswith("Not a guarantee.")
    for part in (
        "not Gaussian",
        "1 at every rank as soon as two rows of the gradient are non-zero",
        "one draw of A",
        "function of the private data",
        "projection of a matrix gradient is proved not",
    ):
        assert part in text


def test_the_table_of_the_page_is_what_the_library_returns() -> None:
    """Every z (three digits) and ε (rounded up to three) of the docs, recomputed."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+ / .+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for n, rank, cells in rows:
        for batch, cell in zip((16, 64, 256), cells.split(" | "), strict=True):
            reading = _read([(int(n), int(rank))], batch)
            z, epsilon = cell.split(" / ")
            assert float(z) == pytest.approx(reading.noise_multiplier, rel=5e-3, abs=0)
            assert _is_rounded_up(epsilon, reading.epsilon), (n, rank, batch, reading.epsilon)


def test_the_sentences_of_the_page_are_what_the_library_returns() -> None:
    """Twelve layers at three distortions, the coherent reading, and the two largest z."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"([\d,]+)\s+at\s+τ = (0(?:\.\d)?)[,.\n ]", page)
    assert [tau for _, tau in found] == ["0", "0.3", "0.5"]
    for epsilon, tau in found:
        reading = _read([(384, 8)] * 12, 32, distortion=float(tau))
        assert _is_rounded_up(epsilon, reading.epsilon), (tau, reading.epsilon)
    coherent = _read([(768, 8)], 32, aggregation="coherent")
    assert _is_rounded_up(re.findall(r"b = 32 reads (\S+)\. ", page)[0], coherent.epsilon)
    sizes = re.findall(r"z ≤ (\S+) \(independent\).*?z ≤ (\S+) if coherent", page)
    independent = _read([(768, 8)], 32)
    for printed, reading in zip(sizes[0], (independent, coherent), strict=True):
        assert _is_rounded_up(printed, reading.noise_multiplier)


def test_the_distortions_of_the_page() -> None:
    """Least τ at total failure .05 of 24,576 rows, rounded up; oracle: chi2 and a root finder."""
    page = PAGE.read_text(encoding="utf-8")
    cells = {
        name: re.findall(rf"^\| {name} \| (.+) \|$", page, re.MULTILINE)[0].split(" | ")
        for name in ("rank", "least τ", r"factor \(1−τ\)/\(1\+τ\)")
    }
    assert len(cells["rank"]) == 6
    for rank, least, factor in zip(*cells.values(), strict=True):
        r = int(rank)

        def excess(t: float, r: int = r) -> float:
            low, high = r * max(0.0, 1 - t) ** 2, r * (1 + t) ** 2
            return 24_576 * float(stats.chi2.cdf(low, r) + stats.chi2.sf(high, r)) - 0.05

        tau = float(optimize.brentq(excess, 0.01, 3.0))
        if least == "none below 1":
            assert tau > 1
            assert factor == "0"
            continue
        assert _is_rounded_up(least, tau)
        assert float(factor) == pytest.approx((1 - tau) / (1 + tau), rel=0, abs=5.1e-4)


def test_a_matrix_needs_two_columns_and_a_continuous_law() -> None:
    """The page's symmetry argument, its exceptions included, on drawn projections M = AᵀA."""
    rng = np.random.default_rng(5)
    v = rng.standard_normal((6, 3))
    other = v.copy()
    other[:, 0] += rng.standard_normal(6)

    def asymmetry(a: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
        product = left.T @ (a.T @ (a @ right))
        return float(np.abs(product - product.T).max() / np.abs(product).max())

    draws = [rng.standard_normal((2, 6)) for _ in range(200)]
    assert max(asymmetry(a, v, v) for a in draws) < 1e-12
    assert max(asymmetry(a, v, 2 * v) for a in draws) < 1e-12
    assert min(asymmetry(a, v, other) for a in draws) > 1e-6
    # Signs at rank 2: (A e₁)·(A e₂) is 0 for half of the sixteen matrices.
    signs = [np.array(s).reshape(2, 2) for s in np.ndindex(2, 2, 2, 2)]
    products = [(1 - 2 * s)[:, 0] @ (1 - 2 * s)[:, 1] for s in signs]
    assert products.count(0) == 8


def test_a_distortion_of_one_has_no_epsilon() -> None:
    """Z is 0, and ε is infinite for the stated reason."""
    reading = implied_privacy(layers=[(384, 8)], distortion=1.0, **RUN)
    assert reading.noise_multiplier == 0
    assert math.isinf(reading.epsilon)
    assert "bounds no clip norm" in str(reading)
    assert isinstance(reading, ImpliedPrivacy)


def test_distortion_has_no_default() -> None:
    """Whoever wants the flattering 0 must write it."""
    with pytest.raises(TypeError, match="distortion"):
        implied_noise_multiplier(rank=8, out_features=768, batch_size=32)
    with pytest.raises(TypeError, match="distortion"):
        implied_privacy(layers=[(768, 8)], **RUN)
    certain = implied_privacy(layers=[(768, 8)], distortion=0.0, **RUN)
    assert certain.failure_probability == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"layers": []}, ValueError, "at least one"),
        ({"layers": [(768, 8, 384)]}, ValueError, "must be a pair"),
        ({"layers": [(768, 0)]}, ValueError, "rank must be at least 1"),
        ({"layers": [(0, 8)]}, ValueError, "out_features must be at least 1"),
        ({"layers": [(768.0, 8)]}, TypeError, "out_features must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"dataset_size": 31}, ValueError, "A batch cannot exceed the data set"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"delta": 0.0}, ValueError, "delta must lie in"),
        ({"delta": math.nan}, ValueError, "delta must lie in"),
        ({"distortion": -0.1}, ValueError, "distortion must be finite"),
        ({"distortion": math.nan}, ValueError, "distortion must be finite"),
        ({"distortion": math.inf}, ValueError, "distortion must be finite"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of"),
    ],
)
def test_bad_input_is_refused(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    """Named argument, what came, what must hold."""
    arguments = {"layers": [(768, 8)], "distortion": 0.5, **RUN, **change}
    with pytest.raises(error, match=match):
        implied_privacy(**arguments)
