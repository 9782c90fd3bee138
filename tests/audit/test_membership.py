"""Membership inference: each attack against a direct loop and in games with known answers."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from lora_privacy.audit import membership
from lora_privacy.audit.membership import (
    attack_p,
    attack_r,
    lira,
    logit_confidence,
    rmia,
    tune_offline_a,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Game:
    """One target model and R references, half of which were trained on each sample."""

    truth: Bools  # (N,)
    members: Bools  # (R, N)
    target: Floats  # ln p, (N,)
    references: Floats  # (R, N)
    population: Floats  # (Z,)
    population_references: Floats  # (R, Z)

    def reference_arguments(self) -> dict[str, Any]:
        return {
            "reference_log_probs": self.references,
            "reference_members": self.members,
            "population_reference_log_probs": self.population_references,
        }

    def rmia_arguments(self) -> dict[str, Any]:
        return {
            "log_probs": self.target,
            "population_log_probs": self.population,
            **self.reference_arguments(),
        }


def log_sigmoid(phi: Floats) -> Floats:
    return -np.logaddexp(0.0, -phi)


def play(seed: int, n: int, z: int, references: int, shift: float, spread: float = 2.0) -> Game:
    """φ = centre + shift · IN + noise of variance 1; the centres have variance ``spread``²."""
    rng = np.random.default_rng(seed)
    halves = np.tile(np.arange(references)[:, None] % 2 == 0, n)
    members = np.vstack([rng.random(n) < 0.5, rng.permuted(halves, axis=0)])
    phi = rng.normal(0, spread, n) + shift * members + rng.standard_normal(members.shape)
    population = rng.normal(0, spread, z) + rng.standard_normal((references + 1, z))
    log_p, population_log_p = log_sigmoid(phi), log_sigmoid(population)
    return Game(
        truth=members[0],
        members=members[1:],
        target=log_p[0],
        references=log_p[1:],
        population=population_log_p[0],
        population_references=population_log_p[1:],
    )


SMALL = play(20240917, n=25, z=17, references=6, shift=1.0)


# Losses: attack-P and attack-R


def test_attack_p_is_a_count() -> None:
    """Oracle: a double loop, ties included (losses on a grid of 7 values); exact."""
    rng = np.random.default_rng(1)
    losses, population = rng.integers(0, 7, 40) / 3, rng.integers(0, 7, 30) / 3
    expected = [sum(1 for z in population if z > x) / 30 for x in losses]
    assert attack_p(losses=losses, population_losses=population).tolist() == expected


def test_attack_r_is_a_count_over_out_references() -> None:
    """Oracle: a double loop, ties included; exact. Counting IN references too must differ."""
    rng = np.random.default_rng(2)
    losses, references = rng.integers(0, 5, 25) / 3, rng.integers(0, 5, (6, 25)) / 3
    expected = []
    for i in range(25):
        out = [references[r, i] for r in range(6) if not SMALL.members[r, i]]
        expected.append(sum(1 for loss in out if loss > losses[i]) / len(out))
    arguments: dict[str, Any] = {"losses": losses, "reference_losses": references}
    found = attack_r(**arguments, reference_members=SMALL.members)
    assert found.tolist() == expected
    assert attack_r(**arguments).tolist() != expected


# LiRA


@pytest.mark.parametrize(
    "log_p", [-1e-300, -(2.0**-53), -1e-12, -1e-3, -0.5, -0.693147, -1.0, -40.0, -3000.0]
)
def test_logit_matches_mpmath(log_p: float) -> None:
    """Oracle: ln(p/(1 - p)) at 1400 digits, with 1 - p at least 2⁻⁵³; 1e-15 relative or absolute.

    At -3000 the naive p/(1 - p) underflows, and at -1e-12 it keeps four digits.
    """
    with mp.workdps(1400):
        p = mp.exp(mp.mpf(min(log_p, -(2.0**-53))))
        expected = float(mp.log(p / (1 - p)))
    assert logit_confidence(log_p) == pytest.approx(expected, rel=1e-15, abs=1e-15)


def direct_lira(game: Game, mode: str, variance: str) -> list[float]:
    """Algorithm 1 of Carlini et al. by loops, the Gaussian densities from scipy."""
    references, samples = game.members.shape

    def phi(log_p: float) -> float:
        with mp.workdps(40):
            p = mp.exp(mp.mpf(float(log_p)))
            return float(mp.log(p / (1 - p)))

    groups: dict[bool, list[list[float]]] = {True: [], False: []}
    for i in range(samples):
        for kind, group in groups.items():
            chosen = [r for r in range(references) if game.members[r, i] == kind]
            group.append([phi(game.references[r, i]) for r in chosen])

    def deviation(kind: bool, i: int) -> float:
        if variance == "each":
            return statistics.stdev(groups[kind][i])
        squares = [(x - statistics.fmean(g)) ** 2 for g in groups[kind] for x in g]
        freedom = sum(len(g) - 1 for g in groups[kind])
        return math.sqrt(math.fsum(squares) / freedom)

    scores = []
    for i in range(samples):
        x = phi(game.target[i])
        mean, spread = statistics.fmean(groups[False][i]), deviation(False, i)
        if mode == "offline":
            scores.append((x - mean) / spread)
            continue
        mean_in, spread_in = statistics.fmean(groups[True][i]), deviation(True, i)
        log_in = stats.norm.logpdf(x, mean_in, spread_in)
        scores.append(float(log_in - stats.norm.logpdf(x, mean, spread)))
    return scores


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("variance", ["pooled", "each"])
def test_lira_matches_a_direct_loop(mode: Any, variance: Any) -> None:
    """Oracle: loops with mpmath, statistics and scipy's densities; 1e-12 relative or absolute."""
    game = play(3, n=25, z=2, references=24, shift=1.0)
    found = lira(
        log_probs=game.target,
        reference_log_probs=game.references,
        reference_members=game.members,
        mode=mode,
        variance=variance,
    )
    assert found == pytest.approx(direct_lira(game, mode, variance), rel=1e-12, abs=1e-12)


