"""What happened: the releases an accountant can be told about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from lora_privacy.dp._checks import check_noise_multiplier, check_sample_rate
from lora_privacy.dp._profiles import ProfiledEvent
from lora_privacy.dp.projected import ProjectedGaussian
from lora_privacy.dp.result import CLIPPED, GAUSSIAN_NOISE, POISSON_SAMPLED

__all__ = [
    "Event",
    "GaussianEvent",
    "ProjectedGaussian",
    "SampledGaussian",
    "assumptions_of",
    "references_of",
]


@dataclass(frozen=True, slots=True)
class GaussianEvent:
    """One release of a sum over all records plus Gaussian noise.

    Args:
        noise_multiplier: z = σ/C, standard deviation of the noise in units of the largest norm C
            that one record can add to the sum; positive and finite.

    Raises:
        ValueError: ``noise_multiplier`` is out of range or NaN.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """One release of a sum over a Poisson sample of the records, plus Gaussian noise.

    Every record enters by a coin of its own with probability ``sample_rate``, and the size of the
    sample stays secret. Shuffled batches or batches of a fixed size are not this event.

    Args:
        noise_multiplier: z = σ/C, as in ``GaussianEvent``.
        sample_rate: Probability that a record takes part, in (0, 1]; 1 is the plain Gaussian.

    Raises:
        ValueError: An argument is out of range or NaN.
    """

    noise_multiplier: float
    sample_rate: float

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_sample_rate(self.sample_rate)
        # A float32 scalar would carry its rounding through the whole account.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))


Event = GaussianEvent | SampledGaussian | ProjectedGaussian


def assumptions_of(events: Iterable[object]) -> tuple[str, ...]:
    """What must be true of a run of ``events``, each sentence once."""
    events = tuple(events)
    sampled = any(isinstance(event, SampledGaussian) for event in events)
    coin = (POISSON_SAMPLED,) if sampled else ()
    brought = (event.assumptions for event in events if isinstance(event, ProfiledEvent))
    return tuple(dict.fromkeys((CLIPPED, *coin, GAUSSIAN_NOISE, *chain(*brought))))


def references_of(keys: Iterable[str], events: Iterable[object]) -> tuple[str, ...]:
    """``keys`` and those that ``events`` bring, each once."""
    brought = (event.references for event in events if isinstance(event, ProfiledEvent))
    return tuple(dict.fromkeys((*keys, *chain(*brought))))
