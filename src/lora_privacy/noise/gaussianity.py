"""How far one entry of the injected noise is from a Gaussian: total variation, Kolmogorov, KL.

Exact, up to a stated rounding, for Gaussian A. The theory, with proofs and with the correction
of the published bound, is in ``docs/theory/distance-to-gaussian.md``.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from lora_privacy import _validate
from lora_privacy.errors import ConvergenceError, UnsupportedLawError
from lora_privacy.noise._crossings import cdf_gaps, log_density, log_ratio, signed_crossings
from lora_privacy.noise._rows import Array, nonzero_row
from lora_privacy.noise._stirling import chi_square_entropy
from lora_privacy.noise.distance import Distance, Metric
from lora_privacy.noise.entry import EntryNoise

__all__ = [
    "Distance",
    "Variance",
    "describe",
    "describe_gaussian",
    "kl_to_gaussian",
    "kolmogorov_to_gaussian",
    "maximal_coupling",
    "require_entry_noise",
    "tv_of_entries",
    "tv_to_gaussian",
]

Variance = Literal["exact", "published"]

# Ten distribution functions enter a distance, each accurate to about 1e-14.
_CDF_ERROR = 1e-13
# Relative size of the last Chebyshev coefficients at which interpolation in ρ stops.
_INTERPOLATION_RTOL = 1e-9
_DEGREE = 16
_MAX_HALVINGS = 30
# At most 1/0.15² = 44 entries of a row can have a larger |ρ|; those are computed one by one.
_INTERPOLATE_BELOW = 0.15
# Two quadrature rules must agree to this, and the difference is reported. Typical is 1e-13; the
# spike of rank 1 at ρ = 1 − 1e-12, and values of 1e-14 at rank 10⁷, reach 1e-8.
_KL_RTOL = 1e-7
_COUPLING_BATCH = 1 << 18


def tv_to_gaussian(law: EntryNoise, variance: Variance = "exact") -> Distance:
    """Total variation ½∫|p − φ| between one entry of the noise and a centred Gaussian.

    Args:
        law: Entry of the noise under a Gaussian A.
        variance: Of the Gaussian: ``"exact"`` is the law's own ``(‖q‖² + q_i²)/r``,
            ``"published"`` is ``‖q‖²/r``, which leaves out the entry's own share.

    Raises:
        UnsupportedLawError: The law has no density in closed form.
        ValueError: ``variance`` is not one of the two.
        ConvergenceError: The densities do not cross as often as is proved.

    References:
        P1, Lemma 4.2, asks for this distance; ``docs/theory/distance-to-gaussian.md``, section 1.

    >>> print(round(tv_to_gaussian(EntryNoise(8)).value, 6))
    0.041378
    """
    rho, _ = _normalised(law, variance)
    value = float(_tv(np.array([rho]), law.rank, variance)[0])
    return _distance(law, variance, "total variation", value, _CDF_ERROR)


def kolmogorov_to_gaussian(law: EntryNoise, variance: Variance = "exact") -> Distance:
    """Kolmogorov distance sup|P − Φ| between one entry of the noise and a centred Gaussian.

    The supremum is attained where the densities cross. Arguments and errors are those of
    :func:`tv_to_gaussian`; the distance is never larger.
    """
    rho, _ = _normalised(law, variance)
    value = float(np.abs(_gaps(np.array([rho]), law.rank, variance)).max())
    return _distance(law, variance, "Kolmogorov", value, _CDF_ERROR)


def kl_to_gaussian(law: EntryNoise, variance: Variance = "exact") -> Distance:
    """Relative entropy ∫ p ln(p/φ), in nats, of one entry of the noise to a centred Gaussian.

    This direction is the D of P1, Theorem 4.1; with the exact variance it is the entropy that the
    law lacks. Arguments as in :func:`tv_to_gaussian`.

    Raises:
        ConvergenceError: Two quadrature rules differ by more than 1e-7 relative.
    """
    rho, _ = _normalised(law, variance)
    value, error = _entry_kl(law.rank, rho)
    # Only E ln φ sees the variance of the reference.
    if variance == "published":
        square = rho * rho
        value += 0.5 * (square - math.log1p(square))
    return _distance(law, variance, "KL(law ‖ reference), nats", value, error)


def tv_of_entries(row: npt.ArrayLike, rank: int, variance: Variance = "exact") -> Array:
    """Total variation to a Gaussian for every entry of the noise of one row.

    The distance depends on |q_i|/‖q‖ and the rank alone. Large ratios, few in any row, are
    computed one by one; the others by Chebyshev interpolation in the ratio, on panels that are
    halved until the last coefficients fall below 1e-9 of the distance. That is a measured error,
    not a proved one: the tests hold it against :func:`tv_to_gaussian` to 1e-7 relative.

    Args:
        row: q, shape (m,), in any unit.
        rank: r, at least 1.
        variance: As in :func:`tv_to_gaussian`.

    Returns:
        Shape (m,), dimensionless.

    Raises:
        NonFiniteError: The row holds NaN or infinity.
        ValueError: The row is not a vector, or all zero.
    """
    rank = _validate.integer("rank", rank, 1)
    _validate.choice("variance", variance, ("exact", "published"))
    size = np.abs(nonzero_row(row))
    scaled = size / size.max()  # squares neither overflow nor vanish
    rho, back = np.unique(scaled / np.linalg.norm(scaled), return_inverse=True)
    value = np.empty(rho.size)
    low = rho <= _INTERPOLATE_BELOW
    if np.count_nonzero(low) <= 4 * _DEGREE:
        low[:] = False
    if low.any():
        value[low] = _interpolate(rho[low], rank, variance)
    if not low.all():
        value[~low] = _tv(rho[~low], rank, variance)
    return value[back.reshape(size.shape)]


def maximal_coupling(
    law: EntryNoise,
    rng: np.random.Generator,
    size: int,
    variance: Variance = "exact",
) -> tuple[Array, Array]:
    """Draw pairs of an entry of the noise and a Gaussian that are equal as often as can be.

    P[X ≠ Y] is the total variation of :func:`tv_to_gaussian`, the least that any coupling can
    reach; each coordinate alone has exactly its own law.

    Args:
        law: Law of X, under a Gaussian A.
        rng: Source of all randomness.
        size: Number of pairs, at least 1.
        variance: Of Y, as in :func:`tv_to_gaussian`.

    Returns:
        X and Y, each of shape (size,), in the unit of the law.

    Raises:
        TypeError: ``rng`` is not a generator.

    References:
        P1, Lemma 4.3, with the true distance for its bound.
    """
    if not isinstance(rng, np.random.Generator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}.")
    size = _validate.integer("size", size, 1)
    rho, std = _normalised(law, variance)
    distance = tv_to_gaussian(law, variance).value
    scale = math.copysign(law.norm, law.rho)

    def ratio(at: Array) -> Array:
        return log_ratio(law.rank, np.array(rho), np.array(std), at)

    x = law.rvs(size, random_state=rng) / scale
    y = x.copy()
    # Keep X with probability min(1, φ/p); else draw Y from the rest (φ − p)₊ by rejection.
    open_ = np.flatnonzero(np.log(rng.uniform(size=size)) > -ratio(x))
    while open_.size:
        # In the mean as many as are wanted remain.
        batch = min(int(open_.size / distance), _COUPLING_BATCH)
        draw = std * rng.standard_normal(batch)
        draw = draw[np.log1p(-rng.uniform(size=batch)) > ratio(draw)]
        taken = min(draw.size, open_.size)
        y[open_[:taken]] = draw[:taken]
        open_ = open_[taken:]
    return x * scale, y * scale


def require_entry_noise(law: object) -> EntryNoise:
    """Return ``law`` if it is an :class:`EntryNoise`.

    Raises:
        UnsupportedLawError: It is another law; the message says what to use.
    """
    if not isinstance(law, EntryNoise):
        raise UnsupportedLawError(
            f"an exact distance needs EntryNoise, the law under a Gaussian A, got "
            f"{type(law).__name__}. A sample has no density: use EmpiricalNoise.cdf with its "
            "band() for a Kolmogorov distance, or EntryNoise(rank, norm, coord) for a Gaussian A."
        )
    return law


def _normalised(law: EntryNoise, variance: Variance) -> tuple[float, float]:
    """|ρ| and the Gaussian's standard deviation, both for ‖q‖ = 1."""
    law = require_entry_noise(law)
    _validate.choice("variance", variance, ("exact", "published"))
    rho = abs(law.rho)
    return rho, float(_std(np.float64(rho), law.rank, variance))