def test_offline_score_orders_as_the_published_one() -> None:
    """Φ of the score is 1 - P[N(μ_out, σ_out²) > φ]; it rounds to 1 where the score orders on."""
    out = log_sigmoid(np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))
    target = log_sigmoid(np.array([0.5, 20.0, 30.0]))
    score = lira(log_probs=target, reference_log_probs=out, mode="offline")
    published = stats.norm.cdf(np.array([0.5, 20.0, 30.0]), 0.0, math.sqrt(2.0))
    assert stats.norm.cdf(score) == pytest.approx(published, rel=1e-12, abs=0)
    assert published[1] == published[2] == 1.0
    assert score[2] > score[1] > score[0]


def auc_error(auc: float, members: int, others: int) -> float:
    """Standard error of an empirical AUC, at most √(AUC (1 - AUC)/min(members, others))."""
    return math.sqrt(auc * (1 - auc) / min(members, others))


@pytest.mark.parametrize("variance", ["pooled", "each"])
def test_online_lira_is_near_the_optimal_test(variance: Any) -> None:
    """φ ~ N(c, 1) OUT and N(c + μ, 1) IN: no test has an AUC above Φ(μ/√2), for any centres c.

    Estimating two means from 128 references each loses less than .005 (the noise of the midpoint
    inflates the variance by 1/256). Level 1e-4, two-sided: 3.9 standard errors. Rejected at it:
    the sign flipped, IN and OUT swapped, φ compared with no references at all, and the same
    Gaussian fit to unscaled probabilities.
    """
    shift = 1.5
    game = play(4, n=20_000, z=2, references=256, shift=shift, spread=3.0)
    optimal = float(stats.norm.cdf(shift / math.sqrt(2)))
    n_in = int(game.truth.sum())
    margin = 3.9 * auc_error(optimal, n_in, 20_000 - n_in)
    arguments: dict[str, Any] = {"mode": "online", "variance": variance}

    def near(scores: Floats) -> bool:
        return -0.005 - margin < float(roc_auc_score(game.truth, scores)) - optimal < margin

    def attack(members: Bools) -> Floats:
        return lira(
            log_probs=game.target,
            reference_log_probs=game.references,
            reference_members=members,
            **arguments,
        )

    scores = attack(game.members)
    assert near(scores)
    assert not near(-scores)
    assert not near(attack(~game.members))
    assert not near(logit_confidence(game.target))
    p, references = np.exp(game.target), np.exp(game.references)
    unscaled = np.zeros(20_000)
    for members, sign in ((game.members, 1), (~game.members, -1)):
        kept = np.ma.masked_array(references, ~members)
        spread = kept.std() if variance == "pooled" else np.asarray(kept.std(axis=0))
        unscaled += sign * stats.norm.logpdf(p, np.asarray(kept.mean(axis=0)), spread)
    assert not near(unscaled)


