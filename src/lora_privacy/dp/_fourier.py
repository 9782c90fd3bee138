"""Sums of independent losses on one grid: δ(ε) with a certified error, however small δ is.

The masses are tilted by e^{λ·loss} before the transform, so that what the query needs is large and
the rounding error of the transform, which is absolute, is small beside it. What wraps around, what
lies beyond the window, and rounding are bounded and added, or subtracted for a lower end. Proofs
are in docs/theory/pld.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from lora_privacy.dp._grid import Measure, profile_at_nodes

__all__ = [
    "MAX_WINDOW",
    "Curve",
    "best_tilt",
    "chernoff_epsilon",
    "coarser_gain",
    "compose",
    "deviation",
    "infinite_mass",
    "log_deltas",
    "log_moments",
    "offsets",
]

Array = npt.NDArray[np.float64]
Spectrum = TypeVar("Spectrum", bound=npt.NDArray[Any])
Part = tuple[Measure, int]
"""A release and how often it happens."""

_EPS = float(np.finfo(np.float64).eps)
MAX_WINDOW = 1 << 20
# Each stage of the transform multiplies by a rounded root of unity and adds: less than 5 units.
_STAGE = 5.0
_SPREADS = np.array([1.0, 2.0, 4.0, 6.0, 8.0, 12.0])  # tilts tried for the tails, in 1/deviation
_TAIL = 1e-9  # mass left outside the window, in the tilted law
_LADDER: Array = np.exp2(np.arange(-30, 61) / 2.0)  # tilts tried for the best: 2^-15 … 2^30
_BLOCK = 1 << 21  # elements of one work array
_TINY = 1e-300  # covers underflow
_CAP = 650.0  # exponents beyond it are not needed: δ is 1 there


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """δ at the grid points of a window, linear in e^ε between them.

    Attributes:
        step: Distance of two grid points.
        first: Index of the first one; its ε is ``first·step + shift``.
        deltas: Bounds of δ(ε).
        upper: Whether they are upper bounds.
        shift: Added to every ε.
    """

    step: float
    first: int
    deltas: Array
    upper: bool
    shift: float = 0.0

    def epsilon(self, delta: float) -> float:
        """ε that ``delta`` allows: an upper end (rounded up), or a lower end (rounded down)."""
        if self.upper:
            within = self.deltas <= delta
            if not within[-1]:
                return math.inf
            if within.all():
                return max(0.0, self._at(0))
            # The last run of allowed points; the curve falls, so it is also the first.
            k = len(within) - int(np.argmin(within[::-1]))
            return max(0.0, self._cross(k - 1, delta) * (1 + 4 * _EPS) + self._slack())
        beyond = np.flatnonzero(self.deltas > delta)
        if not beyond.size:
            return 0.0
        k = int(beyond[-1])
        value = self._at(k) if k + 1 == len(self.deltas) else self._cross(k, delta)
        return max(0.0, value * (1 - 4 * _EPS) - self._slack())

    def delta(self, epsilon: float) -> float:
        """δ at one ε >= 0; outside the window 1 or the last value (upper), or 0 (lower)."""
        place = (epsilon - self.shift) / self.step - self.first
        if place < 0:
            return 1.0 if self.upper else float(self.deltas[0])
        k = math.floor(place)
        if k + 1 >= len(self.deltas):
            return float(self.deltas[-1]) if self.upper else 0.0
        share = math.expm1((place - k) * self.step) / math.expm1(self.step)
        # The place is rounded; a cell is far wider than that.
        margin = 1e-9 + 8 * _EPS * (abs(self.shift) + epsilon) / self.step
        share = share - margin if self.upper else share + margin
        left, right = float(self.deltas[k]), float(self.deltas[k + 1])
        return left + min(1.0, max(0.0, share)) * (right - left)

    def points(self) -> tuple[Array, Array]:
        """ε >= 0 of the grid points, and their δ."""
        indices = np.arange(self.first, self.first + len(self.deltas), dtype=np.float64)
        epsilons = self.step * indices + self.shift
        return epsilons[epsilons >= 0], self.deltas[epsilons >= 0]

    def _at(self, k: int) -> float:
        return (self.first + k) * self.step + self.shift

    def _cross(self, k: int, delta: float) -> float:
        """Where the line from point k to point k+1 passes ``delta``."""
        left, right = float(self.deltas[k]), float(self.deltas[k + 1])
        share = (left - delta) / (left - right)
        return self._at(k) + math.log1p(share * math.expm1(self.step))

    def _slack(self) -> float:
        return 8 * _EPS * (abs(self.shift) + (abs(self.first) + len(self.deltas)) * self.step)


def log_moments(parts: Sequence[Part], tilts: Array) -> Array:
    """Σ count · log Σ mass_k e^{tilt·k·step}, one value a tilt; ``inf`` where it overflows.

    The infinite loss and the offsets are left out.
    """
    first = min(part.first for part, _ in parts)
    longest = max(part.last for part, _ in parts) + 1 - first
    if len(tilts) > 1 and len(tilts) * longest > _BLOCK:
        return np.concatenate([log_moments(parts, tilt) for tilt in tilts[:, None]])
    losses = parts[0][0].step * np.arange(first, first + longest)
    total = np.zeros(len(tilts))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        factors = np.exp(tilts[:, None] * losses)
        for part, count in parts:
            inner = factors[:, part.first - first : part.last - first + 1]
            total += count * np.log(inner @ part.masses)
    return np.where(np.isnan(total), np.inf, total)


def infinite_mass(parts: Sequence[Part]) -> float:
    """Upper bound of the mass of the infinite loss of all parts together."""
    total = math.fsum(count * part.infinite for part, count in parts)
    gain = sum(
        count * math.log(max(1.0, float(part.masses.sum()) + part.infinite))
        for part, count in parts
    )
    return total * math.exp(min(gain, 700.0)) * (1 + 1e-6)


def offsets(parts: Sequence[Part]) -> float:
    """Σ count · offset."""
    return math.fsum(count * part.offset for part, count in parts)


def deviation(parts: Sequence[Part]) -> float:
    """Standard deviation of the sum of the finite losses."""
    return math.sqrt(sum(count * _variance(part, 0.0) for part, count in parts))


def coarser_gain(parts: Sequence[Part], tilt: float) -> float:
    """How much Σ count · log-moment at ``tilt`` would grow on a grid of twice the step.

    An odd loss is then split between its neighbours so that both laws keep their mass. About the
    cost of the present grid, or three times that where the cost is of second order.
    """
    step = parts[0][0].step
    split = (math.exp(min(tilt * step, _CAP)) + math.exp(-step * (1 + tilt))) / (
        1 + math.exp(-step)
    )
    total = 0.0
    for part, count in parts:
        exponent = tilt * step * np.arange(part.first, part.last + 1)
        weights = part.masses * np.exp(np.minimum(exponent, _CAP))
        odd = float(weights[(part.first + 1) % 2 :: 2].sum())
        total += count * math.log1p(odd * (split - 1) / float(weights.sum()))
    return total


def chernoff_epsilon(parts: Sequence[Part], delta: float) -> tuple[float, float]:
    """ε that the moments prove at ``delta``, infinite loss left out, and its tilt."""

    def epsilons(tilts: Array) -> Array:
        return (log_moments(parts, tilts) - math.log(delta) + _log_peak(tilts)) / tilts

    return _least(epsilons)


def best_tilt(parts: Sequence[Part], epsilon: float) -> float:
    """The tilt whose moment proves the least δ at ``epsilon``."""
    return _least(lambda tilts: log_deltas(parts, tilts, epsilon))[1]


def _least(objective: Callable[[Array], Array]) -> tuple[float, float]:
    """Least value on the ladder of tilts, and its tilt; every sixth first, then its neighbours."""
    coarse = 6 * int(np.argmin(objective(_LADDER[::6])))
    near = _LADDER[max(0, coarse - 5) : coarse + 6]
    values = objective(near)
    best = int(np.argmin(values))
    return float(values[best]), float(near[best])


def log_deltas(parts: Sequence[Part], tilts: Array, epsilon: float) -> Array:
    """Logarithm of the δ that each moment proves at ``epsilon``, infinite loss left out."""
    return log_moments(parts, tilts) - tilts * epsilon + _log_peak(tilts)


def compose(parts: Sequence[Part], tilt: float, *, upper: bool) -> Curve | None:
    """The curve δ(ε) of all ``parts`` together, or None if the window would be too large.

    Args:
        parts: Measures on one grid, with counts.
        tilt: λ >= 0; the result is most accurate near the mean of the tilted losses.
        upper: Whether to round up (measures above) or down (measures below).
    """
    step = parts[0][0].step
    window = _window(parts, tilt) if all(part.masses.any() for part, _ in parts) else None
    if window is None:
        return None
    first, size, log_outside, log_right = window
    last = first + size - 1
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    largest = np.ones(size // 2 + 1)
    steps = sum(count for _, count in parts)
    error = _STAGE * _EPS * (math.log2(size) + 2)
    log_scale, drift = 0.0, 0.0
    for part, count in parts:
        exponent = tilt * step * np.arange(part.first, part.last + 1)
        peak = max(0.0, float(exponent[-1]) - _CAP)
        masses = part.masses * np.exp(exponent - peak)
        mass = float(masses.sum())
        log_scale += count * (math.log(mass) + peak)
        folds = len(masses) / size
        drift += count * _EPS * (8 + folds + float(np.abs(exponent).max()) + abs(math.log(mass)))
        transformed = np.fft.rfft(_folded(masses / mass, part.first, size))
        spectrum *= _power(transformed, count)
        largest *= _power(np.abs(transformed) + error, count)

    size_of = np.abs(spectrum)
    rounding = 6 * _EPS * (steps + len(parts))
    lost = np.maximum(largest * (1 + rounding) - size_of, 0.0) + rounding * largest
    lost += error * largest
    noise = (2 * float(lost.sum())) / size * (1 + 1e-6)
    masses = np.roll(np.fft.irfft(spectrum, size), -first % size)
    reach = tilt * step * max(abs(first), abs(last))
    relative = drift + _EPS * (8 * size + 4 * (abs(log_scale) + reach) + 2 * _CAP)
    factor = math.exp(min(relative, 700.0))

    # Back from the tilted law; points with δ = 1 anyway are left out.
    log_weight = log_scale - tilt * step * np.arange(first, last + 1, dtype=np.float64)
    masses = np.maximum(masses + noise, 0.0) if upper else np.maximum(masses - noise, 0.0)
    kept = log_weight <= _CAP
    masses = masses * np.exp(np.minimum(log_weight, _CAP))
    deltas = profile_at_nodes(masses, 0.0, step)
    if upper:
        apart = infinite_mass(parts)
        beyond = math.exp(min(0.0, log_scale - tilt * step * last + log_right))
        deltas = np.where(kept, deltas * factor + (beyond + apart + _TINY), 1.0)
    else:
        # e^{-tilt·y} (1 - e^{-y}) is largest at e^-y = tilt / (1 + tilt).
        wrapped = np.exp(np.minimum(log_weight + _log_peak(np.array([tilt])) + log_outside, _CAP))
        deltas = deltas / factor - 1.01 * wrapped
    deltas = np.clip(deltas, 0.0, 1.0)
    return Curve(step, first, deltas, upper, offsets(parts))


def _folded(masses: Array, first: int, size: int) -> Array:
    """Masses of the losses from ``first`` on by index modulo ``size``."""
    start = first % size
    padded = np.zeros(math.ceil((start + len(masses)) / size) * size)
    padded[start : start + len(masses)] = masses
    return padded.reshape(-1, size).sum(axis=0)


def _power(base: Spectrum, count: int) -> Spectrum:
    """``base ** count`` by squaring: a relative error of 3 eps a factor."""
    result: Any = base if count & 1 else None
    square: Any = base
    while count := count >> 1:
        square = square * square
        if count & 1:
            result = square if result is None else result * square
    return cast("Spectrum", result)


def _log_peak(tilts: Array) -> Array:
    """Logarithm of the largest e^{-λy}(1 - e^{-y}): λ log λ - (1+λ) log(1+λ); 0 at λ = 0."""
    safe = np.maximum(tilts, 1e-300)
    return -np.log1p(tilts) - tilts * np.log1p(1 / safe)


def _variance(part: Measure, tilt: float) -> float:
    """Variance of the tilted loss."""
    losses = part.step * np.arange(part.first, part.last + 1)
    weights = part.masses * np.exp(np.minimum(tilt * losses, _CAP))
    mass = max(float(weights.sum()), 1e-300)
    mean = float(weights @ losses) / mass
    return float(weights @ np.square(losses - mean)) / mass


def _window(parts: Sequence[Part], tilt: float) -> tuple[int, int, float, float] | None:
    """First index, size, and log bounds of the tilted mass outside and to the right of a window.

    Chernoff: P[S >= s] <= e^{Λ(λ+θ) - Λ(λ) - θs} for θ > 0, in the law tilted by λ.
    """
    step = parts[0][0].step
    variance = sum(count * _variance(part, tilt) for part, count in parts)
    theta = _SPREADS / max(math.sqrt(variance), step)
    tilts = np.concatenate([[tilt], tilt + theta, tilt - theta])
    moments = log_moments(parts, tilts)
    if not math.isfinite(moments[0]):
        return None
    longest = max(len(part.masses) for part, _ in parts)
    steps = sum(count for _, count in parts)
    rounding = 1e-6 + _EPS * steps * (2 * longest + 2_000)  # of two moments
    right = moments[1 : len(theta) + 1] - moments[0] + rounding
    left = moments[len(theta) + 1 :] - moments[0] + rounding
    goal = -math.log(_TAIL)
    high = float(np.min((right + goal) / theta))
    low = float(np.max(-(left + goal) / theta))
    if not (math.isfinite(high) and math.isfinite(low)):
        return None
    first = math.floor(low / step) - 1
    needed = math.ceil(high / step) + 2 - first
    if needed > MAX_WINDOW:
        return None
    size = 1 << max(4, (needed - 1).bit_length())
    if needed <= (shorter := 3 * size // 4):
        size = shorter
    last = first + size - 1
    log_right = float(np.min(right - theta * (last + 1) * step))
    log_left = float(np.min(left + theta * (first - 1) * step))
    return first, size, float(np.logaddexp(log_right, log_left)), log_right