def _std(rho: Array | np.float64, rank: int, variance: Variance) -> Array:
    share = rho * rho if variance == "exact" else 0.0 * rho
    return np.sqrt((1.0 + np.asarray(share)) / rank)


def _gaps(rho: Array, rank: int, variance: Variance) -> Array:
    """P − Φ at the crossings of the two densities, where the gap has its extrema."""
    std = _std(rho, rank, variance)
    cuts = signed_crossings(rank, rho, std, matched=variance == "exact")
    return cdf_gaps(rank, rho, std, cuts)


def _tv(rho: Array, rank: int, variance: Variance) -> Array:
    gaps = _gaps(rho, rank, variance)
    return 0.5 * np.abs(np.diff(gaps, axis=1, prepend=0.0, append=0.0)).sum(axis=1)


def _interpolate(rho: Array, rank: int, variance: Variance) -> Array:
    """The distance at sorted ρ, by Chebyshev series on panels that are halved where needed.

    It is even in ρ and smooth, but for one kink in a derivative with the published variance,
    where two crossings merge; the panels crowd there.
    """
    value = np.empty(rho.size)
    nodes = np.cos(np.pi * (np.arange(_DEGREE + 1) + 0.5) / (_DEGREE + 1))
    panels = np.array([[rho[0], rho[-1]]])
    for _ in range(_MAX_HALVINGS):
        # Entries of a panel that holds fewer of them than nodes are computed themselves.
        first, last = (
            np.searchsorted(rho, panels[:, 0]),
            np.searchsorted(rho, panels[:, 1], "right"),
        )
        few = last - first <= _DEGREE
        alone = np.zeros(rho.size, np.bool_)
        for a, b in zip(first[few], last[few], strict=True):
            alone[a:b] = True
        panels, first, last = panels[~few], first[~few], last[~few]
        middle, half = panels.mean(axis=1), np.diff(panels, axis=1)[:, 0] / 2
        points = middle[:, None] + half[:, None] * nodes
        exact = _tv(np.concatenate([rho[alone], points.ravel()]), rank, variance)
        value[alone] = exact[: exact.size - points.size]
        exact = exact[exact.size - points.size :].reshape(points.shape)
        series = np.polynomial.chebyshev.chebfit(nodes, exact.T, _DEGREE)
        size = _INTERPOLATION_RTOL * exact.min(axis=1) + _CDF_ERROR
        good = np.abs(series[-3:]).max(axis=0) <= size
        for i in np.flatnonzero(good):
            inside = slice(first[i], last[i])
            at = (rho[inside] - middle[i]) / half[i]
            value[inside] = np.polynomial.chebyshev.chebval(at, series[:, i])
        low, high = panels[~good].T
        centre = middle[~good]
        panels = np.concatenate([np.stack([low, centre], 1), np.stack([centre, high], 1)])
        if not panels.size:
            return value
    raise ConvergenceError(
        f"the distances of a row at rank {rank} must be resolved within {_MAX_HALVINGS} halvings; "
        "please report this row, and use tv_to_gaussian entry by entry."
    )