# RMIA


def direct_rmia(game: Game, mode: str, gamma: float, a: float | None) -> tuple[list[float], float]:
    """Definition in probabilities at 50 digits by loops, and the least distance from a tie."""
    with mp.workdps(50):

        def mean(log_probs: list[float]) -> Any:
            return mp.fsum(mp.exp(mp.mpf(float(x))) for x in log_probs) / len(log_probs)

        def marginal(out: list[float], inside: list[float] | None) -> Any:
            if mode == "offline":
                share = mp.mpf(a or 0.0)
                return (1 + share) / 2 * mean(out) + (1 - share) / 2
            return mean(out) if inside is None else (mean(out) + mean(inside)) / 2

        ratios = []
        for i in range(len(game.target)):
            inside, out = [], []
            for row, member in zip(game.references[:, i], game.members[:, i], strict=True):
                (inside if member else out).append(row)
            ratios.append(mp.exp(mp.mpf(float(game.target[i]))) / marginal(out, inside))
        population = [
            mp.exp(mp.mpf(float(p))) / marginal(list(references), None)
            for p, references in zip(game.population, game.population_references.T, strict=True)
        ]
        quotients = [[x / z / gamma for z in population] for x in ratios]
        scores = [sum(1 for q in row if q >= 1) / len(row) for row in quotients]
        return scores, float(min(abs(q - 1) for row in quotients for q in row))


CASES = [("online", None), ("offline", 0.0), ("offline", 0.3), ("offline", 1.0)]


@pytest.mark.parametrize(("mode", "a"), CASES)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_rmia_matches_its_definition(mode: Any, a: float | None, gamma: float) -> None:
    """Oracle: the definition in probabilities by loops, 50 digits; exact, no pair within 1e-6."""
    expected, distance = direct_rmia(SMALL, mode, gamma, a)
    assert distance > 1e-6
    assert rmia(**SMALL.rmia_arguments(), mode=mode, gamma=gamma, a=a).tolist() == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize(("mode", "a"), [("online", None), ("offline", 1.0)])
def test_rmia_of_long_sequences(mode: Any, a: float | None) -> None:
    """Sums over 1000 tokens, e⁻³⁰⁰⁰ and below, which no float holds; exact, as above."""
    rng = np.random.default_rng(5)
    game = Game(
        truth=SMALL.truth,
        members=SMALL.members,
        target=SMALL.target - 3000,
        references=SMALL.references - 3000,
        population=SMALL.population - rng.uniform(2999, 3001, 17),
        population_references=SMALL.population_references - 3000,
    )
    expected, distance = direct_rmia(game, mode, 1.0, a)
    assert distance > 1e-6
    assert rmia(**game.rmia_arguments(), mode=mode, a=a).tolist() == expected


