"""Every mechanism of ``dp``, played as its definition and attacked by its likelihood ratio.

A lower bound above what an accountant proves would be a bug in one of them. That the games could
show one is tested on mechanisms which are not what they claim. docs/theory/auditing-ourselves.md
has the numbers, from ``benchmarks/audit_ourselves.py``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lora_privacy.audit import LeakageEstimate, epsilon_clopper_pearson, projection_attack
from lora_privacy.dp import (
    GaussianEvent,
    NoisedProjection,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    SketchRelease,
    VectorProjection,
    matrix_projection,
)

Array = npt.NDArray[np.float64]
Event = GaussianEvent | SampledGaussian | ProjectedGaussian
Scores = tuple[Array, Array]
"""Scores with the canary in (or under the first input), and with it out (the second)."""

DRAWS = 100_000  # of each world
SEED = 20240917
SIGNIFICANCE = 1e-6  # a sound mechanism fails one test in a million seeds


def audited(scores: Scores, delta: float, adjacency: str = "add-remove") -> LeakageEstimate:
    """The lower bound: 32 thresholds at ranks fixed beforehand share the significance."""
    return epsilon_clopper_pearson(
        np.concatenate(scores),
        np.repeat([True, False], [len(one) for one in scores]),
        delta=delta,
        significance=SIGNIFICANCE,
        threat_model="white box, one release, all of the input but the canary's membership known",
        adjacency=adjacency,  # pyright: ignore[reportArgumentType]
        selection="bonferroni",
        candidates=32,
    )


# ---- mechanisms, by definition -----------------------------------------------------------------


def gaussian(
    rng: np.random.Generator,
    event: GaussianEvent | SampledGaussian,
    *,
    replaced: bool = False,
    noise: float = 1.0,
    sampled: bool = True,
) -> Scores:
    """C = 1; the release along a canary of norm 1, which the likelihood ratio grows with.

    ``noise`` and ``sampled=False`` are sabotage: noise of another size than the event says, and
    coins that are not tossed.
    """
    rate = event.sample_rate if isinstance(event, SampledGaussian) and sampled else 1.0
    canary = np.array([0.6, 0.0, -0.8])

    def world(sign: float) -> Array:
        takes_part = rng.random((DRAWS, 1)) < rate
        noises = noise * event.noise_multiplier * rng.standard_normal((DRAWS, 3))
        return (sign * takes_part * canary + noises) @ canary

    return world(1.0), world(-1.0 if replaced else 0.0)


def projected(
    rng: np.random.Generator,
    event: ProjectedGaussian,
    *,
    canary: Array,
    replaced: bool = False,
    noise: float = 1.0,
    sampled: bool = True,
    fresh: bool = True,
) -> Scores:
    """(V + E) Aᵀ, with V = ``canary`` or 0 (or its negative); the exact log-likelihood ratio.

    With ``fresh=False`` one A is used throughout, and the first row of the canary is turned into
    its row space, as gradient_canaries("aligned") does.
    """
    (m, r), z, q = event.layers[0], event.noise_multiplier, event.sample_rate
    first = rng.standard_normal((1, r, m)) / math.sqrt(r)
    if not fresh:
        canary = first[0, :1] / np.linalg.norm(first[0, 0])

    def world(sign: float) -> Array:
        a = rng.standard_normal((DRAWS, r, m)) / math.sqrt(r) if fresh else first
        takes_part = rng.random((DRAWS, 1, 1)) < (q if sampled else 1.0)
        noises = noise * z * rng.standard_normal((DRAWS, *canary.shape))
        released = (sign * takes_part * canary + noises) @ a.mT
        shift = canary @ a.mT
        whitened = np.linalg.solve(a @ a.mT, shift.mT).mT / z**2  # E Aᵀ has covariance z² A Aᵀ
        inner = np.sum(released * whitened, axis=(1, 2))
        half = np.sum(shift * whitened, axis=(1, 2)) / 2
        ratio = np.log(1 - q + q * np.exp(inner - half))
        return ratio - np.log(1 - q + q * np.exp(-inner - half)) if replaced else ratio

    return world(1.0), world(-1.0 if replaced else 0.0)


def vector_projection(rng: np.random.Generator, pair: VectorProjection) -> Scores:
    """AᵀA v by drawing A; the ratio of the two densities."""
    v, other = np.zeros((2, pair.in_features))
    v[0] = 1.0
    other[:2] = pair.cosine, math.sqrt(1 - pair.cosine**2)
    return projected_vectors(rng, v, pair.norm_ratio * other, pair.rank, noise=0.0)


def projected_vectors(
    rng: np.random.Generator, v: Array, other: Array, r: int, noise: float
) -> Scores:
    """AᵀA v + E for a tiny E, which the ratio of densities ignores; infinite where one is 0."""
    m, ratio = len(v), float(np.linalg.norm(other) / np.linalg.norm(v))

    def world(vector: Array) -> Array:
        a = rng.standard_normal((DRAWS, r, m)) / math.sqrt(r)
        y = (a.mT @ (a @ vector)[..., None])[..., 0] + noise * rng.standard_normal((DRAWS, m))
        first, second = y @ v, y @ other
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = (
                (r - 1) * math.log(ratio)
                + (r - m - 1) / 2 * np.log(first / second)
                - r / 2 * np.sum(y**2, axis=1) * (1 / first - 1 / second)
            )
        return np.where(second <= 0, np.inf, np.where(first <= 0, -np.inf, loss))

    return world(v), world(other)


def noised_projection(rng: np.random.Generator, pair: NoisedProjection) -> Scores:
    """AᵀA V + E and, where the bound reveals it too, A, with the exact ratio given A."""
    if pair.v.shape[1] == 1:
        return projected_vectors(rng, pair.v[:, 0], pair.v_prime[:, 0], pair.rank, pair.noise_std)
    m, r, std = pair.v.shape[0], pair.rank, pair.noise_std

    def world(matrix: Array) -> Array:
        a = rng.standard_normal((DRAWS, r, m)) / math.sqrt(r)
        both = a.mT @ (a @ np.concatenate([matrix, pair.v, pair.v_prime], axis=1))
        clean, v, other = np.split(both, 3, axis=2)
        y = clean + std * rng.standard_normal(clean.shape)
        return np.sum((y - other) ** 2 - (y - v) ** 2, axis=(1, 2)) / (2 * std**2)

    return world(pair.v), world(pair.v_prime)


def sketch(rng: np.random.Generator, pair: SketchRelease) -> Scores:
    """G Aᵀ by drawing A; the ratio of two centred normal densities."""
    m, r = pair.gradient.shape[1], pair.rank
    s, other = (g @ g.T / r for g in (pair.gradient, pair.gradient_prime))
    middle = np.linalg.inv(other) - np.linalg.inv(s)

    def world(gradient: Array) -> Array:
        a = rng.standard_normal((DRAWS, r, m)) / math.sqrt(r)
        y = gradient @ a.mT
        return np.einsum("kir,ij,kjr->k", y, middle, y)

    return world(pair.gradient), world(pair.gradient_prime)


# ---- games -------------------------------------------------------------------------------------


def row(*entries: float) -> Array:
    return np.array([entries]) / np.linalg.norm(entries)


PAIR = np.array([[1.0, 0.3, 0.0], [0.2, -0.4, 0.5], [0.0, 0.6, 0.1], [0.3, 0.0, -0.2]])
CHANGED = PAIR + np.outer([0.05, -0.05, 0.02, 0.0], [0.0, 1.0, 0.0])
GRADIENT = np.random.default_rng(SEED).standard_normal((2, 6))


@dataclass(frozen=True, eq=False)
class Game:
    """A mechanism, how it is played, and the share of the claim that an audit must reach."""

    name: str
    mechanism: Any
    play: Callable[..., Scores]
    power: float
    delta: float = 1e-2
    replaced: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def scores(self, **sabotage: Any) -> Scores:
        rng = np.random.default_rng(SEED)
        replaced = {"replaced": True} if self.replaced else {}
        return self.play(rng, self.mechanism, **self.options, **replaced, **sabotage)

    def found(self, **sabotage: Any) -> float:
        """The audited lower bound."""
        return audited(self.scores(**sabotage), self.delta, self.adjacency).epsilon

    @property
    def adjacency(self) -> str:
        return "replace" if self.replaced else "add-remove"

    def __str__(self) -> str:
        return self.name

    @cache  # noqa: B019  (games live as long as the module)
    def claims(self) -> dict[str, float]:
        """What is proved at ``delta``, by everything that proves anything."""
        event, adjacency = self.mechanism, self.adjacency
        if not isinstance(event, Event):
            return {"pair": event.epsilon(self.delta).epsilon}
        adjacency: Any = adjacency
        proved = {"pld": PldAccountant(adjacency).compose(event).epsilon(self.delta).epsilon}
        if not self.replaced or getattr(event, "sample_rate", 1.0) == 1:
            proved["rdp"] = RdpAccountant(adjacency).compose(event).epsilon(self.delta).epsilon
        if isinstance(event, ProjectedGaussian):
            proved["event"] = event.epsilon(self.delta, adjacency=adjacency).epsilon
        return proved


ONE = {"canary": row(1.0, -2.0, 0.5, 0.0, 3.0, 1.0, 0.0, -1.0)}
ISOTROPIC = {"canary": np.eye(4) / 2}
PLAIN = [
    Game("Gaussian", GaussianEvent(1.0), gaussian, 0.75),
    Game("Gaussian, replace", GaussianEvent(2.0), gaussian, 0.75, replaced=True),
    Game("sampled Gaussian", SampledGaussian(1.0, 0.25), gaussian, 0.55),
    Game("sampled Gaussian, replace", SampledGaussian(1.0, 0.25), gaussian, 0.65, replaced=True),
]
PROJECTED = [
    Game("projected", ProjectedGaussian([(8, 2)], 0.5), projected, 0.75, options=ONE),
    Game(
        "projected, replace", ProjectedGaussian([(8, 2)], 1.0), projected, 0.75, replaced=True,
        options=ONE,
    ),
    # At a small ε a canary of full rank is worse than any of rank one: theory 4.4.
    Game(
        "projected, isotropic canary", ProjectedGaussian([(4, 2)], 1.0), projected, 0.75, 0.1,
        options=ISOTROPIC,
    ),
    Game(
        "sampled projected", ProjectedGaussian([(8, 2)], 0.5, 0.25), projected, 0.55, options=ONE
    ),
    Game(
        "sampled projected, replace", ProjectedGaussian([(8, 2)], 0.5, 0.25), projected, 0.65,
        replaced=True, options=ONE,
    ),
]  # fmt: skip
PAIRS = [
    Game("VectorProjection", VectorProjection(5, 3, 0.95), vector_projection, 0.65, 0.1),
    Game(
        "VectorProjection, unequal norms", VectorProjection(20, 10, 0.99, 1.05),
        vector_projection, 0.65,
    ),
    Game(
        "NoisedProjection, A revealed", NoisedProjection(PAIR, CHANGED, 20, 0.15),
        noised_projection, 0.2,
    ),
    Game(
        "NoisedProjection, split", NoisedProjection(PAIR[:, :1], PAIR[:, :1] + 0.05, 12, 1e-6),
        noised_projection, 0.6,
    ),
    Game("SketchRelease", SketchRelease(GRADIENT, 1.1 * GRADIENT + 0.05, 4), sketch, 0.4),
]  # fmt: skip
GAMES = [*PLAIN, *PROJECTED, *PAIRS]


@pytest.mark.parametrize("game", GAMES, ids=str)
def test_no_attack_beats_a_proof_and_the_attack_has_power(game: Game) -> None:
    """10⁵ draws a world, significance 1e-6; the best attack reaches the stated share of ε.

    The shares are those of the tightest claim. The rest is what 10⁵ draws cannot see, and for
    NoisedProjection and SketchRelease that their ε are upper bounds with slack of their own.
    """
    claims = game.claims()
    found = game.found()
    for prover, epsilon in claims.items():
        assert found <= epsilon, prover
    assert found >= game.power * min(claims.values())


def test_the_noised_pairs_use_both_proofs() -> None:
    """One game attacks the bound that reveals A, which an attacker with A may; one the other."""
    methods = [
        game.mechanism.epsilon(game.delta).method
        for game in PAIRS
        if game.play is noised_projection
    ]
    assert methods == ["upper bound, A revealed", "upper bound, split"]


@pytest.mark.parametrize("game", [*PLAIN, *PROJECTED], ids=str)
def test_half_the_noise_is_caught(game: Game) -> None:
    """Power: the bound is at least 1.5 times the claim in every game."""
    assert game.found(noise=0.5) > 1.5 * game.claims()["pld"]


@pytest.mark.parametrize("game", [PLAIN[2], PLAIN[3], PROJECTED[3], PROJECTED[4]], ids=str)
def test_coins_that_are_not_tossed_are_caught(game: Game) -> None:
    """Every record in at every step, accounted at q = 1/4: at least twice the claim."""
    assert game.found(sampled=False) > 2.0 * game.claims()["pld"]


@pytest.mark.parametrize("game", [PROJECTED[i] for i in (0, 1, 3, 4)], ids=str)
def test_a_projection_that_is_used_again_is_caught(game: Game) -> None:
    """A canary in the row space of a known A loses nothing behind it: 1.3 times the claim."""
    assert game.found(fresh=False) > 1.3 * game.claims()["pld"]


def test_projected_matrices_without_noise_are_told_apart_as_far_as_draws_can_show() -> None:
    """The pair has ε = ∞: the attack makes no mistake and reaches the ceiling of its draws."""
    rng = np.random.default_rng(SEED)
    others, canary = rng.standard_normal((2, 6, 12))

    def update(gradient: Array) -> Array:
        a = rng.standard_normal((3, 12)) / math.sqrt(3)
        return -0.1 * gradient @ a.T @ a

    def scores(gradient: Array) -> Array:
        return np.array(
            [
                projection_attack(update(gradient), canary[None], known=others)[0]
                for _ in range(1000)
            ]
        )

    found = audited((scores(others + canary), scores(others)), 1e-3)
    assert found.epsilon > 0.99 * found.ceiling > 3.9
    assert matrix_projection(others.T, (others + canary).T, 3, 1e-3).epsilon == math.inf
