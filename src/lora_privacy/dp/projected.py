"""The Gaussian behind a fresh random projection: one step of noise that A amplifies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _majorant, _projected_rdp
from lora_privacy.dp._checks import (
    check_noise_multiplier,
    check_sample_rate,
    checked_delta,
    checked_epsilon,
    checked_orders,
)
from lora_privacy.dp._conversion import least_epsilon, least_log_delta
from lora_privacy.dp._profiles import DIRECTIONS, Direction, Profile
from lora_privacy.dp.result import (
    ADJACENCIES,
    GAUSSIAN_NOISE,
    POISSON_SAMPLED,
    Adjacency,
    PrivacyBound,
)
from lora_privacy.errors import UnsupportedEventError

__all__ = ["ProjectedGaussian"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_EPSILON_RTOL = 1e-10
_LARGEST_EPSILON = 1e300
_MAX_KNOTS = 2048  # of a profile; a tenth of a second


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

    layers: Sequence[tuple[int, int]]
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
        sampled = (POISSON_SAMPLED,) if self.sample_rate < 1 else ()
        return (
            "each record's gradient over all layers is clipped by its full Frobenius norm",
            *sampled,
            GAUSSIAN_NOISE,
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
            adjacency: Under ``"replace"`` a record moves V by 2C; with sampling there is no proof
                for Rényi divergences, but there is a ``profile``.

        Raises:
            ValueError: An order is out of range.
            UnsupportedEventError: There is no proof under this adjacency.
        """
        wanted = checked_orders(orders)
        refuse_unproved(self, adjacency)
        noise = self._effective_noise(adjacency)
        moments = _projected_rdp.log_moment(self.layers, noise, self.sample_rate, wanted)
        with np.errstate(over="ignore"):
            return np.nextafter(moments / (wanted - 1) * (1 + 4 * _EPS), np.inf)

    def profile(self, direction: Direction, *, adjacency: Adjacency = "add-remove") -> Profile:
        """Upper bound of δ at each ε >= 0 for every record, or pair of records, in one step.

        It dominates one step whatever the record, so accountants of loss distributions may compose
        it: the greatest convex minorant of it is the profile of one dominating pair.

        Args:
            direction: ``"remove"``: record in, against record out; ``"add"``: the reverse.
            adjacency: Under ``"replace"`` both directions have the same profile.

        Raises:
            ValueError: ``direction`` or ``adjacency`` is none; from the profile, an ε is negative
                or not finite.
        """
        _validate.choice("direction", direction, DIRECTIONS)
        _validate.choice("adjacency", adjacency, ADJACENCIES)

        def upper(epsilons: Array, /) -> Array:
            wanted = np.asarray(epsilons, dtype=np.float64)
            if not np.all((wanted >= 0) & np.isfinite(wanted)):
                raise ValueError(f"epsilons must be finite and at least 0, got {epsilons!r}.")
            return self._curve(direction, adjacency, wanted.ravel()).reshape(wanted.shape)

        return upper

    def delta(self, epsilon: float, *, adjacency: Adjacency = "add-remove") -> PrivacyBound:
        """Smallest δ proved for one step at ``epsilon``, rounded up; ``method`` says by what.

        Raises:
            ValueError: ``epsilon`` is negative, infinite or NaN.
        """
        noise, epsilon = self._effective_noise(adjacency), checked_epsilon(epsilon)
        value, method = self._exact(adjacency, epsilon)
        if _has_rdp(self, adjacency):
            low = least_log_delta(self._cost(adjacency), self._start(noise), epsilon, None)[0]
            if low < math.log(value):
                value, method = math.nextafter(math.exp(low), 2.0), "rdp"
        return self._bound(epsilon, min(value, 1.0), adjacency, method)

    def epsilon(self, delta: float, *, adjacency: Adjacency = "add-remove") -> PrivacyBound:
        """Smallest ε proved for one step at ``delta``, rounded up; ``method`` says by what.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
        """
        noise, delta = self._effective_noise(adjacency), checked_delta(delta)
        value, method = self._search(adjacency, delta)
        if _has_rdp(self, adjacency):
            other = least_epsilon(self._cost(adjacency), self._start(noise), delta, None)[0]
            if other < value:
                value, method = float(other), "rdp"
        return self._bound(value, delta, adjacency, method)

    def _search(self, adjacency: Adjacency, delta: float) -> tuple[float, str]:
        """Smallest ε at which the profile is at most ``delta``, and the bound that says so."""
        value, method = self._exact(adjacency, 0.0)
        if value <= delta:
            return 0.0, method
        low, high = 0.0, 1.0
        value, method = self._exact(adjacency, high)
        while value > delta:
            low, high = high, 4 * high
            if high > _LARGEST_EPSILON:
                return math.inf, "convex majorant"
            value, method = self._exact(adjacency, high)
        while high - low > _EPSILON_RTOL * high:
            middle = (low + high) / 2
            value, label = self._exact(adjacency, middle)
            if value <= delta:
                high, method = middle, label
            else:
                low = middle
        return high, method

    def _exact(self, adjacency: Adjacency, epsilon: float) -> tuple[float, str]:
        """δ at one ε, the larger of both directions, and the bound that says so."""
        at = np.array([epsilon])
        value, method = 0.0, "convex majorant"
        same = self.sample_rate == 1 or adjacency == "replace"
        for direction in DIRECTIONS[:1] if same else DIRECTIONS:
            found, plain = self._upper(direction, adjacency, at, _majorant.FINE)
            if found[0] > value:
                value = float(found[0])
                method = "convex majorant" if found[0] < plain[0] else "plain Gaussian"
        return value, method

    def _upper(
        self, direction: Direction, adjacency: Adjacency, epsilons: Array, size: int
    ) -> tuple[Array, Array]:
        """Bounds of the profile, with the projection and without; see ``_majorant``."""
        of = self.layers, self.noise_multiplier, self.sample_rate
        if adjacency == "replace":
            return _majorant.replaced_profile(*of, epsilons, size)
        return _majorant.upper_profile(*of, direction, epsilons, size)

    def _curve(self, direction: Direction, adjacency: Adjacency, epsilons: Array) -> Array:
        """The profile at many ε; where they are very many, chords of it in e^ε."""
        knots = epsilons
        if len(epsilons) > _MAX_KNOTS:
            knots = np.unique(epsilons)
            if len(knots) > _MAX_KNOTS:
                knots = knots[np.linspace(0, len(knots) - 1, _MAX_KNOTS).astype(np.intp)]
        values, _ = self._upper(direction, adjacency, knots, _majorant.COARSE)
        if knots is epsilons:
            return values
        # The true worst case is convex in e^ε, so chords of an upper bound are above it.
        after = np.clip(np.searchsorted(knots, epsilons), 1, len(knots) - 1)
        low, high = knots[after - 1], knots[after]
        share = np.exp(epsilons - high) * np.expm1(low - epsilons) / np.expm1(low - high)
        chord = values[after - 1] + share * (values[after] - values[after - 1])
        return np.minimum(1.0, chord * (1 + 16 * _EPS))

    def _cost(self, adjacency: Adjacency) -> Callable[[npt.NDArray[np.int64], Array], Array]:
        return lambda _rows, orders: self.rdp(orders, adjacency=adjacency)

    def _start(self, noise: float) -> Array:
        """Divergence at order 1 without sampling, about: where the search over orders starts."""
        share = max(rank / features for features, rank in self.layers)
        return np.array([min(max(0.5 * share / noise / noise, 1e-300), 1e300)])

    def _bound(
        self, epsilon: float, delta: float, adjacency: Adjacency, method: str
    ) -> PrivacyBound:
        reason = None
        if math.isinf(epsilon):
            reason = "no ε below 1e300 is proved: the noise is too small for double precision."
        elif delta == 1:
            reason = f"no δ below 1 is proved at ε = {epsilon!r}."
        references = self.references
        if not _has_rdp(self, adjacency):
            references = (*references, "balle-subsampling-2018")
        if method == "rdp":
            references = (*references, "canonne-discrete-2020")
        return PrivacyBound(
            epsilon=epsilon,
            delta=delta,
            adjacency=adjacency,
            method=method,
            assumptions=self.assumptions,
            references=references,
            reason=reason,
        )

    def _effective_noise(self, adjacency: Adjacency) -> float:
        """Noise in units of the largest norm by which V can move."""
        _validate.choice("adjacency", adjacency, ADJACENCIES)
        return self.noise_multiplier / (2.0 if adjacency == "replace" else 1.0)


def refuse_unproved(event: ProjectedGaussian, adjacency: Adjacency) -> None:
    """Raise UnsupportedEventError where Rényi divergences have no proof: replace with sampling.

    ValueError for no adjacency.
    """
    _validate.choice("adjacency", adjacency, ADJACENCIES)
    if not _has_rdp(event, adjacency):
        raise UnsupportedEventError(
            "There is no proof for ProjectedGaussian with sample_rate < 1 under "
            "adjacency='replace' by Rényi divergences: the sampled formula is for adding or "
            "removing one record. Use PldAccountant, which has a proof, or "
            "adjacency='add-remove'."
        )


def _has_rdp(event: ProjectedGaussian, adjacency: Adjacency) -> bool:
    return adjacency == "add-remove" or event.sample_rate == 1


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
