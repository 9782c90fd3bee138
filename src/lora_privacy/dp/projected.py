"""The Gaussian behind a fresh random projection: one step of noise that A amplifies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _projected_rdp
from lora_privacy.dp._checks import check_noise_multiplier, check_sample_rate
from lora_privacy.dp.result import ADJACENCIES, Adjacency
from lora_privacy.errors import UnsupportedEventError

__all__ = ["ProjectedGaussian"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class ProjectedGaussian:
    """One release of (V + E) Aᵀ, with A drawn anew for this release and public.

    V is the sum of the gradients of a Poisson sample of the records, each clipped to ‖G_i‖_F <= C
    over all layers together; E is i.i.d. Gaussian noise of standard deviation zC of the shape of
    V. What A does not see is not released, which is why this costs less than ``SampledGaussian``.
    The event *means* all of the following; nothing switches one of them off:

    (i) A is drawn anew at every step, after and independently of the forward pass, the data and
        the sampling, from a seed that is not fixed before the data set is, is never used again,
        and from which neither E nor the sampling can be told;
    (ii) its row space is Haar: Gaussian or orthonormal A, neither uniform nor Rademacher;
    (iii) the clip is per record by the full ‖G_i‖_F, never by ‖G_i Aᵀ‖, and no transform before it
        looks at A;
    (iv) B is folded into the weights and reset at every step, so no gradient depends on A;
    (v) every trained parameter is projected, the head included; biases and norms are frozen.

    Anything else (a frozen A, a new A every several steps, the momentum form) is
    ``SampledGaussian`` for all steps.

    Args:
        layers: ``(in_features, rank)`` of each layer, rank at most in_features.
        noise_multiplier: z = σ/C, positive and finite.
        sample_rate: Probability that a record takes part, in (0, 1].

    Raises:
        ValueError: An argument is out of range or NaN, or there is no layer.
        TypeError: A size is no integer, or ``layers`` is no sequence of pairs.

    References:
        arXiv:2601.21719, small-rank regime; closed forms, worst case and proofs in
        docs/theory/projected-gaussian.md.

    >>> event = ProjectedGaussian(layers=[(768, 8)], noise_multiplier=1.0)
    >>> event.rdp([2.0]) < 0.02  # 1.0 without the projection
    array([ True])
    """

    layers: tuple[tuple[int, int], ...]
    noise_multiplier: float
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_sample_rate(self.sample_rate)
        # A float32 scalar would carry its rounding through the whole account.
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must be true of the run, one sentence each; the class says it in full."""
        sampled = ("batches are Poisson samples that stay secret",) if self.sample_rate < 1 else ()
        return (
            "each record's gradient over all layers is clipped by its full Frobenius norm",
            *sampled,
            "the noise is Gaussian, fresh for each release and unknown to others",
            "A is drawn anew for each release, independently of data, sampling and noise",
            "the row space of A is Haar: A is Gaussian or orthonormal",
            "no gradient depends on A: B is folded and reset at every release",
            "every trained parameter is projected",
        )

    @property
    def references(self) -> tuple[str, ...]:
        """Keys into ``lora_privacy.references``."""
        sampled = ("mironov-sampled-2019",) if self.sample_rate < 1 else ()
        return ("p2-projections-2026", "mironov-rdp-2017", *sampled)

    def rdp(self, orders: npt.ArrayLike, *, adjacency: Adjacency = "add-remove") -> Array:
        """Rényi divergences, the worst case over all records, in nats, rounded up.

        Under Poisson sampling exact at whole orders up to 16,384 for the worst record, in both
        directions; between them the chord of (α-1) ε_α, which is convex.

        Args:
            orders: Rényi orders, any shape, finite and > 1.
            adjacency: Under ``"replace"`` a record moves V by 2C; not with sampling.

        Raises:
            ValueError: An order is out of range.
            UnsupportedEventError: There is no proof under this adjacency.
        """
        wanted = np.asarray(orders, dtype=np.float64)
        if not np.all((wanted > 1) & np.isfinite(wanted)):
            raise ValueError(f"orders must be finite and above 1, got {orders!r}.")
        noise = self._effective_noise(adjacency)
        moments = _projected_rdp.log_moment(self.layers, noise, self.sample_rate, wanted)
        return np.nextafter(moments / (wanted - 1) * (1 + 4 * _EPS), np.inf)

    def _effective_noise(self, adjacency: Adjacency) -> float:
        """Noise in units of the largest norm by which V can move."""
        refuse_unproved(self, adjacency)
        return self.noise_multiplier / (2.0 if adjacency == "replace" else 1.0)


def refuse_unproved(event: ProjectedGaussian, adjacency: Adjacency) -> None:
    """Raise UnsupportedEventError for replace with sampling, ValueError for no adjacency."""
    _validate.choice("adjacency", adjacency, ADJACENCIES)
    if adjacency == "replace" and event.sample_rate < 1:
        raise UnsupportedEventError(
            "There is no proof for ProjectedGaussian with sample_rate < 1 under "
            "adjacency='replace': the sampled formula is for adding or removing one record. Use "
            "adjacency='add-remove'."
        )


def _checked_layers(layers: object) -> tuple[tuple[int, int], ...]:
    hint = "Give (in_features, rank) of each projected layer."
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of pairs, got {layers!r}. {hint}")
    found: list[tuple[int, int]] = []
    for layer in cast("Iterable[object]", layers):
        try:
            features, rank = cast("Iterable[int]", layer)
        except (TypeError, ValueError):
            raise TypeError(f"layers must hold pairs, got {layer!r}. {hint}") from None
        features = _validate.integer("in_features", features, 1, hint)
        rank = _validate.integer("rank", rank, 1, hint)
        if rank > features:
            raise ValueError(
                f"rank must be at most in_features, got rank {rank} of {features}. A rank that "
                "large projects nothing away: give rank = in_features."
            )
        found.append((features, rank))
    if not found:
        raise ValueError(f"layers must name at least one layer, got none. {hint}")
    return tuple(found)
