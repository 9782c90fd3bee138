"""The three privacy statements on a noise-free method: proved, implied, and most flattering."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_privacy.dp import Aggregation, ImpliedPrivacy, PrivacyBound, implied_privacy
from lora_privacy.noise import jl_distortion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.assess.config import AssessConfig

__all__ = ["privacy_readings"]

_FAILURE = 0.05


def privacy_readings(
    config: AssessConfig, shapes: Sequence[tuple[int, int]], examples: int, steps: int
) -> tuple[PrivacyBound, ImpliedPrivacy, ImpliedPrivacy]:
    """Return (proved bound, implied reading, most flattering reading) for one run.

    The implied reading takes the noises of a batch as independent and rows as distorted by τ; the
    most flattering one takes them as coherent and undistorted.

    Args:
        config: δ, batch size and distortion.
        shapes: (out_features, rank) of every adapted layer.
        examples: Size of the training set.
        steps: Optimiser steps taken.
    """
    proved = PrivacyBound(
        epsilon=math.inf,
        delta=config.delta,
        adjacency="add-remove",
        method="none",
        assumptions=(),
        reason="no noise was added: the projection of a matrix gradient without noise is not "
        "(ε, δ)-private for any finite ε and any δ < 1.",
        references=("p2-projections-2026",),
    )
    batch = min(config.batch_size, examples)

    def reading(distortion: float, aggregation: Aggregation) -> ImpliedPrivacy:
        return implied_privacy(
            layers=list(shapes),
            batch_size=batch,
            dataset_size=examples,
            steps=steps,
            delta=config.delta,
            distortion=distortion,
            aggregation=aggregation,
        )

    distortion = config.distortion
    if distortion is None:
        rows = steps * batch * sum(out for out, _ in shapes)
        distortion = jl_distortion(config.rank, _FAILURE, vectors=rows)
    # No distortion has probability 0, and no batch's noises all point one way.
    return proved, reading(distortion, "independent"), reading(0.0, "coherent")