def _entry_kl(rank: int, rho: float) -> tuple[float, float]:
    """Relative entropy of an entry to the Gaussian of its own variance, and the error."""
    if rho == 1.0:
        return chi_square_entropy(rank), 1e-14
    std = math.sqrt((1.0 + rho * rho) / rank)
    edges = _kl_panels(rho, std, rank)
    fine, coarse = (_kl_sum(edges, nodes, rank, rho, std) for nodes in (20, 14))
    error = abs(fine - coarse)
    if not error <= _KL_RTOL * fine + 1e-20:
        raise ConvergenceError(
            f"KL at rank={rank}, ρ={rho:.17g} must be accurate to {_KL_RTOL:g} relative, got "
            f"{error / fine:.1e}; please report this law."
        )
    # h itself is known to about 1e-14, so the integrand, h²/2, to 1e-14·h.
    return fine, 4.0 * error + 1e-14 * math.sqrt(2.0 * fine) + 1e-12 * fine


def _kl_panels(rho: float, std: float, rank: int) -> Array:
    """Edges about the Gaussian's bulk, the exponential tails, and the spike at x = −ρ."""
    # The slower tail falls as exp(−r x/(1 + ρ)); where that is below 1e-20 nothing is left.
    end = 14.0 * std + 50.0 * (1.0 + rho) / rank
    # Panels of half a standard deviation in the bulk, and growing outwards.
    bulk = np.concatenate([np.arange(0.0, 14.0, 0.5), 14.0 * 1.1 ** np.arange(0.0, 60.0)]) * std
    spike = std * 2.0 ** np.arange(-48.0, 1.0)
    edges = np.concatenate([-bulk, bulk, [-rho], -rho - spike, -rho + spike])
    return np.unique(np.clip(edges, -end, end))