def test_offline_sequences_need_the_mean_over_tokens() -> None:
    """At e⁻³⁰⁰⁰ and a < 1 all that is left is attack-P; the mean over tokens restores the rest."""
    rng = np.random.default_rng(6)
    tokens = 1000

    def scores(scale: float, order: npt.NDArray[np.intp]) -> Floats:
        arguments = SMALL.rmia_arguments()
        for name in list(arguments):
            if name != "reference_members":
                arguments[name] = (arguments[name] - 3) * tokens / scale
        arguments["reference_log_probs"] = arguments["reference_log_probs"][:, order]
        arguments["reference_members"] = None
        return rmia(**arguments, mode="offline", a=0.5)

    plain = attack_p(losses=-SMALL.target, population_losses=-SMALL.population)
    np.testing.assert_array_equal(scores(1.0, np.arange(25)), plain)
    assert np.any(scores(tokens, np.arange(25)) != plain)

    straight, shuffled = np.arange(25), rng.permutation(25)
    np.testing.assert_array_equal(scores(1.0, straight), scores(1.0, shuffled))
    assert np.any(scores(tokens, straight) != scores(tokens, shuffled))


def matrix_rmia(game: Game, mode: str, gamma: float, a: float | None) -> Floats:
    """All N·Z comparisons at once, in log space."""

    def log_mean(log_probs: Floats, counted: Bools) -> Floats:
        total = np.logaddexp.reduce(log_probs, axis=0, where=counted, initial=-np.inf)
        return total - np.log(counted.sum(axis=0))

    def marginal(log_probs: Floats, members: Bools, inside: bool) -> Any:
        out = log_mean(log_probs, ~members)
        if a is not None:
            constant = np.log((1 - a) / 2) if a < 1 else -np.inf
            return np.logaddexp(out + np.log((1 + a) / 2), constant)
        if not inside:
            return out
        return np.subtract(np.logaddexp(out, log_mean(log_probs, members)), np.log(2.0))

    nobody = np.zeros(game.population_references.shape, dtype=bool)
    x = game.target - marginal(game.references, game.members, True)
    z = game.population - marginal(game.population_references, nobody, False)
    return np.mean(x[:, None] - z[None, :] >= np.log(gamma), axis=1)


