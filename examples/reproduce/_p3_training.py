"""Private training of reproduction P3: one loop, its denoisers, and what each makes of a step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader

from lora_privacy.core import adapt, adapters
from lora_privacy.training import (
    SingularValueDenoiser,
    SpectrumProfile,
    TargetEpsilon,
    make_private,
    predicted_cosine,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from torch import Tensor

    Array = npt.NDArray[np.float64]

__all__ = [
    "DELTA",
    "RANK",
    "SHRINKERS",
    "Comparison",
    "Plan",
    "Records",
    "lora",
    "noisy_law",
    "paired",
    "train",
    "without_dropout",
]

DELTA = 1e-5
RANK = 8
HEAD_RATE = 3e-2

SHRINKERS: dict[str, SingularValueDenoiser | None] = {
    "none": None,
    "frobenius": SingularValueDenoiser("frobenius"),
    "debias": SingularValueDenoiser("debias"),
    "partial": SingularValueDenoiser("partial", strength=0.5),
    "hard": SingularValueDenoiser("hard", edge_factor=1.05),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one private training is made of; its fields are the key of the run.

    Attributes:
        method: ``"dp-lora"``, or ``"dp-sgd"`` on whole matrices.
        shrinker: A name of `SHRINKERS`.
        epsilon: Target, in nats, at `DELTA`.
        seed: Of the head and of A; sampling and noise come from the operating system.
        rate: Of AdamW on adapters or matrices, constant; a head has `HEAD_RATE`.
        clip: Norm that a record's gradient is cut to.
        steps: Optimizer steps.
        batch_size: Expected records of a step.
        every: Steps from one scoring to the next.
    """

    method: str
    shrinker: str
    epsilon: float
    seed: int
    rate: float
    clip: float
    steps: int
    batch_size: int
    every: int


@dataclass(frozen=True, slots=True)
class Records:
    """What a training draws from and how.

    Attributes:
        order: Positions of the records, by length, so that little is padded; each enters a batch
            by a coin of its own, so the order tells nothing.
        batch: Positions -> a batch.
        loss: Model and batch -> mean over the records.
        score: Model -> numbers on the held-out part of the training file.
        physical: Most records run at once.
    """

    order: list[int]
    batch: Callable[[list[int]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], dict[str, float]]
    physical: int


def lora(model: nn.Module, seed: int, **options: Any) -> nn.Module:  # noqa: ANN401
    """Adapters, **in place**, that start as peft's do by default with alpha = 2 rank.

    Entries of A have variance 1/(3m) there, and 1/rank after `adapt`.
    """
    adapt(model, RANK, alpha=2 * RANK, seed=seed, **options)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.a().mul_(math.sqrt(RANK / (3 * adapter.in_features)))
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off, **in place**: the noise of the steps is enough chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(
    model: nn.Module, records: Records, plan: Plan, denoiser: Comparison | None = None
) -> dict[str, Any]:
    """Train ``model`` in place; scores at step 0, every so many steps and at the end.

    Args:
        model: Ready for `plan.method`.
        records: What to train on.
        plan: Settings; `plan.shrinker` names the denoiser unless one is given.
        denoiser: Looks at every gradient, for the spectra.
    """
    named = {path: p for path, p in model.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p for path, p in named.items() if path.startswith("head.") == head],
            "lr": rate,
        }
        for head, rate in ((True, HEAD_RATE), (False, plan.rate))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    private = make_private(
        model,
        optimizer,
        DataLoader(records.order, batch_size=plan.batch_size, collate_fn=records.batch),
        method=plan.method,  # type: ignore[arg-type]
        max_grad_norm=plan.clip,
        privacy=TargetEpsilon(plan.epsilon, steps=plan.steps),
        delta=DELTA,
        physical_batch_size=records.physical,
        denoiser=denoiser or SHRINKERS[plan.shrinker],
    )
    curve = [{"step": 0, **records.score(model)}]
    started = time.process_time()
    scoring = 0.0

    def look() -> None:
        nonlocal scoring
        due = private.step % plan.every == 0 or private.step == plan.steps
        if due and private.step != curve[-1]["step"]:
            before = time.process_time()
            curve.append({"step": private.step, **records.score(model)})
            scoring += time.process_time() - before

    while private.steps_left():
        for batch in private.data_loader:
            records.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            look()
    look()  # a last step of noise alone is taken by the loader
    bound = private.bound()
    if not bound.epsilon <= plan.epsilon:
        raise RuntimeError(f"The run must stay within ε = {plan.epsilon}, proved {bound.epsilon}.")
    return {
        "noise_multiplier": private.noise_multiplier,
        "trained": sum(p.numel() for p in named.values()),
        "proved_epsilon": bound.epsilon,
        "cpu_seconds": time.process_time() - started - scoring,
        "cpu_seconds_scoring": scoring,
        "curve": curve,
    }


