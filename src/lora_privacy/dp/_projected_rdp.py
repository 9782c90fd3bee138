"""Moments of the projected Gaussian: sound upper ends at integer and fractional orders.

Everything here is an upper end of log A(α) = (α - 1) ε_α, the worst case over all records and
layers. Without sampling A(α) is ₁F₁(r/2; m/2; α(α-1)/(2z²)), with sampling a binomial sum of such
values at whole orders; proofs in docs/theory/projected-gaussian.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp import _moments
from lora_privacy.dp._hyp1f1 import log_excess
from lora_privacy.errors import ConvergenceError

Array = npt.NDArray[np.float64]
Layers = Sequence[tuple[int, int]]

MAX_SUMMED_ORDER = 1 << 14  # above it the bound by convexity in the mixture is used
_EPS = float(np.finfo(np.float64).eps)
_BLOCK = 1 << 18  # elements of one work array


def log_moment(
    layers: Layers, noise_multiplier: float, sample_rate: float, orders: Array
) -> Array:
    """Upper ends of log A, of the shape of ``orders``; ``inf`` where double precision ends.

    Args:
        layers: ``(in_features, rank)`` of each layer.
        noise_multiplier: z = σ/C, > 0; under replace, half of it.
        sample_rate: p, in (0, 1].
        orders: > 1.
    """
    flat, shapes = orders.ravel(), sorted(set(layers))
    # The moment is linear in the share of a record's squared norm that a layer holds, so one layer
    # is worst, and which one depends on the order.
    argument = _argument(noise_multiplier, flat)
    excess = np.max([log_excess(*shape, argument) for shape in shapes], axis=0)
    if sample_rate == 1:
        result = np.logaddexp(0.0, excess)
    else:
        result = _sampled(shapes, noise_multiplier, sample_rate, flat, excess)
    if np.isnan(result).any():
        raise ConvergenceError("A projected divergence came out as NaN; please report it.")
    return (result * (1 + 4 * _EPS)).reshape(orders.shape)


def _sampled(
    shapes: list[tuple[int, int]], z: float, p: float, orders: Array, excess: Array
) -> Array:
    """Log A under Poisson sampling; ``excess`` is log(A - 1) without."""
    # A is convex in the mixture (1-p) P + p Q, so it is at most 1 - p + p A without sampling.
    plain = excess + math.log(p)
    result = np.logaddexp(0.0, plain + 4 * _EPS * (1 + np.abs(plain)))
    summed = orders <= MAX_SUMMED_ORDER
    if summed.any():
        result[summed] = np.minimum(result[summed], _chords(shapes, z, p, orders[summed]))
    if 1e-150 < z < 1e150:
        # A projection never costs; at fractional orders this can be below the chord.
        known = _moments.log_moment(np.array([z]), p, orders[None, :])
        result = np.minimum(result, known[0])
    return result


def _chords(shapes: list[tuple[int, int]], z: float, p: float, orders: Array) -> Array:
    """Log A at whole orders, and its chords between them: log A of one record is convex.

    A record over two layers is bounded by the larger layer at either end of a chord, and that need
    not be the same one; so the maximum is taken before the chord, never of the layers' chords.
    """
    low = np.floor(orders)
    whole = np.unique(np.concatenate([low, np.ceil(orders)])).astype(np.int64)
    values = np.zeros(whole[-1] + 1)  # log A(1) = 0
    whole = whole[whole > 1]
    values[whole] = np.max(
        [_binomial_sum(_table(*shape, z, int(whole[-1])), p, whole) for shape in shapes], axis=0
    )
    share = orders - low
    below = low.astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    with np.errstate(invalid="ignore"):  # inf times a share of 0
        chord = (1 - share) * values[below] + share * values[above]
    return np.where(share > 0, chord, values[below])


def _binomial_sum(table: Array, p: float, orders: npt.NDArray[np.int64]) -> Array:
    """Log A at whole ``orders`` > 1; ``table`` holds log(F_k - 1) at index k.

    A - 1 = Σ_{k≥2} C(α,k) (1-p)^{α-k} p^k (F_k - 1), all terms positive, with F_k = ₁F₁ at
    k(k-1)/(2z²): F_0 = F_1 = 1 cancel against Σ_k C(α,k) (1-p)^{α-k} p^k = 1.
    """
    top = int(orders.max())
    if len(orders) > 1 and len(orders) * top > _BLOCK:
        half = len(orders) // 2
        return np.concatenate(
            [_binomial_sum(table, p, orders[:half]), _binomial_sum(table, p, orders[half:])]
        )
    log_factorial = special.gammaln(np.arange(1.0, top + 2))
    # It is inf where an argument overflowed.
    value = _moments.log_binomial_sum(orders, p, table[2 : top + 1], log_factorial)
    # Each term is off by a few eps of its largest summand.
    log_weights = orders * (math.log(p) + math.log1p(-p))
    largest = np.abs(table[orders]) + log_factorial[orders] - log_weights
    return np.logaddexp(0.0, value + _EPS * (16 + 8 * (np.abs(table[2]) + largest)))


def _table(features: int, rank: int, z: float, top: int) -> Array:
    """log(F_k - 1) at index k = 2..top, at least; cached by powers of two of the length."""
    return _power_table(features, rank, z, max(6, math.ceil(math.log2(top + 1))))


@functools.lru_cache(maxsize=32)
def _power_table(features: int, rank: int, z: float, octaves: int) -> Array:
    """Values at k = 0 ... 2^octaves - 1: a search over orders asks for the same ones again."""
    table = np.full(1 << octaves, -np.inf)
    table[2:] = log_excess(features, rank, _argument(z, np.arange(2.0, len(table))))
    table.flags.writeable = False
    return table


def _argument(z: float, orders: Array) -> Array:
    """Upper ends of α(α-1)/(2z²)."""
    with np.errstate(over="ignore"):
        return orders / z * ((orders - 1) / z) * (0.5 + 4 * _EPS)
