"""Every method of ``make_private``, attacked through its own steps, and sabotaged ones caught.

The attacker chooses the starting weights, the loss and the canaries, sees the weights before and
after one step, and knows the expected batch size and the A of DP-FLoRA. One step holds thousands
of games: why they are independent, so that Clopper–Pearson limits apply to them, is proved in
docs/theory/auditing-ourselves.md, which also has the numbers (``benchmarks/audit_ourselves.py``).
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.audit import (
    LeakageEstimate,
    epsilon_clopper_pearson,
    epsilon_one_run_fdp,
    epsilon_one_run_scores,
    gradient_canaries,
    guess,
    projection_attack,
)
from lora_privacy.core import RandomProjection, adapt
from lora_privacy.dp import PldAccountant
from lora_privacy.training import NoiseMultiplier, PrivateTraining, clipping, engine, make_private
from lora_privacy.training.sampling import PoissonLoader

Array = npt.NDArray[np.float64]

SIGNIFICANCE = 1e-6  # a sound method fails one test in a million seeds
DELTA = 1e-2
SIZE = 10.0  # norm of a canary before the clip, in units of C = 1
KNOWN = 7  # seed of the A that a sabotaged DP-FLoRA uses at every step


# ---- canaries ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canaries:
    """Records whose gradients are orthogonal, and a model that has these gradients.

    The loss of record k is output ``rows[k]`` of the model at the input ``inputs[columns[k]]``.

    Attributes:
        model: One layer, trained from weights that the attacker chose.
        inputs: Shape (number, in_features), of norm 1.
        rows: Output of each canary.
        columns: Input of each canary.
        read: (minus the change of each trained parameter) -> its part along each canary, or, for
            dp-flora, those changes projected onto what A sees.
    """

    model: nn.Module
    inputs: Tensor
    rows: Tensor
    columns: Tensor
    read: Callable[[dict[str, Tensor]], Tensor]


def grid(rows: range, columns: range) -> tuple[Tensor, Tensor]:
    """All pairs, the second index running."""
    i, j = torch.meshgrid(torch.tensor(rows), torch.tensor(columns), indexing="ij")
    return i.flatten(), j.flatten()


def dense(side: int = 320) -> Canaries:
    """dp-sgd: gradient of canary (i, j) is one entry of W, all entries have a canary."""
    model = nn.Sequential(nn.Linear(side, side, bias=False))
    nn.init.zeros_(model[0].weight)  # pyright: ignore[reportArgumentType]
    rows, columns = grid(range(side), range(side))
    return Canaries(model, torch.eye(side), rows, columns, lambda c: c["0.weight"].flatten())


class TwoLayers(nn.Module):
    """The same gradient in both, so that one canary reaches the limit of each."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.first = nn.Linear(side, side, bias=False)
        self.second = nn.Linear(side, side, bias=False)
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def two_layers(side: int = 224) -> Canaries:
    """dp-sgd with a clip for each layer: gradient of canary (i, j) is entry ij of both weights."""
    rows, columns = grid(range(side), range(side))
    return Canaries(
        TwoLayers(side), torch.eye(side), rows, columns,
        lambda c: (c["first.weight"] + c["second.weight"]).flatten() / 2**0.5,
    )  # fmt: skip