class Comparison:
    """Leave every gradient noised, and record what each shrinker would have made of it.

    It sees the clipped mean before the noise, so what it records is **not private**: for public
    data only.

    Attributes:
        profile: Singular values before the noise, after it, and restored by ``frobenius``.
        rows: One for each gradient that is not 0 before the noise: step, path, cosines to the
            clean gradient found and predicted, singular values above the edge.
    """

    before_noise = True

    def __init__(self) -> None:
        self.profile = SpectrumProfile(SHRINKERS["frobenius"], before_noise=True)
        self.rows: list[dict[str, Any]] = []
        self._clean: dict[str, Tensor] = {}

    def before(self, path: str, mean_gradient: Tensor) -> None:
        """Take the clipped mean before its noise."""
        self._clean[path] = mean_gradient.detach().clone()
        self.profile.before(path, mean_gradient)

    def __call__(self, path: str, gradient: Tensor, noise_std: float) -> Tensor:
        clean = self._clean.pop(path)
        if gradient.dim() < 2:
            return gradient
        self.profile(path, gradient, noise_std)
        record = self.profile.records[path][-1]
        if clean.norm() == 0:  # A before B has moved
            return gradient
        found, predicted = {}, {}
        for name, shrinker in SHRINKERS.items():
            restored = gradient if shrinker is None else shrinker(path, gradient, noise_std)
            found[name] = _cosine(clean, restored)
            options = {}
            if shrinker is not None:
                options = {"strength": shrinker.strength, "edge_factor": shrinker.edge_factor}
            predicted[name] = predicted_cosine(
                record.before, noise_std, record.shape, shrinker and shrinker.shrinker, **options
            )
        edge = noise_std * sum(math.sqrt(side) for side in record.shape)
        self.rows.append(
            {
                "step": record.step,
                "path": path,
                "shape": list(record.shape),
                "found": found,
                "predicted": predicted,
                "above": int((record.noisy > edge).sum()),
                "strongest": float(
                    record.before[0] / (noise_std * math.prod(record.shape) ** 0.25)
                ),
            }
        )
        return gradient


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def noisy_law(values: Array, shape: tuple[int, int]) -> Array:
    """Predicted singular values after noise of standard deviation 1, in falling order.

    A visible λ goes to ``√((λ + n/λ)(λ + m/λ))``; the rest are quantiles of the noise's own law,
    that of Marchenko and Pastur for ``√(Z Zᵀ)``. Source: docs/theory/denoising.md, Sec. 1.
    """
    n, m = sorted(shape)
    seen = values[values > (n * m) ** 0.25]
    spikes = np.sqrt((seen + n / seen) * (seen + m / seen))
    low, high = math.sqrt(m) - math.sqrt(n), math.sqrt(m) + math.sqrt(n)
    y = np.linspace(low, high, 20_001)
    # the density of y = √x, for x with the density √((x − a)(b − x))/x, up to a factor
    density = np.sqrt(np.maximum((y**2 - low**2) * (high**2 - y**2), 0)) / np.maximum(y, 1e-9)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    rest = n - len(seen)
    levels = 1 - (np.arange(rest) + 0.5) / max(rest, 1)
    return np.concatenate([spikes, np.interp(levels, mass / mass[-1], y)])


def paired(differences: list[float]) -> dict[str, Any]:
    """Mean of paired differences and its 95 % t interval; None where one value gives none."""
    values = np.asarray(differences, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "pairs": count}
    half = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count}
