"""The white-box game on one update: was the candidate in the batch?

A game: a batch of real gradients, its last record in or out by a fair coin; the attacker knows the
others, sees what the step released and scores the last. The AUC over games is evidence; for a
private method the most that any attack can have is proved, and stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lora_privacy import _validate
from lora_privacy.assess.methods import METHODS, MethodName
from lora_privacy.audit import RateEstimate, auc, projection_attack
from lora_privacy.core import RandomProjection
from lora_privacy.dp import GaussianEvent, PldAccountant, ProjectedGaussian
from lora_privacy.dp.attestation import HAAR_LAWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_privacy.laws import LawName

__all__ = [
    "UpdateAttack",
    "attack_updates",
    "best_auc",
    "checked_shapes",
    "clip_factors",
    "is_private",
    "projections_of",
]

Array = npt.NDArray[np.float64]

_AREA_STEPS = 4_000  # the area over the curve is at most 0.003 too large

# What the attacker sees of the step; the rest of the threat model is common to all methods.
_SEES: dict[MethodName, str] = {
    "full": "the mean gradient of the batch, which plain SGD adds to the weights",
    "lora": (
        "what the first step of plain SGD adds to the weights, G AᵀA (B = 0, so A does not move "
        "yet), and not A"
    ),
    "lora-fa": "what the first step of plain SGD adds to the weights, G AᵀA, and not A",
    "flora": "what one step of plain SGD adds to the weights, G AᵀA, and not the fresh A",
    "dp-sgd": "the clipped mean gradient with its noise",
    "dp-lora": (
        "the first step of B, the clipped mean of G Aᵀ with its noise (B = 0, so the step of A is "
        "noise alone), and A"
    ),
    "dp-lora-fa": "the first step of B, the clipped mean of G Aᵀ with its noise, and A",
    "dp-flora": "(G + noise) Aᵀ, G the clipped mean gradient, and the fresh A",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateAttack:
    """How well the white-box attack tells who was in the batch behind one update.

    The game is about the layers named, as if nothing else were trained: a clip that other
    parameters share makes the candidate's part smaller.

    Attributes:
        method: One of ``lora_privacy.assess.methods.METHODS``.
        rank: Rows of A; None where there is no A.
        noise_multiplier: z = σ/C; 0 for the methods without noise.
        batch_size: Records of the batch, the candidate among them.
        games: Number of games, each with its own batch, A and noise.
        layers: Names of the layers.
        shapes: ``(out_features, in_features)`` of each.
        auc: Area under the ROC curve of the attack, with its threat model. Evidence.
        delta: The δ that ``epsilon`` holds at.
        epsilon: Proved ε of one step in which the batch is known, so without any sampling;
            None for the methods without noise.
        best_auc: Largest AUC that any attack can have on that step, proved and rounded up; None
            for the methods without noise.
    """

    method: MethodName
    rank: int | None
    noise_multiplier: float
    batch_size: int
    games: int
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    auc: RateEstimate
    delta: float
    epsilon: float | None
    best_auc: float | None

    @property
    def knowledge(self) -> str:
        """Threat model, in words."""
        return self.auc.threat_model

    @property
    def contradicts(self) -> bool:
        """Whether the AUC's lower limit is above the proved one: then one of both is wrong."""
        return self.best_auc is not None and self.auc.low > self.best_auc

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields; an infinite ε is the string ``"inf"``."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["layers"], data["shapes"] = list(self.layers), [list(one) for one in self.shapes]
        data["auc"] = self.auc.to_dict()
        data["epsilon"] = "inf" if self.epsilon == math.inf else self.epsilon
        return {**data, "contradicts": self.contradicts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a saved attack; what is proved is computed anew, never read."""
        kept = {field.name: data[field.name] for field in fields(cls)}
        kept["layers"] = tuple(data["layers"])
        kept["shapes"] = tuple((rows, columns) for rows, columns in data["shapes"])
        kept["auc"] = RateEstimate.from_dict(data["auc"])
        kept["epsilon"], kept["best_auc"] = _proved(
            data["method"], kept["shapes"], data["rank"], data["noise_multiplier"], data["delta"]
        )
        return cls(**kept)


def attack_updates(
    gradients: Mapping[str, Array],
    *,
    method: MethodName,
    rank: int | None = None,
    law: LawName = "gaussian",
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    batch_size: int,
    games: int = 300,
    seed: int,
    significance: float = 0.05,
    delta: float,
) -> UpdateAttack:
    """Play games on one update of ``method``, made of real gradients.

    Every game draws a batch without replacement, a coin, an A a layer, and noise. The mean is over
    ``batch_size``, also where the candidate is out. Scores of the layers are added.

    Args:
        gradients: Layer -> one gradient a record, (records, out, in), as ``sample_gradients``
            gives them.
        method: What is released; the private methods clip each record over all layers together.
        rank: Rows of A, for the methods that have one.
        law: Of its entries, for the same; for ``"dp-flora"`` one with a uniform row space.
        noise_multiplier: z = σ/C, > 0 for the private methods and 0 for the others.
        max_grad_norm: C of the private methods, in units of the gradient. B's gradient is taken
            to be G Aᵀ, so that alpha = rank; else give C · rank / alpha.
        batch_size: Records of a batch, at least 2, at most the records there are.
        games: Number of games.
        seed: Decides batches, coins, A and noise.
        significance: Of the interval of the AUC.
        delta: δ at which ε of the step is proved.

    Raises:
        ValueError: An argument is out of range or does not go with ``method``.
    """
    _validate.choice("method", method, METHODS)
    shapes = checked_shapes(gradients)
    records = len(next(iter(gradients.values())))
    batch_size = _validate.integer("batch_size", batch_size, 2, "The attacker knows the others.")
    _validate.between("batch_size", batch_size, 2, records, "So many gradients there are.")
    games = _validate.integer("games", games, 2)
    seed = _validate.integer("seed", seed, 0)
    _validate.inside("delta", delta, 0, 1)
    _validate.positive("max_grad_norm", max_grad_norm)
    private = is_private(method)
    if private:
        _validate.positive("noise_multiplier", noise_multiplier, f"{method} adds noise.")
    elif noise_multiplier:
        raise ValueError(f"noise_multiplier must be 0 for {method!r}, got {noise_multiplier!r}.")
    projections = projections_of(gradients, method, rank, law, seed)
    rank = rank if projections else None
    rng = np.random.default_rng(seed)
    std = noise_multiplier * max_grad_norm / batch_size
    weights = np.ones(records)
    if method in ("dp-sgd", "dp-flora"):
        weights = clip_factors(gradients.values(), max_grad_norm)
    scores, members = np.empty(games), np.empty(games, np.bool_)
    for number in tqdm(range(games), desc=f"{method}: attack", unit="game", leave=False):
        rows = rng.choice(records, batch_size, replace=False)
        members[number] = rng.integers(2)
        matrices = {
            layer: one.matrix(number, torch.float64).numpy() for layer, one in projections.items()
        }
        used, places, factors = gradients, rows, weights[rows]
        if method in ("dp-lora", "dp-lora-fa"):  # what B gets is what is clipped
            used = {
                layer: np.stack([g[row] @ matrices[layer].T for row in rows])
                for layer, g in gradients.items()
            }
            places, factors = np.arange(batch_size), clip_factors(used.values(), max_grad_norm)
        scores[number] = 0.0
        for layer, g in used.items():
            known = _weighted(g, places[:-1], factors[:-1] / batch_size)
            one = _weighted(g, places[-1:], factors[-1:] / batch_size)
            total = known + one if members[number] else known
            scores[number] += _score(method, total, known, one, matrices.get(layer), std, rng)
    found = auc(
        scores, members, significance=significance, threat_model=_threat(method, batch_size)
    )
    epsilon, best = _proved(method, shapes, rank, noise_multiplier, delta)
    return UpdateAttack(
        method=method,
        rank=rank,
        noise_multiplier=float(noise_multiplier),
        batch_size=batch_size,
        games=games,
        layers=tuple(gradients),
        shapes=shapes,
        auc=found,
        delta=float(delta),
        epsilon=epsilon,
        best_auc=best,
    )


def projections_of(
    gradients: Mapping[str, Array],
    method: MethodName,
    rank: int | None,
    law: LawName,
    seed: int,
) -> dict[str, RandomProjection]:
    """Layer -> its A; empty for the methods that have none.

    Raises:
        ValueError: There is no rank, or the law has no uniform row space and dp-flora needs one.
    """
    if method in ("full", "dp-sgd"):
        return {}
    if rank is None:
        raise ValueError(f"rank must be given for {method!r}: the rows of A.")
    if method == "dp-flora":
        _validate.choice("law", law, HAAR_LAWS)
    return {
        layer: RandomProjection(rank, g.shape[2], law, seed=seed, layer=layer)
        for layer, g in gradients.items()
    }


def clip_factors(gradients: Iterable[Array], max_grad_norm: float) -> Array:
    """min(1, C/‖g‖) of each record, ‖g‖ over all layers; (records,).

    Args:
        gradients: One array (records, …) a layer.
        max_grad_norm: C.
    """
    squares = sum(np.square(g.reshape(len(g), -1)).sum(1) for g in gradients)
    sizes = np.sqrt(np.asarray(squares))
    # Divided first, 0/0 would be NaN; a record without a gradient keeps it.
    return max_grad_norm / np.maximum(sizes, max_grad_norm)


def best_auc(accountant: PldAccountant) -> float:
    """Largest AUC of any attack that an accountant's proof allows: the area over its trade-off.

    Batches and candidates may be random: given them the curve holds, and its bound is convex in
    the direction that the game has, so it holds for the mixture. Rounded up.
    """
    fpr = np.concatenate([np.zeros(1), np.geomspace(1e-9, 1, _AREA_STEPS)])
    fpr[-1] = 1.0
    fnr = accountant.trade_off(fpr)
    # The curve falls: its value at the right end of a step is below it on the whole step.
    area = math.fsum(np.diff(fpr) * fnr[1:]) * (1 - 4 * np.finfo(np.float64).eps)
    return min(1.0, math.nextafter(1 - area, 2.0))


def _score(
    method: MethodName,
    total: Array,
    known: Array,
    one: Array,
    a: Array | None,
    std: float,
    rng: np.random.Generator,
) -> float:
    """The attack on what one layer releases; steps of size 1, so that it is minus the gradient."""
    options: dict[str, Any] = {}
    if a is None or method in ("dp-lora", "dp-lora-fa"):
        if std:
            total = total + std * rng.standard_normal(total.shape)
        # Released as it is: a column of numbers, and A = 1.
        update, known, one = -total.reshape(-1, 1), known.reshape(-1, 1), one.reshape(-1, 1)
        options = {"a": np.ones((1, 1)), "step_size": 1.0, "noise_std": std}
    elif method == "dp-flora":
        update = -(total + std * rng.standard_normal(total.shape)) @ a.T
        options = {"a": a, "step_size": 1.0, "noise_std": std, "noise_at": "gradient"}
    else:
        update = -total @ a.T @ a
        # The test looks at G Uᵀ alone. In a basis of the rows of U, which whoever sees U can find,
        # its matrices are (n, r): far cheaper.
        basis = np.linalg.qr(update.T @ rng.standard_normal((len(update), len(a))))[0]
        update, known, one = update @ basis, known @ basis, one @ basis
    return float(projection_attack(update, one[None], known=known, **options)[0])


def _weighted(gradients: Array, places: npt.NDArray[np.int64], weights: Array) -> Array:
    """Σ weights_i G_i over the places, through one buffer: large temporaries are slow."""
    total, buffer = np.zeros(gradients.shape[1:]), np.empty(gradients.shape[1:])
    for place, weight in zip(places, weights, strict=True):
        total += np.multiply(gradients[place], weight, out=buffer)
    return total


def _proved(
    method: MethodName,
    shapes: tuple[tuple[int, int], ...],
    rank: int | None,
    noise_multiplier: float,
    delta: float,
) -> tuple[float | None, float | None]:
    """ε and the best AUC of one step; (None, None) without noise."""
    if not is_private(method):
        return None, None
    event = GaussianEvent(noise_multiplier)
    if method == "dp-flora":
        if rank is None:
            raise ValueError("rank must be given for 'dp-flora': the rows of A.")
        event = ProjectedGaussian(
            layers=[(columns, rank) for _, columns in shapes], noise_multiplier=noise_multiplier
        )
    spent = PldAccountant().compose(event)
    return spent.epsilon(delta).epsilon, best_auc(spent)


def _threat(method: MethodName, batch_size: int) -> str:
    return (
        f"white box: sees {_SEES[method]}; knows the base model, the candidate and the other "
        f"{batch_size - 1} records of the batch, and looks at these layers as if nothing else "
        "were trained"
    )


def is_private(method: MethodName) -> bool:
    """Whether ``method`` clips and adds noise."""
    return method.startswith("dp-")


def checked_shapes(gradients: Mapping[str, Array]) -> tuple[tuple[int, int], ...]:
    """``(out, in)`` of each layer; ValueError for none, or for other shapes or records."""
    if not gradients:
        raise ValueError("gradients must name at least one layer.")
    counts = {len(g) for g in gradients.values()}
    if any(g.ndim != 3 for g in gradients.values()) or len(counts) > 1:
        raise ValueError(
            "gradients must have shape (records, out, in) with the same records in every layer, "
            f"got {[g.shape for g in gradients.values()]}."
        )
    return tuple((int(g.shape[1]), int(g.shape[2])) for g in gradients.values())
