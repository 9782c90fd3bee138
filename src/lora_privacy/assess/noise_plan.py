"""The noise that a private run adds, or that a run without noise would need for a target ε."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lora_privacy.dp import (
    PldAccountant,
    PrivacyBound,
    ProjectedGaussian,
    SampledGaussian,
    calibrate,
)

__all__ = ["NoisePlan", "plan_noise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePlan:
    """Noise of one run: what it adds at every step, and for how many steps.

    Attributes:
        noise_multiplier: z, the standard deviation of the noise over the clipping norm.
        sample_rate: q, the probability that a record takes part in a step.
        steps: Number of steps.
        projected: ``(in_features, rank)`` of every layer that is released through a fresh A;
            empty where the clipped gradient itself is.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    projected: tuple[tuple[int, int], ...] = ()

    def event(self) -> SampledGaussian | ProjectedGaussian:
        """One step."""
        return _event(self.noise_multiplier, self.sample_rate, self.projected)

    def accountant(self) -> PldAccountant:
        """An accountant that has paid for all steps."""
        return _accountant(self)

    def bound(self, delta: float) -> PrivacyBound:
        """The proved ε of all steps at ``delta``."""
        return self.accountant().epsilon(delta)


@lru_cache
def plan_noise(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    projected: tuple[tuple[int, int], ...] = (),
) -> NoisePlan:
    """The least noise with which ``steps`` steps cost at most ``epsilon``.

    Raises:
        CalibrationError: No noise within reach meets the target.
    """
    found = calibrate(
        lambda z: _event(z, sample_rate, projected), epsilon=epsilon, delta=delta, steps=steps
    )
    return NoisePlan(
        noise_multiplier=found.value, sample_rate=sample_rate, steps=steps, projected=projected
    )


def _event(
    noise_multiplier: float, sample_rate: float, projected: tuple[tuple[int, int], ...]
) -> SampledGaussian | ProjectedGaussian:
    if projected:
        return ProjectedGaussian(projected, noise_multiplier, sample_rate)
    return SampledGaussian(noise_multiplier, sample_rate)


@lru_cache
def _accountant(plan: NoisePlan) -> PldAccountant:
    """Composition takes seconds for a projected event: once for each plan."""
    return PldAccountant().compose(plan.event(), plan.steps)
