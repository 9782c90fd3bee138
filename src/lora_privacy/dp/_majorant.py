"""Upper profiles of the projected Gaussian for every record: expectations of convex majorants.

Given β, the share of a record's squared norm that the projection keeps, one step is a Gaussian
with profile φ(β), increasing in β. With w_i the shares of the singular values of a record and of
the layers, β = Σ w_i β_i, β_i Beta variables with unknown joint law; for convex ψ >= φ,
E φ(β) <= Σ w_i E ψ(β_i) <= max over layers of E ψ(β_l). See docs/theory/projected-gaussian.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._profiles import Direction, mills
from lora_privacy.dp._replaced import ReplacedPair, split
from lora_privacy.errors import ConvergenceError

Array = npt.NDArray[np.float64]
Layers = Sequence[tuple[int, int]]

COARSE, FINE = 11, 14  # log2 of the points on [0, 1]: for profiles, and for one ε
_EPS = float(np.finfo(np.float64).eps)
_SLACK = 1e-9  # relative, for rounding: once they sum up to 1, masses are off by 1e-11
_TINY = 1e-300  # underflow
_ROOTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_BLOCK = 1 << 20  # elements of one work array
_LEFT, _RIGHT = 1e-7, 1e-60  # mass beyond the outermost inner points


def upper_profile(
    layers: Layers,
    noise_multiplier: float,
    sample_rate: float,
    direction: Direction,
    epsilons: Array,
    size: int,
) -> tuple[Array, Array]:
    """Upper bounds of δ at ``epsilons`` >= 0, flat, and of δ without the projection.

    Args:
        layers: ``(in_features, rank)`` of each layer.
        noise_multiplier: z = σ/C, > 0; under replace, half of it.
        sample_rate: p, in (0, 1].
        direction: Of the adjacency, as in ``Profile``.
        epsilons: ε, shape (K,).
        size: log2 of the number of points on [0, 1].
    """
    scale, inner = _inner(sample_rate, direction, epsilons)
    plain = np.minimum(1.0, scale * _gauss(inner, np.array(1 / noise_multiplier))[0] + _TINY)
    shapes = sorted(set(layers))
    if any(rank == features for features, rank in shapes):
        return plain, plain  # β = 1
    found = np.empty(inner.shape)
    rows = max(1, _BLOCK >> size)
    for start in range(0, len(inner), rows):
        part = slice(start, start + rows)
        found[part] = _least(shapes, noise_multiplier, inner[part], size)
    upper = np.minimum(plain, scale * found * (1 + _SLACK) + _TINY)
    if np.isnan(upper).any():
        raise ConvergenceError("A projected profile came out as NaN; please report it.")
    return upper, plain


def replaced_profile(
    layers: Layers, noise_multiplier: float, sample_rate: float, epsilons: Array, size: int
) -> tuple[Array, Array]:
    """``upper_profile`` under replace, where both directions agree.

    Under sampling each split into two Gaussians is a bound, and each of them, of the two records
    and of one record and none, has its majorant: the least over splits that suit some β.
    """
    z, p = noise_multiplier, sample_rate
    if p == 1:
        return upper_profile(layers, z / 2, 1.0, "remove", epsilons, size)
    plain = ReplacedPair(1 / z, p).upper("remove", epsilons)
    upper = plain
    for share in _shares(layers):
        parts = split(math.sqrt(share) / z, p, epsilons)
        far, _ = upper_profile(layers, z / 2, 1.0, "remove", parts.far_epsilon, size)
        near, _ = upper_profile(layers, z, 1.0, "remove", np.abs(parts.near_epsilon), size)
        # Left of 0 it is 1 - e^ε (1 - δ(-ε)), as N(0,1) and N(μ,1) may be swapped.
        below = np.minimum(parts.near_epsilon, 0.0)
        near = np.where(below < 0, np.exp(below) * near - np.expm1(below), near)
        total = parts.far * far + parts.near * near
        upper = np.minimum(upper, p * total * (1 + 16 * _EPS) + _TINY)
    return upper, plain


def _shares(layers: Layers) -> list[float]:
    """Shares β that splits are tried for: the mean, 1, for full rank, and one between them.

    Against 40 of them these cost up to 2 % of δ, at small ε less, in one case 6 %.
    """
    largest = max(rank / features for features, rank in layers)
    return sorted({largest, math.sqrt(largest), 1.0})


def _inner(p: float, direction: Direction, epsilons: Array) -> tuple[Array, Array]:
    """Scale and ε' with profile scale · δ_Gauss(ε'), both rounded towards a larger profile."""
    if p == 1:
        return np.ones(epsilons.shape), epsilons
    if direction == "remove":
        # e^ε' = 1 + (e^ε - 1)/p
        small = np.log1p(np.expm1(np.minimum(epsilons, 1.0)) / p)
        large = epsilons - math.log(p) + np.log1p((p - 1) * np.exp(-epsilons))
        return np.full(epsilons.shape, p), np.where(epsilons < 1, small, large) * (1 - 8 * _EPS)
    # scale = 1 - e^ε (1-p) = e^ε w and e^ε' = p/w, w = p - (1 - e^-ε); 0 from -log(1-p) on.
    w = p + np.expm1(-epsilons) + 4 * _EPS * p
    alive = w > 0
    w = np.where(alive, w, p)
    share = np.expm1(-epsilons) / p
    inner = np.where(share > -0.5, -np.log1p(np.maximum(share, -0.5)), -np.log(w / p))
    scale = np.where(alive, np.exp(np.minimum(epsilons, 700.0)) * w * (1 + 8 * _EPS), 0.0)
    return scale, np.maximum(inner, 0.0) * (1 - 8 * _EPS)


def _least(shapes: list[tuple[int, int]], z: float, epsilons: Array, size: int) -> Array:
    """Least over a few majorants of the largest E ψ over layers, (K,)."""
    grids = [_dilated(features, rank, size) for features, rank in shapes]
    # φ is convex left of β₀ and concave right of it.
    with np.errstate(over="ignore"):
        root = epsilons / (np.hypot(1, epsilons) + 1) * z * (2 * epsilons * z)
    turn = np.minimum(root, 1.0)
    touches = [_best_touch(points, masses, z, epsilons, turn) for points, masses in grids]
    lines = [(touch, *_tangent(epsilons, touch, z)) for touch in touches]
    worst = [np.zeros(epsilons.shape) for _ in lines]
    for points, masses in grids:
        height = np.zeros((len(epsilons), len(points)))
        height[:, 1:] = _gauss(epsilons[:, None], np.sqrt(points[1:]) / z)[0]
        convex = points <= turn[:, None]
        for i, (touch, value, slope) in enumerate(lines):
            line = value[:, None] + slope[:, None] * (points - touch[:, None])
            psi = np.where(convex, np.maximum(height, line), line)
            # β₀ >= 1: φ is convex, its own majorant, and a record of rank one is worst.
            psi = np.where((root < 1)[:, None], psi, height)
            worst[i] = np.maximum(worst[i], psi @ masses)
    return functools.reduce(np.minimum, worst)


def _best_touch(points: Array, masses: Array, z: float, epsilons: Array, turn: Array) -> Array:
    """Where the line touches φ: c in [β₀, 1] with c = E[β | β >= c'], c' the other crossing.

    That is where dE ψ_c / dc = 0; any c in [β₀, 1] is sound.
    """
    mass = np.cumsum(masses[::-1])[::-1]
    mean = np.cumsum((masses * points)[::-1])[::-1]
    # The mean of what is left, clear of points without mass.
    tail = np.clip(mean / np.maximum(mass, 1e-290), points, 1.0)
    low = np.zeros(epsilons.shape, dtype=np.int64)
    high = np.maximum(np.searchsorted(points, turn) - 1, 0)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        touch = np.maximum(tail[middle], turn)
        value, slope = _tangent(epsilons, touch, z)
        at = points[middle]
        curve = _gauss(epsilons, np.sqrt(np.maximum(at, _TINY)) / z)[0]
        below = value + slope * (at - touch) < curve
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    alone = np.maximum(tail[0], turn)
    value, slope = _tangent(epsilons, alone, z)
    # Already at β = 0 the tangent is above φ: then it is a majorant alone, best at the mean.
    return np.where(value < slope * alone, np.maximum(tail[low], turn), alone)


def _tangent(epsilons: Array, touch: Array, z: float) -> tuple[Array, Array]:
    """φ and its derivative at ``touch``, > 0."""
    root = np.sqrt(np.maximum(touch, _TINY))
    value, density = _gauss(epsilons, root / z)
    return value, density / (2 * root * z)  # dμ/dβ = 1/(2 z √β)


def _gauss(epsilons: Array, mu: Array) -> tuple[Array, Array]:
    """δ of N(μ, 1) against N(0, 1) at ε, rounded up, and its derivative in μ.

    Φ(-a) - e^ε Φ(-b), a = ε/μ - μ/2, b = a + μ (Balle & Wang, arXiv:1805.06530, Thm. 8); as
    e^ε φ(b) = φ(a), it is φ(a) (R(a) - R(b)) with Mills' ratio R, which does not overflow.
    """
    with np.errstate(over="ignore"):
        ratio = np.minimum(epsilons / mu, 1e100)
        a, b = ratio - mu / 2, ratio + mu / 2
        density = np.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
        second = density * mills(b)
        first = np.where(a > -1, density * mills(np.maximum(a, -1.0)), special.ndtr(-a))
        value = np.maximum(first - second, 0.0)
        slack = 32 * (first + second) + 8 * (ratio + mu) * (np.abs(a) * value + density)
    return np.minimum(value * (1 + 4 * _EPS) + _EPS * slack, 1.0), density


@functools.lru_cache(maxsize=64)
def _dilated(features: int, rank: int, size: int) -> tuple[Array, Array]:
    """Points on [0, 1] and masses with E ψ(β) <= Σ mass ψ(point) for every increasing convex ψ.

    A mass is the expectation of the hat function of its point, so the sum is that of the chords
    of ψ; what lies right of the last inner point is moved to 1. Linear ψ are exact.
    """
    a, c = rank / 2, (features - rank) / 2
    # 1 - β from its own law keeps its digits where β is close to 1, and β where it is close to 0.
    left = float(special.logit(special.betaincinv(a, c, _LEFT)))
    centre, other = special.betaincinv(a, c, 0.5), special.betaincinv(c, a, 0.5)
    centre = float(special.logit(centre) if centre < other else -special.logit(other))
    # From logit 36 on β is 1 in double precision.
    right = min(float(-special.logit(special.betaincinv(c, a, _RIGHT))), 36.0)
    half = 1 << (size - 1)
    t = np.linspace(left, centre, half, endpoint=False)
    t = np.concatenate([t, np.linspace(centre, right, half)])
    beta: Array = special.expit(t)
    gamma: Array = special.expit(-t)

    share = (1 + _ROOTS) / 2
    beta_at = beta[:-1, None] * (1 - share) + beta[1:, None] * share
    gamma_at = gamma[:-1, None] * (1 - share) + gamma[1:, None] * share
    width = np.where(t[1:] < 0, beta[1:] - beta[:-1], gamma[:-1] - gamma[1:])
    log_density = (a - 1) * np.log(beta_at) + (c - 1) * np.log(gamma_at) - special.betaln(a, c)
    mass = np.exp(log_density + np.log(width)[:, None]) * (_WEIGHTS / 2)
    masses = np.zeros(len(t) + 2)
    masses[1:-2] += mass @ (1 - share)
    masses[2:-1] += mass @ share
    first = float(special.betainc(a, c, beta[0]))
    raised = min(a / (a + c) * float(special.betainc(a + 1, c, beta[0])) / beta[0], first)
    masses[0] += first - raised
    masses[1] += raised
    masses[-1] += float(special.betainc(c, a, gamma[-1]))
    points = np.concatenate([[0.0], beta, [1.0]])
    total, mean = masses.sum(), float(masses @ points) * (a + c) / a
    if not (abs(total - 1) < _SLACK * 3 and abs(mean / total - 1) < _SLACK / 3):
        raise ConvergenceError(
            f"The Beta law of {features} features and rank {rank} lost mass: {total!r}, {mean!r}."
        )
    masses /= total
    points.flags.writeable = masses.flags.writeable = False
    return points, masses