def tied_game(seed: int) -> Game:
    """Probabilities 2⁻¹ … 2⁻⁴ only: most ratios are shared, and ratios of 2 are common."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Floats:
        return rng.integers(1, 5, shape).astype(np.float64) * -math.log(2)

    members = rng.random((4, 300)) < 0.5
    members[0], members[1] = True, False
    return Game(
        truth=members[2],
        members=members,
        target=draw(300),
        references=draw(4, 300),
        population=draw(200),
        population_references=draw(4, 200),
    )


@pytest.mark.parametrize(("mode", "a"), CASES)
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_sorting_gives_what_the_full_matrix_gives(
    mode: Any, a: float | None, gamma: float, seed: int
) -> None:
    """Oracle: the full matrix; equal bit by bit, on ratios that tie and on ratios that do not."""
    for game in (tied_game(seed), play(seed, 300, 200, 4, 1.0)):
        found = rmia(**game.rmia_arguments(), mode=mode, gamma=gamma, a=a)
        np.testing.assert_array_equal(found, matrix_rmia(game, mode, gamma, a))


def test_moving_the_threshold_across_would_break_ties() -> None:
    """The obvious ``searchsorted(z, x - ln γ)`` differs from the matrix where γ is met exactly."""
    rng = np.random.default_rng(7)
    z: Floats = np.log(3.0) * rng.integers(-8, 8, 200)
    x: Floats = np.concatenate([np.log(2.0) * rng.integers(-8, 8, 300), z[:100] + np.log(1.5)])
    matrix = np.mean(x[:, None] - z >= math.log(1.5), axis=1)
    moved = np.searchsorted(np.sort(z), x - math.log(1.5), side="right") / len(z)
    np.testing.assert_array_equal(membership._share(x, z, 1.5), matrix)
    assert np.any(moved != matrix)


@given(
    x=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8),
    z=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=9),
    gamma=st.floats(1, 100),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_share_matches_the_matrix_near_ties(x: list[float], z: list[float], gamma: float) -> None:
    """Oracle: the full matrix, with neighbours of exact ties among the z; exact."""
    log_gamma = math.log(gamma)
    ties = [value - log_gamma for value in x]
    ties += [math.nextafter(t, side) for t in ties for side in (-math.inf, math.inf)]
    left, right = np.array(x), np.array(z + ties)
    expected = np.mean(left[:, None] - right >= log_gamma, axis=1)
    np.testing.assert_array_equal(membership._share(left, right, gamma), expected)


# Choosing a


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_tuned_a_has_the_largest_mean_auc(seed: int, gamma: float) -> None:
    """Oracle: each reference plays the target of the matrix version, scikit-learn gives the AUC.

    30 of the samples are OUT of reference 0 alone, which has nothing to calibrate them with.
    """
    game = play(seed, n=150, z=60, references=6, shift=2.0)
    game.members[:, :30] = np.arange(6)[:, None] != 0
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    mean_auc = []
    for a in grid:
        aucs = []
        for turn in range(6):
            others = [r for r in range(6) if r != turn]
            usable = [i for i in range(150) if not all(game.members[r, i] for r in others)]
            assert len(usable) == (120 if turn == 0 else 150)
            turned = Game(
                truth=game.members[turn][usable],
                members=game.members[np.ix_(others, usable)],
                target=game.references[turn][usable],
                references=game.references[np.ix_(others, usable)],
                population=game.population_references[turn],
                population_references=game.population_references[others],
            )
            aucs.append(roc_auc_score(turned.truth, matrix_rmia(turned, "offline", gamma, a)))
        mean_auc.append(float(np.mean(aucs)))
    assert len(set(mean_auc)) == len(grid)
    best = grid[mean_auc.index(max(mean_auc))]
    assert tune_offline_a(**game.reference_arguments(), gamma=gamma, grid=grid) == best
    assert tune_offline_a(**game.reference_arguments(), gamma=gamma, grid=grid[::-1]) == best


def test_tuning_finds_the_a_that_holds() -> None:
    """Where mean_IN = a mean_OUT + (1 - a) with a = .2 or .9, the choice tells the two apart."""
    chosen = []
    for slope in (0.2, 0.9):
        rng = np.random.default_rng(9)
        game = play(9, n=3000, z=1000, references=8, shift=0.0)
        out = rng.beta(1, 2, 3000)
        p = np.where(game.members, slope * out + 1 - slope, out)
        noise = rng.uniform(0.8, 1.0, p.shape)
        z = rng.beta(1, 2, 1000) * rng.uniform(0.8, 1.0, (8, 1000))
        chosen.append(
            tune_offline_a(
                reference_log_probs=np.log(p * noise),
                reference_members=game.members,
                population_reference_log_probs=np.log(z),
            )
        )
    assert chosen[0] < chosen[1]


def test_equal_a_go_to_the_first_of_the_grid() -> None:
    """Where the references say nothing, at e⁻³⁰⁰⁰, every a < 1 ties."""
    game = play(10, n=50, z=20, references=4, shift=1.0)
    arguments = game.reference_arguments()
    arguments["reference_log_probs"] = arguments["reference_log_probs"] - 3000
    arguments["population_reference_log_probs"] = game.population_references - 3000
    assert tune_offline_a(**arguments, grid=(0.4, 0.2, 0.6)) == 0.4


# All attacks


def scores_of(game: Game) -> dict[str, Floats]:
    """One entry an attack and mode."""
    losses: dict[str, Any] = {"losses": -game.target}
    references: dict[str, Any] = {
        "log_probs": game.target,
        "reference_log_probs": game.references,
        "reference_members": game.members,
    }
    a = tune_offline_a(**game.reference_arguments())
    return {
        "attack-P": attack_p(**losses, population_losses=-game.population),
        "attack-R": attack_r(
            **losses, reference_losses=-game.references, reference_members=game.members
        ),
        "LiRA online": lira(**references, mode="online"),
        "LiRA online, each": lira(**references, mode="online", variance="each"),
        "LiRA offline": lira(**references, mode="offline"),
        "LiRA offline, each": lira(**references, mode="offline", variance="each"),
        "RMIA online": rmia(**game.rmia_arguments(), mode="online"),
        "RMIA offline": rmia(**game.rmia_arguments(), mode="offline", a=a),
    }


def test_higher_means_member_for_every_attack() -> None:
    """Level 1e-4 a side: each AUC exceeds ½ by 3.7 standard errors, each flipped one does not."""
    game = play(11, n=4000, z=1000, references=16, shift=2.0)
    margin = 3.7 * auc_error(0.5, int(game.truth.sum()), int((~game.truth).sum()))
    for name, scores in scores_of(game).items():
        assert scores.shape == (4000,), name
        assert roc_auc_score(game.truth, scores) > 0.5 + margin, name
        assert roc_auc_score(game.truth, -scores) < 0.5 - margin, name


def test_nothing_is_found_where_nothing_leaks() -> None:
    """Level 1e-3 in all: 8 two-sided tests of AUC = ½; the shift .5 of a sample must be found."""
    for shift, leaks in ((0.0, False), (0.5, True)):
        game = play(12, n=8000, z=1000, references=16, shift=shift)
        n_in = int(game.truth.sum())
        margin = stats.norm.isf(1e-3 / 16) * auc_error(0.5, n_in, 8000 - n_in)
        for name, scores in scores_of(game).items():
            assert (abs(roc_auc_score(game.truth, scores) - 0.5) > margin) == leaks, name


# What is refused


def without(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**arguments, **changes}


def spoilt(values: Floats, value: float) -> Floats:
    copy = values.copy()
    copy.flat[3] = value
    return copy


RMIA = {**SMALL.rmia_arguments(), "mode": "offline", "a": 0.5}
LIRA: dict[str, Any] = {
    "log_probs": SMALL.target,
    "reference_log_probs": SMALL.references,
    "reference_members": SMALL.members,
    "mode": "online",
}
TUNE = SMALL.reference_arguments()
ATTACK_R: dict[str, Any] = {"losses": -SMALL.target, "reference_losses": -SMALL.references}
ALL_IN, ALL_OUT = np.ones((6, 25), dtype=bool), np.zeros((6, 25), dtype=bool)
ONE_OUT = np.arange(6)[:, None] != np.zeros(25)


@pytest.mark.parametrize(
    ("attack", "arguments", "name"),
    [
        (rmia, RMIA, name)
        for name in (
            "log_probs",
            "reference_log_probs",
            "population_log_probs",
            "population_reference_log_probs",
        )
    ]
    + [(lira, LIRA, name) for name in ("log_probs", "reference_log_probs")]
    + [
        (tune_offline_a, TUNE, name)
        for name in ("reference_log_probs", "population_reference_log_probs")
    ]
    + [(attack_r, ATTACK_R, name) for name in ("losses", "reference_losses")],
)
def test_bad_values_and_shapes_are_refused(
    attack: Callable[..., Any], arguments: dict[str, Any], name: str
) -> None:
    good = arguments[name]
    attack(**arguments)
    index = r"0, 3" if good.ndim == 2 else "3"
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{name}\[{index}\] is NaN or infinite"):
            attack(**without(arguments, **{name: spoilt(good, value)}))
    if "log_probs" in name:
        with pytest.raises(ValueError, match=rf"^{name}\[{index}\] is positive"):
            attack(**without(arguments, **{name: spoilt(good, 1e-3)}))
    for shape in (
        good[..., :-1],
        good[None],
        good[..., :0],
        good.T if good.ndim == 2 else good[0],
    ):
        if attack is tune_offline_a and name.startswith("population") and shape.shape == (6, 16):
            continue  # a population of another size is one, too
        with pytest.raises(ValueError, match=r"must have shape"):
            attack(**without(arguments, **{name: shape}))


@pytest.mark.parametrize(
    ("attack", "arguments", "match"),
    [
        (rmia, without(RMIA, gamma=0.999), "gamma must be finite and at least 1, got 0.999"),
        (rmia, without(RMIA, gamma=0.0), "gamma must be"),
        (rmia, without(RMIA, gamma=math.nan), "gamma must be"),
        (rmia, without(RMIA, gamma=math.inf), "gamma must be"),
        (rmia, without(RMIA, a=-0.1), r"a must lie in \[0, 1\]"),
        (rmia, without(RMIA, a=1.1), r"a must lie in \[0, 1\]"),
        (rmia, without(RMIA, a=math.nan), r"a must lie in \[0, 1\]"),
        (rmia, without(RMIA, a=None), "offline RMIA needs a"),
        (rmia, without(RMIA, mode="online"), "a is a parameter of offline RMIA"),
        (rmia, without(RMIA, mode="both"), "mode must be one of"),
        (rmia, without(RMIA, reference_members=ALL_IN), r"sample 0 has 0 OUT reference"),
        (rmia, without(RMIA, mode="online", a=None, reference_members=ALL_OUT), "0 IN reference"),
        (rmia, without(RMIA, mode="online", a=None, reference_members=None), "is needed here"),
        (rmia, without(RMIA, reference_members=ALL_OUT.T), "must have shape"),
        (lira, without(LIRA, mode="both"), "mode must be one of"),
        (lira, without(LIRA, variance="fixed"), "variance must be one of"),
        (lira, without(LIRA, reference_members=None), "is needed here"),
        (lira, without(LIRA, reference_members=ALL_IN), "0 OUT reference"),
        (lira, without(LIRA, reference_members=ALL_OUT), "0 IN reference"),
        (lira, without(LIRA, reference_members=ONE_OUT, variance="each"), "needs 2 at least"),
        (lira, without(LIRA, reference_members=ONE_OUT), "OUT references is zero or unknown"),
        (lira, without(LIRA, reference_log_probs=np.full((6, 25), -1.0)), "is zero or unknown"),
        (
            lira,
            without(LIRA, reference_log_probs=np.full((6, 25), -1.0), variance="each"),
            r"variance of OUT references\[0\] is zero",
        ),
        (attack_r, without(ATTACK_R, reference_members=ALL_IN), "0 OUT reference"),
        (tune_offline_a, without(TUNE, grid=()), "grid must hold"),
        (tune_offline_a, without(TUNE, grid=(0.5, 2.0)), r"a must lie in \[0, 1\]"),
        (tune_offline_a, without(TUNE, gamma=0.5), "gamma must be"),
        (tune_offline_a, without(TUNE, reference_members=ALL_OUT), "reference 0 has no member"),
        (tune_offline_a, without(TUNE, reference_members=ALL_IN), "reference 0 has no member"),
        (
            tune_offline_a,
            {name: values[:1] for name, values in TUNE.items()},
            "needs at least 2 references",
        ),
    ],
)
def test_bad_arguments_are_refused(
    attack: Callable[..., Any], arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        attack(**arguments)


@pytest.mark.parametrize(
    ("attack", "arguments"),
    [(rmia, RMIA), (lira, LIRA), (attack_r, ATTACK_R), (tune_offline_a, TUNE)],
)
def test_members_must_be_boolean(attack: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """A code of -1 and 1 would be true throughout."""
    with pytest.raises(TypeError, match="reference_members must be boolean"):
        attack(**without(arguments, reference_members=np.where(SMALL.members, 1, -1)))


def test_attack_p_refuses_bad_losses() -> None:
    for losses, population, match in (
        ([math.nan], [1.0], r"^losses\[0\] is NaN"),
        ([1.0], [0.0, math.inf], r"population_losses\[1\] is NaN or infinite"),
        ([[1.0]], [1.0], "losses must have shape"),
        ([1.0], [], "population_losses must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            attack_p(losses=losses, population_losses=population)


def test_arguments_are_left_as_they_were() -> None:
    game = play(13, n=50, z=40, references=4, shift=1.0)
    before = [np.copy(v) for v in game.rmia_arguments().values()]
    scores_of(game)
    for value, old in zip(game.rmia_arguments().values(), before, strict=True):
        np.testing.assert_array_equal(value, old)