def _kl_sum(edges: Array, nodes: int, rank: int, rho: float, std: float) -> float:
    """∫ p h = ∫ φ (h eʰ − eʰ + 1): non-negative, and free of cancellation where h is small."""
    rule: tuple[Array, Array] = special.roots_legendre(nodes)  # pyright: ignore[reportUnknownVariableType]
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1.0 + rule[0])
    log_p = log_density(rank, np.array(rho), x)
    # At rank 1 a node can hit the spike itself, where the density is infinite; its panel has a
    # width of some units in the last place and no mass that shows.
    log_p = np.where(np.isposinf(log_p), -np.inf, log_p)
    z = x / std
    log_phi = -0.5 * z * z - math.log(std * math.sqrt(2.0 * math.pi))
    h = log_p - log_phi
    phi, p = np.exp(log_phi), np.exp(log_p)
    small = np.clip(h, -1.0, 1.0)
    near = phi * (small * np.exp(small) - np.expm1(small))
    far = p * np.where(p > 0, h, 0.0) - p + phi
    return float(np.sum(half * rule[1] * np.where(h == small, near, far)))


def _distance(
    law: EntryNoise, variance: Variance, metric: Metric, value: float, error: float
) -> Distance:
    return Distance(
        value=value,
        metric=metric,
        kind="exact",
        error=error,
        law=describe(law),
        reference=describe_gaussian(law, variance),
        method="quadrature" if "nats" in metric else "crossings of the densities and CDFs",
        references=("p1-implicit-2024", "gaunt-vg-2014"),
    )


def describe(law: EntryNoise) -> str:
    """The law in words, as all distances print it."""
    return f"one entry of q(AᵀA − I), rank {law.rank}, q_i/‖q‖ = {law.rho:.4g}"


def describe_gaussian(law: EntryNoise, variance: Variance) -> str:
    """The Gaussian that the law is compared with, in the same words."""
    spread = f"‖q‖²/{law.rank}" if variance == "published" else f"(‖q‖² + q_i²)/{law.rank}"
    return f"N(0, {spread})"
