"""The ε one reads off a projection's noise when it is taken for DP-SGD's. Not a guarantee.

The derivation, and why it proves nothing, is in docs/theory/implicit-privacy.md. "P1" is
arXiv:2409.17538, versions 2-3; later versions under that number are other papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_privacy import _validate
from lora_privacy.dp.events import SampledGaussian
from lora_privacy.dp.rdp import RdpAccountant
from lora_privacy.dp.result import AGGREGATIONS, Aggregation, ImpliedPrivacy
from lora_privacy.laws import distortion_probability

__all__ = ["implied_noise_multiplier", "implied_privacy"]

_REFERENCES = (
    "p1-implicit-2024",
    "p2-projections-2026",
    "matousek-jl-2008",
    "mironov-sampled-2019",
    "canonne-discrete-2020",
)
_FAILING = (
    "the noise is not Gaussian: the gradient times the transposed noise is a symmetric matrix "
    "surely, so the joint total variation to independent Gaussian noise is 1 at every rank as "
    "soon as two rows of the gradient are non-zero",
    "one draw of A multiplies all samples, all rows and all steps, so their noises are not "
    "independent and can cancel exactly",
    "the noise is a function of the private data: it vanishes with the gradient, and the update "
    "has rank at most r",
    "rescaled rows depend on A, so the moments of the noise and the distortion event hold for "
    "them only approximately",
    "batches are shuffled, not Poisson samples, in the usual training loop, and the noise "
    "depends on the realised batch size",
    "noise-free projection of a matrix gradient is proved not differentially private for any "
    "finite ε and any δ < 1",
)


def implied_noise_multiplier(
    *,
    rank: int,
    out_features: int,
    batch_size: int,
    distortion: float,
    aggregation: Aggregation = "independent",
) -> float:
    """Noise multiplier that one layer's projection noise is read as. Heuristic, not a guarantee.

    ``√(b/(n r)) · (1-τ)/(1+τ)`` if the noises of the b samples of a batch were independent,
    ``b/√(n r) · (1-τ)/(1+τ)`` if they all pointed the same way, with every row norm at its lower
    end and the variance taken as ‖q‖²/r. Neither is a lower bound: one A multiplies all samples,
    and gradients that cancel leave no noise.

    Args:
        rank: Rows r of A, at least 1.
        out_features: Rows n of the layer's gradient, at least 1.
        batch_size: Samples b in a batch, at least 1.
        distortion: τ >= 0: norms of rows change by a factor within [1-τ, 1+τ]. There is no
            default: 0 gives the most flattering number and has probability 0.
        aggregation: How the noises of a batch are taken to add up.

    Returns:
        Dimensionless, >= 0; exactly 0 when ``distortion >= 1``, where the clip norm has no bound.

    Raises:
        ValueError: An argument is out of range or NaN.
        TypeError: A size is no integer.

    >>> round(implied_noise_multiplier(rank=8, out_features=768, batch_size=32, distortion=0), 4)
    0.0722
    """
    rank = _validate.integer("rank", rank, 1)
    rows = _validate.integer("out_features", out_features, 1)
    batch = _validate.integer("batch_size", batch_size, 1)
    _check_distortion(distortion)
    _validate.choice("aggregation", aggregation, AGGREGATIONS)
    added = math.sqrt(batch) if aggregation == "independent" else float(batch)
    return added / math.sqrt(rows * rank) * max(1 - distortion, 0.0) / (1 + distortion)


def implied_privacy(
    *,
    layers: Sequence[tuple[int, int]],
    batch_size: int,
    dataset_size: int,
    steps: int,
    delta: float,
    distortion: float,
    aggregation: Aggregation = "independent",
) -> ImpliedPrivacy:
    """The ε that an accountant would print for a run without noise, by P1's reading of it.

    Args:
        layers: ``(out_features, rank)`` of each adapted layer, rows of its gradient first.
        batch_size: Samples in a batch, at least 1.
        dataset_size: Records, at least ``batch_size``.
        steps: Optimizer steps, at least 1.
        delta: δ handed to the accountant, in (0, 1).
        distortion: τ >= 0, as in ``implied_noise_multiplier``; its failure probability is
            returned beside ε and is not part of δ.
        aggregation: As in ``implied_noise_multiplier``.

    Raises:
        ValueError: An argument is out of range or NaN, or there is no layer.
        TypeError: A size is no integer.

    >>> reading = implied_privacy(layers=[(768, 8)], batch_size=32, dataset_size=3200, steps=100,
    ...                           delta=1e-5, distortion=0.5)
    >>> print(str(reading)[:16], reading.failure_probability)
    Not a guarantee. 1.0
    """
    shapes = _checked_layers(layers)
    batch = _validate.integer("batch_size", batch_size, 1)
    records = _validate.integer(
        "dataset_size", dataset_size, batch, "A batch cannot exceed the data set."
    )
    steps = _validate.integer("steps", steps, 1)
    _validate.inside("delta", delta, 0, 1)
    _check_distortion(distortion)
    multipliers = [
        implied_noise_multiplier(
            rank=rank,
            out_features=rows,
            batch_size=batch,
            distortion=distortion,
            aggregation=aggregation,
        )
        for rows, rank in shapes
    ]
    per_step = batch * math.fsum(
        rows * distortion_probability(rank, distortion) for rows, rank in shapes
    )
    if distortion >= 1:
        multiplier, epsilon = 0.0, math.inf
        reason = (
            f"a distortion of {distortion:g} bounds no clip norm, so the implied noise "
            "multiplier is 0"
        )
    else:
        # Standardised, the layers are one Gaussian shift with squared length Σ z_l⁻².
        multiplier = 1 / math.hypot(*(1 / z for z in multipliers))
        event = SampledGaussian(multiplier, batch / records)
        bound = RdpAccountant().compose(event, steps).epsilon(delta)
        epsilon, reason = bound.epsilon, bound.reason
    return ImpliedPrivacy(
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=multiplier,
        sample_rate=batch / records,
        steps=steps,
        distortion=distortion,
        failure_probability=min(1.0, steps * per_step),
        failure_probability_per_step=min(1.0, per_step),
        aggregation=aggregation,
        layers=shapes,
        failing_assumptions=_FAILING,
        references=_REFERENCES,
        reason=reason,
    )


def _check_distortion(distortion: float) -> None:
    hint = "It is the τ in (1-τ)‖x‖ ≤ ‖Ax‖ ≤ (1+τ)‖x‖ that you are ready to assume for every row."
    _validate.at_least("distortion", distortion, 0, hint)


def _checked_layers(layers: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    shapes: list[tuple[int, int]] = []
    for layer in layers:
        if len(layer) != 2:
            raise ValueError(f"each layer must be a pair (out_features, rank), got {layer!r}.")
        rows, rank = layer
        shapes.append(
            (_validate.integer("out_features", rows, 1), _validate.integer("rank", rank, 1))
        )
    if not shapes:
        raise ValueError("layers must name at least one (out_features, rank), got none.")
    return tuple(shapes)
