"""What is proved of a run, what a noise-free one is read to imply, and what privacy would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_privacy.dp import Aggregation, ImpliedPrivacy, PrivacyBound, implied_privacy
from lora_privacy.noise import jl_distortion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.noise_plan import NoisePlan

__all__ = ["Readings", "plain_readings", "private_readings"]

_FAILURE = 0.05
_PUBLIC = (
    "the number of records and the names of the classes are public: sampling rate, steps, noise "
    "and the width of the head are computed from them"
)
_NO_NOISE = (
    "no noise was added: the projection of a matrix gradient without noise is not (ε, δ)-private "
    "for any finite ε and any δ < 1."
)
_NO_NOISE_AT_ALL = (
    "no noise was added: an update is a function of the gradients, which one record changes."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The privacy statements on one run; ``MethodResult`` says what each is."""

    proved: PrivacyBound
    implied: ImpliedPrivacy | None = None
    flattering: ImpliedPrivacy | None = None
    price: NoisePlan | None = None


def private_readings(plan: NoisePlan, delta: float, assumptions: tuple[str, ...]) -> Readings:
    """What is proved of a run that added the noise of ``plan``, under ``assumptions``."""
    stated = assumptions if _PUBLIC in assumptions else (*assumptions, _PUBLIC)
    proved = replace(plan.bound(delta), assumptions=stated)
    return Readings(proved=proved, price=plan)


def plain_readings(
    config: AssessConfig,
    shapes: Sequence[tuple[int, int]],
    examples: int,
    steps: int,
    price: NoisePlan | None,
) -> Readings:
    """What is proved of a run without noise, which is nothing, and what its noise "implies".

    The implied reading takes the noises of a batch as independent and rows as distorted by τ; the
    most flattering one takes them as coherent and undistorted.

    Args:
        config: δ, target ε, batch sizes and distortion.
        shapes: (out_features, rank) of every adapted layer; empty where nothing is projected.
        examples: Size of the training set.
        steps: Optimiser steps taken.
        price: The noise that would buy the target ε.
    """
    proved = PrivacyBound(
        epsilon=math.inf,
        delta=config.delta,
        adjacency="add-remove",
        method="none",
        assumptions=(),
        reason=_NO_NOISE if shapes else _NO_NOISE_AT_ALL,
        references=("p2-projections-2026",),
    )
    if not shapes:
        return Readings(proved=proved, price=price)
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
    return Readings(
        proved=proved,
        implied=reading(distortion, "independent"),
        flattering=reading(0.0, "coherent"),
        price=price,
    )