def low_rank(method: str, side: int = 512, rank: int = 32) -> Canaries:
    """dp-lora and dp-lora-fa: one entry of A or of B is the whole gradient of a canary.

    With A = (I 0) and B = (I 0)ᵀ the gradient of B at (output i, input j) is e_i (A e_j)ᵀ, that of
    A is (Bᵀ e_i) e_jᵀ, and for every canary one of the two is 0. dp-lora-fa has B's only.
    """
    trained = method == "dp-lora"
    width = side if trained else rank
    model = nn.Sequential(nn.Linear(width, side, bias=False))
    name = "lora" if trained else "lora-fa"
    adapt(model, rank, method=name, targets=("0",), alpha=rank, seed=0)
    with torch.no_grad():
        model[0].project.weight.copy_(torch.eye(rank, width))  # pyright: ignore
        model[0].expand.weight.copy_(torch.eye(side, rank))  # pyright: ignore
    rows, columns = grid(range(rank, side), range(rank))
    if not trained:
        return Canaries(
            model, torch.eye(width), rows, columns,
            lambda c: c["0.expand.weight"][rank:].flatten(),
        )  # fmt: skip
    others = grid(range(rank), range(rank, side))
    return Canaries(
        model,
        torch.eye(width),
        torch.cat([rows, others[0]]),
        torch.cat([columns, others[1]]),
        lambda c: torch.cat(
            [c["0.expand.weight"][rank:].flatten(), c["0.project.weight"][:, rank:].flatten()]
        ),
    )


def projected(inputs: Array, rank: int = 2, law: str = "orthonormal") -> Canaries:
    """dp-flora: canary i has an output and an input of its own, so its gradient has rank one."""
    count, features = inputs.shape
    model = nn.Sequential(nn.Linear(features, count, bias=False))
    nn.init.zeros_(model[0].weight)  # pyright: ignore[reportArgumentType]
    adapt(model, rank, method="flora", targets=("0",), alpha=rank, law=law, seed=0)  # pyright: ignore
    each = torch.arange(count)
    return Canaries(
        model, torch.from_numpy(inputs).float(), each, each, lambda c: next(iter(c.values()))
    )


