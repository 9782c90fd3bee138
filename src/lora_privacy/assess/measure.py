"""Measure the injected noise on real gradients and set it beside its exact law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from lora_privacy.core import RandomProjection
from lora_privacy.noise import (
    EmpiricalNoise,
    EntryNoise,
    expected_noise_energy,
    joint_tv_to_gaussian,
    matrix_tv_to_gaussian,
    noise_energy_variance,
    tv_bound,
    tv_of_entries,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from lora_privacy.core import Adapter, GradientRecord
    from lora_privacy.core.adapter import MethodName
    from lora_privacy.laws import LawName

    Array = npt.NDArray[np.float64]

__all__ = ["EntryCheck", "LayerNoise", "NoiseMeter"]

# Rows a layer that fresh draws of A are applied to: cheap, and one row already has m entries.
_ROWS = 4
_QUANTILES = 61
# Level of the band around the empirical distribution function, over all layers of one method.
_BAND_LEVEL = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryCheck:
    """One noise entry over fresh draws of A against its exact law.

    Attributes:
        row: Output row of the gradient, the one with the largest norm.
        column: Its entry with the median absolute value.
        cosine: ρ = q_i / ‖q‖.
        draws: Fresh draws of A.
        distance: Largest gap between the empirical and the stated distribution function.
        band: The gap that stays below this with probability 0.99 over all layers together, if
            the stated law is right (Dvoretzky–Kiefer–Wolfowitz–Massart).
        reference: The stated law: ``"exact"``, or ``"simulated"`` where none has a closed form.
        observed: Quantiles of the drawn entry, in units of its predicted standard deviation.
        expected: The same quantiles of the stated law.
        normal: The same quantiles of N(0, 1).
    """

    row: int
    column: int
    cosine: float
    draws: int
    distance: float
    band: float
    reference: str
    observed: tuple[float, ...]
    expected: tuple[float, ...]
    normal: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNoise:
    """What the projection injected at one layer.

    Attributes:
        layer: Name of the adapted module.
        out_features: n. in_features: m. rank: r. scaling: s = alpha/rank.
        law: Law of A's entries at the start. variance: Of one entry.
        steps: Steps measured in training.
        projections: Different matrices A those steps saw at the start of their cycle.
        gradient_norm: Root mean square of ‖G‖_F over those steps, in the loss's unit per weight.
        training_ratio: Σ‖N‖² measured over Σ E‖N‖² predicted, with the A of each step.
        fresh_ratio: The same over fresh draws of A, for four rows of the last measured G.
        fresh_standard_error: Its standard error, by the exact law where A is Gaussian or
            orthonormal, else by the sample.
        one_draw_spread: Standard deviation of the ratio of the whole last G for a single draw
            of A, by the exact law likewise, else by the sample of its four rows.
        entry: One entry's law over the same draws.
        tv_median: Total variation of an entry to N(0, its exact variance), median of the row.
        tv_largest: Largest of the row.
        tv_published_largest: Largest against N(0, ‖q‖²/r), the published variance.
        tv_bound: Proved upper bound for the entry with the largest |ρ|, exact variance.
        joint_tv: Total variation of a whole row to its Gaussian with the published covariance.
        matrix_tv: Of the whole gradient to i.i.d. Gaussian noise.
    """

    layer: str
    out_features: int
    in_features: int
    rank: int
    scaling: float
    law: str
    variance: float
    steps: int
    projections: int
    gradient_norm: float
    training_ratio: float
    fresh_ratio: float
    fresh_standard_error: float
    one_draw_spread: float
    entry: EntryCheck
    tv_median: float
    tv_largest: float
    tv_published_largest: float
    tv_bound: float
    joint_tv: float
    matrix_tv: float


class NoiseMeter:
    """Collects gradient records over the measured steps of one run, then states each layer.

    Args:
        adapters: The adapted layers, as ``core.adapters`` lists them before training.
        method: How they are trained; under FLoRA every step has an A of its own.
    """

    def __init__(self, adapters: Mapping[str, Adapter], method: MethodName) -> None:
        self._adapters = dict(adapters)
        self._method = method
        self._measured = dict.fromkeys(adapters, 0.0)
        self._predicted = dict.fromkeys(adapters, 0.0)
        self._squared_norm = dict.fromkeys(adapters, 0.0)
        self._last: dict[str, Array] = {}
        self.steps: int = 0

    def add(self, records: Mapping[str, GradientRecord]) -> None:
        """Take the records of one step; they are read now and not kept."""
        for name, record in records.items():
            gradient = record.gradient.double()
            squared = float(gradient.square().sum())
            if squared == 0.0:  # a layer that no example reached adds nothing to either sum
                continue
            adapter = self._adapters[name]
            self._squared_norm[name] += squared
            self._measured[name] += float(record.noise.double().square().sum())
            rows = gradient.cpu().numpy()
            self._predicted[name] += expected_noise_energy(rows, adapter.law, adapter.rank)
            self._last[name] = rows
        self.steps += 1

    def layers(self, *, draws: int, seed: int) -> tuple[LayerNoise, ...]:
        """State every layer that had a gradient, with ``draws`` fresh matrices A each."""
        return tuple(self._layer(name, draws, seed) for name in self._last)

    def _layer(self, name: str, draws: int, seed: int) -> LayerNoise:
        adapter, gradient = self._adapters[name], self._last[name]
        norms = np.linalg.norm(gradient, axis=1)
        order = np.argsort(norms)[::-1]
        order = order[norms[order] > 0]
        picked = order[np.linspace(0, len(order) - 1, min(_ROWS, len(order))).astype(int)]
        rows = gradient[picked]
        energies, entry = self._fresh(name, adapter, rows, draws, seed, int(picked[0]))
        predicted = expected_noise_energy(rows, adapter.law, adapter.rank)
        ratio = energies / predicted
        sampled = float(ratio.std(ddof=1))
        top = rows[0]
        cosine = float(np.max(np.abs(top)) / np.linalg.norm(top))
        tv = tv_of_entries(top, adapter.rank, variance="exact")
        published = tv_of_entries(top, adapter.rank, variance="published")
        widest = EntryNoise(adapter.rank, 1.0, cosine)
        return LayerNoise(
            layer=name,
            out_features=adapter.out_features,
            in_features=adapter.in_features,
            rank=adapter.rank,
            scaling=adapter.scaling,
            law=adapter.law.name,
            variance=adapter.law.variance,
            steps=self.steps,
            projections=self.steps if self._method == "flora" else 1,
            gradient_norm=math.sqrt(self._squared_norm[name] / self.steps),
            training_ratio=self._measured[name] / self._predicted[name],
            fresh_ratio=float(ratio.mean()),
            fresh_standard_error=_spread(rows, adapter, sampled) / math.sqrt(draws),
            one_draw_spread=_spread(gradient, adapter, sampled),
            entry=entry,
            tv_median=float(np.median(tv)),
            tv_largest=float(tv.max()),
            tv_published_largest=float(published.max()),
            tv_bound=tv_bound(widest, variance="exact").value,
            joint_tv=joint_tv_to_gaussian(
                adapter.rank, adapter.in_features, covariance="published"
            ).value,
            matrix_tv=matrix_tv_to_gaussian(gradient, adapter.rank, covariance="published").value,
        )

    def _fresh(
        self, name: str, adapter: Adapter, rows: Array, draws: int, seed: int, row_index: int
    ) -> tuple[Array, EntryCheck]:
        """Energies of the noise of ``rows`` and the first row's middle entry, over fresh A."""
        law = adapter.law.name
        if law == "unknown":
            raise ValueError(
                f"the law of A at {name} is unknown, so no fresh A can be drawn; adapt the model "
                "with a named law."
            )
        projection = RandomProjection(
            adapter.rank,
            adapter.in_features,
            law,
            seed=seed,
            layer=f"check of {name}, {self._method}",  # draws of their own for every method
        )
        q = torch.from_numpy(rows)
        column = int(np.argsort(np.abs(rows[0]))[rows.shape[1] // 2])
        energies, values = np.empty(draws), np.empty(draws)
        for draw in range(draws):
            a = projection.matrix(draw, dtype=torch.float64)
            noise = (q @ a.T) @ a - q  # RandomProjection has v·r = 1
            energies[draw] = float(noise.square().sum())
            values[draw] = float(noise[0, column])
        return energies, self._entry(law, adapter, rows[0], row_index, column, values, seed)

    def _entry(
        self,
        law: LawName,
        adapter: Adapter,
        row: Array,
        row_index: int,
        column: int,
        values: Array,
        seed: int,
    ) -> EntryCheck:
        norm = float(np.linalg.norm(row))
        level = _BAND_LEVEL / len(self._last)
        if law == "gaussian":
            stated = EntryNoise(adapter.rank, norm, float(row[column]))
            reference = "exact"
        else:
            stated = EmpiricalNoise(
                law, adapter.rank, row, column, 10 * len(values), np.random.default_rng(seed)
            )
            reference = "simulated"
            level /= 2  # both sides are empirical: two bands, at half the level each, add up
        band = math.sqrt(math.log(2 / level) / (2 * len(values)))
        if reference == "simulated":
            band *= 1 + math.sqrt(0.1)
        # Even steps of a Gaussian's quantiles: tails are where the laws differ.
        levels = stats.norm.cdf(np.linspace(-3.0, 3.0, _QUANTILES))
        deviation = float(stated.std())
        return EntryCheck(
            row=row_index,
            column=column,
            cosine=float(row[column]) / norm,
            draws=len(values),
            distance=float(stats.kstest(values, stated.cdf).statistic),
            band=band,
            reference=reference,
            observed=tuple((np.quantile(values, levels) / deviation).tolist()),
            expected=tuple((np.asarray(stated.ppf(levels)) / deviation).tolist()),
            normal=tuple(stats.norm.ppf(levels).tolist()),
        )


def _spread(gradient: Array, adapter: Adapter, sampled: float) -> float:
    """Relative standard deviation of the noise energy for one draw of A."""
    if adapter.law.name not in ("gaussian", "orthonormal"):  # not rotation invariant
        return sampled
    variance = noise_energy_variance(gradient, adapter.law, adapter.rank)
    return math.sqrt(variance) / expected_noise_energy(gradient, adapter.law, adapter.rank)