# ---- games -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """What the attacker got, and what the training itself says that one step cost.

    Attributes:
        scores: Shape (games,), higher means member.
        members: The coins.
        steps: Which step each game was played in.
        accountant: Of one step.
    """

    scores: Array
    members: npt.NDArray[np.bool_]
    steps: npt.NDArray[np.int64]
    accountant: PldAccountant

    @property
    def claimed(self) -> float:
        """Proved upper bound at DELTA."""
        return self.accountant.epsilon(DELTA).epsilon


def one_step(
    canaries: Canaries,
    members: npt.NDArray[np.bool_],
    method: str,
    *,
    z: float,
    rate: float,
    adjacency: str,
    key: int | None,
    part: int | None,
    seen: list[int],
    rule: str = "flat",
    known: int | None = None,
) -> tuple[dict[str, Tensor], PldAccountant]:
    """One real step: minus the change of each trained parameter times q·N, and what it cost.

    The data set holds the members; under replace it holds all, and who is out has its gradient's
    sign turned. ``key`` None takes the operating system's randomness; ``seen`` gets the seed of A.
    """
    model, replaced = canaries.model, adjacency == "replace"
    kept = torch.arange(len(members)) if replaced else torch.from_numpy(np.flatnonzero(members))
    sign = torch.from_numpy(np.where(members, 1.0, -1.0)).float()
    digest = hashlib.sha256(f"{key}".encode()).digest()
    with mock.patch.object(engine, "new_key", return_value=digest):
        private = make_private(
            model,
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
            DataLoader(TensorDataset(kept)),
            method=method,  # pyright: ignore[reportArgumentType]
            max_grad_norm=1.0,
            privacy=NoiseMultiplier(z),
            delta=DELTA,
            sample_rate=rate,
            adjacency=adjacency,  # pyright: ignore[reportArgumentType]
            physical_batch_size=part,
            clipping=rule,  # pyright: ignore[reportArgumentType]
            secure=key is None,
        )
    if private._fresh is not None:
        draw = private._fresh.draw if known is None else lambda: known
        private._fresh.draw = lambda: seen.append(found := draw()) or found
    before = {path: p.detach().clone() for path, p in private.parameters.items()}
    for (index,) in private.data_loader:
        x = canaries.inputs[canaries.columns[index]] * (SIZE * sign[index])[:, None]
        model(x).gather(1, canaries.rows[index][:, None]).mean().backward()
        private.optimizer.step()
        if private.step:
            break
    after = private.parameters
    change = {
        path: (old - after[path].detach()) * private.expected_batch_size
        for path, old in before.items()
    }
    with torch.no_grad():
        for path, old in before.items():
            after[path].copy_(old)
    accountant = private.accountant
    private.close()
    return change, accountant


def play(
    method: str,
    *,
    z: float = 1.0,
    rate: float = 1.0,
    adjacency: str = "add-remove",
    games: int = 100_000,
    key: int | None = 0,
    law: str = "orthonormal",
    rule: str = "flat",
    known: int | None = None,
    aligned: bool = False,
    together: bool = False,
) -> Played:
    """At least ``games`` games of one step each, many of them in the same step.

    A fair coin puts each canary in. Of dp-flora the score is the exact log-likelihood ratio of the
    canary given A, as the claim has it; of the others the release along the canary, which the
    ratio grows with. ``known`` is sabotage, an A that is used at every step; ``aligned`` canaries
    lie in its row space. ``together`` gives all canaries of a step one direction, which breaks
    their independence.
    """
    rng = np.random.default_rng(20240917 if key is None else key)
    flora, replaced = method == "dp-flora", adjacency == "replace"
    if rule == "per-layer":
        fixed = two_layers()
    else:
        fixed = None if flora else dense() if method == "dp-sgd" else low_rank(method)
    rank, features, count = 2, 8, 2048
    again = RandomProjection(rank, features, law, seed=KNOWN, layer="0").matrix(0).numpy()  # pyright: ignore
    scores, coins, accountants, played = [], [], [], 0
    while played < games:
        inputs = np.zeros((1, 1))
        if flora:
            # New directions at every step: with them the games are independent, whatever A is.
            inputs = gradient_canaries(
                "aligned" if aligned else "random", shape=(1, features), norm=1.0, count=count,
                random_state=rng, a=again if aligned else None,
            )[:, 0]  # fmt: skip
            inputs = np.repeat(inputs[:1], count, axis=0) if together else inputs
        canaries = projected(inputs, rank, law) if fixed is None else fixed
        members = rng.random(len(canaries.rows)) < 0.5
        seen: list[int] = []
        change, accountant = one_step(
            canaries, members, method, z=z, rate=rate, adjacency=adjacency, part=4096,
            key=None if key is None else key + len(scores), seen=seen, rule=rule,
            known=known,
        )  # fmt: skip
        found = canaries.read(change).double().numpy()
        if flora:
            a = RandomProjection(rank, features, law, seed=seen[0], layer="0").matrix(0)  # pyright: ignore
            found = log_ratio(found, inputs, a.double().numpy(), z, rate, replaced)
        scores.append(found)
        coins.append(members)
        accountants.append(accountant)
        played += len(members)
    assert all(accountant == accountants[0] for accountant in accountants)
    return Played(
        np.concatenate(scores),
        np.concatenate(coins),
        np.repeat(np.arange(len(coins)), [len(one) for one in coins]),
        accountants[0],
    )


def log_ratio(
    change: Array, inputs: Array, a: Array, z: float, rate: float, replaced: bool
) -> Array:
    """Log-likelihood ratio of each canary e_i x_iᵀ from the rows of (V + E) AᵀA, given A.

    On the row space of A, of which P is the projector, V + E is seen with noise z² P.
    """
    seen = change @ np.linalg.pinv(a.T @ a)  # (V + E) P
    inside = inputs @ np.linalg.pinv(a) @ a  # P x
    inner, half = np.sum(seen * inputs, axis=1) / z**2, np.sum(inside**2, axis=1) / (2 * z**2)
    ratio = np.log(1 - rate + rate * np.exp(inner - half))
    return ratio - np.log(1 - rate + rate * np.exp(-inner - half)) if replaced else ratio


def audited(played: Played, adjacency: str = "add-remove") -> LeakageEstimate:
    """The lower bound: 32 thresholds at ranks fixed beforehand share the significance."""
    return epsilon_clopper_pearson(
        played.scores,
        played.members,
        delta=DELTA,
        significance=SIGNIFICANCE,
        threat_model="weights before and after one step; starting weights and canaries chosen",
        adjacency=adjacency,  # pyright: ignore[reportArgumentType]
        selection="bonferroni",
        candidates=32,
    )


# ---- sabotage ----------------------------------------------------------------------------------

Sabotage = Callable[[], AbstractContextManager[Any]]


def half_the_noise() -> AbstractContextManager[Any]:
    whole = PrivateTraining._noise_std_of_sum.fget
    assert whole is not None
    halved = property(lambda training: whole(training) / 2)
    return mock.patch.object(PrivateTraining, "_noise_std_of_sum", halved)


def no_clip() -> AbstractContextManager[Any]:
    return mock.patch.object(clipping, "_share", lambda _, norms: torch.ones_like(norms))


def a_goes_unclipped() -> AbstractContextManager[Any]:
    """The weights of the layer of A are 1, as if a loop over layers had left it out."""
    right = clipping.FlatClipping.weights

    def weights(rule: clipping.FlatClipping, square_norms: dict[str, Tensor]) -> dict[str, Tensor]:
        found = right(rule, square_norms)
        return {n: torch.ones_like(w) if "project" in n else w for n, w in found.items()}

    return mock.patch.object(clipping.FlatClipping, "weights", weights)


def the_largest_clip_is_the_sensitivity() -> AbstractContextManager[Any]:
    """Noise for max C_l, where one record moves the sum by √ΣC_l²."""
    wrong = property(lambda rule: max(rule.max_grad_norms.values()))
    return mock.patch.object(clipping.LayerClipping, "sensitivity", wrong)


def no_coins() -> AbstractContextManager[Any]:
    return mock.patch.object(PoissonLoader, "indices", lambda loader, _: np.arange(loader._size))


def the_realised_size_divides() -> AbstractContextManager[Any]:
    right = PrivateTraining._release

    def release(training: PrivateTraining) -> dict[str, Tensor]:
        assert training._micro is not None
        training._noising._size = float(max(1, training._micro.size))
        return right(training)

    return mock.patch.object(PrivateTraining, "_release", release)


def size_games(steps: int = 300) -> Played:
    """Games of one step each whose score is the size of the noise, times the public q·N.

    Without the canary the data set has one record, with it two; both step at q = 1/2, z = 4.
    """
    scores, accountant = [], PldAccountant()
    for count in (2, 1):
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        nn.init.zeros_(model[0].weight)  # pyright: ignore[reportArgumentType]
        digest = hashlib.sha256(f"{count}".encode()).digest()
        with mock.patch.object(engine, "new_key", return_value=digest):
            private = make_private(
                model, torch.optim.SGD(model.parameters(), lr=1.0),
                DataLoader(TensorDataset(torch.eye(16)[:count])), method="dp-sgd",
                max_grad_norm=1.0, privacy=NoiseMultiplier(4.0), delta=DELTA, sample_rate=0.5,
                secure=False,
            )  # fmt: skip
        found: list[float] = []

        def look(*_: object, weight: Any = model[0].weight, sink: Any = found) -> None:
            sink.append(float(weight.detach().std()))
            weight.detach().zero_()

        private.optimizer.register_step_post_hook(look)
        while len(found) < steps:
            for (x,) in private.data_loader:
                model(x).sum(1).mean().backward()
                private.optimizer.step()
        accountant = PldAccountant().compose(private.accountant.events[0][0])
        scores.append(np.array(found[:steps]) * private.expected_batch_size)
        private.close()
    both = np.concatenate(scores)
    members = np.repeat([True, False], steps)
    return Played(both, members, np.arange(len(both)), accountant)


# ---- tests -------------------------------------------------------------------------------------

HONEST: list[tuple[str, dict[str, Any], float]] = [
    ("dp-sgd", {}, 0.75),
    ("dp-sgd", {"rate": 0.25, "games": 400_000}, 0.6),
    ("dp-lora-fa", {"z": 2.0, "adjacency": "replace"}, 0.75),
    ("dp-sgd", {"rate": 0.25, "adjacency": "replace", "games": 200_000}, 0.7),
    ("dp-sgd", {"rule": "per-layer"}, 0.75),
    ("dp-lora", {}, 0.75),
    ("dp-lora", {"rate": 0.25, "games": 200_000}, 0.6),
    ("dp-lora-fa", {}, 0.75),
    ("dp-lora-fa", {"rate": 0.25, "games": 200_000}, 0.6),
    ("dp-flora", {"z": 0.5}, 0.7),
    ("dp-flora", {"z": 0.5, "rate": 0.25, "games": 200_000}, 0.6),
    ("dp-flora", {"z": 1.0, "adjacency": "replace", "law": "gaussian"}, 0.7),
    ("dp-flora", {"z": 0.5, "rate": 0.25, "adjacency": "replace"}, 0.6),
]

SABOTAGED: list[tuple[Sabotage, str, dict[str, Any], float]] = [
    *(
        (sabotage, method, {"z": 0.5 if method == "dp-flora" else 1.0, "games": 30_000}, share)
        for sabotage, share in ((half_the_noise, 1.3), (no_clip, 2.0))
        for method in ("dp-sgd", "dp-lora", "dp-lora-fa", "dp-flora")
    ),
    (a_goes_unclipped, "dp-lora", {"games": 20_000}, 2.0),
    (the_largest_clip_is_the_sensitivity, "dp-sgd", {"rule": "per-layer"}, 1.1),
    *(
        (
            no_coins, method,
            {"z": 0.5 if method == "dp-flora" else 1.0, "rate": 0.25, "games": 30_000}, 1.8,
        )
        for method in ("dp-sgd", "dp-lora", "dp-lora-fa", "dp-flora")
    ),
    (nullcontext, "dp-flora", {"z": 0.5, "known": KNOWN, "aligned": True}, 1.2),
    (
        nullcontext, "dp-flora",
        {"z": 0.5, "rate": 0.25, "known": KNOWN, "aligned": True}, 1.8,
    ),
]  # fmt: skip


def label(value: object) -> str | None:
    if isinstance(value, dict):
        return " ".join(f"{name}={one}" for name, one in value.items()) or "z=1.0"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("method", "options", "power"), HONEST, ids=label)
def test_no_attack_on_a_step_beats_its_ledger(
    method: str, options: dict[str, Any], power: float
) -> None:
    """10⁵ to 4·10⁵ games at significance 1e-6; the attack reaches the stated share of the ε."""
    played = play(method, **options)
    found = audited(played, options.get("adjacency", "add-remove")).epsilon
    assert len(played.scores) >= 100_000
    assert power * played.claimed <= found <= played.claimed


@pytest.mark.parametrize(("sabotage", "method", "options", "share"), SABOTAGED, ids=label)
def test_a_sabotaged_step_is_caught(
    sabotage: Sabotage, method: str, options: dict[str, Any], share: float
) -> None:
    """The lower bound exceeds what the ledger claims by the stated factor or more.

    Half the noise; no clip, and none of one layer; noise for one of two clips only; every record
    in at a rate of 1/4; an A that was used before, with canaries in its row space.
    """
    with sabotage():
        played = play(method, **options)
    assert audited(played).epsilon > share * played.claimed


def test_aligned_canaries_show_nothing_of_a_fresh_projection() -> None:
    """What catches an A that is used again does not accuse one that is not."""
    played = play("dp-flora", z=0.5, aligned=True)
    found = audited(played).epsilon
    assert 0.7 * played.claimed <= found <= played.claimed


def test_division_by_the_realised_size_is_caught() -> None:
    """It scales the noise by a secret: ε >= 2 from 300 steps a world, where 0.15 is claimed.

    With the expected size, the same attack on the same steps shows nothing.
    """
    assert audited(size_games()).epsilon == 0
    with the_realised_size_divides():
        played = size_games()
    assert audited(played).epsilon > 2.0
    assert played.claimed < 0.2


def test_audits_hold_with_the_randomness_of_the_operating_system() -> None:
    """No seed: soundness at 1e-6, and power with a margin of 5σ or more, half the noise caught."""
    played = play("dp-lora-fa", key=None)
    assert 0.7 * played.claimed < audited(played).epsilon <= played.claimed
    with half_the_noise():
        assert audited(play("dp-lora-fa", key=None)).epsilon > 1.3 * played.claimed


def one_run() -> tuple[Played, LeakageEstimate, LeakageEstimate]:
    """102,400 fair coins in one step: the bound from 1,000 guesses, and that of a Gaussian."""
    played = play("dp-sgd", games=1)
    made = guess(played.scores, played.members, top=500, bottom=500)
    gaussian = epsilon_one_run_fdp(
        canaries=made.canaries, guesses=made.guesses, correct=made.correct, delta=DELTA,
        significance=SIGNIFICANCE,
    )  # fmt: skip
    plain = epsilon_one_run_scores(
        played.scores, played.members, guesses=1000, delta=1e-12, significance=SIGNIFICANCE,
        delta_term="tight",
    )  # fmt: skip
    return played, plain, gaussian


def test_one_run_audits_hold_and_have_some_power() -> None:
    """ε >= 2.4 at δ = 1e-12, where 7.2 is proved, and μ >= 0.5 of the true μ = 1/z = 1.

    They are weaker than independent games allow: coins may be given away together, in an event
    as rare as the significance.
    """
    played, plain, gaussian = one_run()
    assert 2.4 < plain.epsilon <= played.accountant.epsilon(1e-12).epsilon
    assert gaussian.mu is not None
    assert 0.5 < gaussian.mu <= 1.0
    assert gaussian.epsilon <= played.claimed


def test_the_score_for_flora_is_that_of_the_projection_attack() -> None:
    """The library's exact ratio on the released (V + E) Aᵀ, for one step; 1e-5 relative."""
    rng = np.random.default_rng(1)
    inputs = gradient_canaries("random", shape=(1, 8), norm=1.0, count=24, random_state=rng)[:, 0]
    seen: list[int] = []
    members = np.arange(24) % 2 == 0
    canaries = projected(inputs, law="gaussian")
    change, _ = one_step(
        canaries, members, "dp-flora", z=0.5, rate=1.0, adjacency="add-remove", key=3, part=None,
        seen=seen,
    )  # fmt: skip
    a = RandomProjection(2, 8, "gaussian", seed=seen[0], layer="0").matrix(0).double().numpy()
    moved = canaries.read(change).double().numpy()
    released = moved @ a.T @ np.linalg.inv(a @ a.T)
    candidates = np.eye(24)[:, :, None] * inputs[:, None, :]
    expected = projection_attack(
        -released, candidates, known=np.zeros((24, 8)), a=a, step_size=1.0, noise_std=0.5,
        noise_at="gradient",
    )  # fmt: skip
    found = log_ratio(moved, inputs, a, 0.5, 1.0, replaced=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_games_of_one_flora_step_are_independent_for_random_directions_only() -> None:
    """Dispersion of the hits of a step, χ² at level 1e-4; one direction for all is rejected.

    Given A, the chance of a hit depends on ‖P x‖: a direction of its own for each canary makes
    its law the same whatever A is, one for all makes steps differ.
    """

    def p_value(*, together: bool) -> float:
        played = play("dp-flora", z=0.5, games=60_000, together=together)
        inside = played.members
        hits = np.bincount(played.steps[inside], weights=played.scores[inside] > 1.0)
        trials = np.bincount(played.steps[inside])
        rate = hits.sum() / trials.sum()
        spread = np.sum((hits - rate * trials) ** 2 / (trials * rate * (1 - rate)))
        return float(stats.chi2.sf(spread, len(hits) - 1))

    assert p_value(together=False) > 1e-4
    assert p_value(together=True) < 1e-4
