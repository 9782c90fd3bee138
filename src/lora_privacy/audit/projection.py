"""The white-box attack on updates of a frozen or fresh random projection: who was in the batch?

Model of one step: ``ΔW = -step_size (G AᵀA + noise)`` (plain SGD, A frozen during the step), where
G is the sum of the gradients of the batch. Statistics and their laws are derived in
docs/theory/projection-attack.md. Scores are evidence, never a bound on ε.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.audit._arrays import Array, finite

__all__ = ["NoisePlace", "asymmetry", "projection_attack"]

NoisePlace = Literal["release", "gradient"]

# A residual below this many roundings of the inputs is 0: its logarithm would be noise.
_ROUNDINGS = 64
# Weight of the identity in the second moment of reference gradients. 0.01 to 0.1 attack alike.
_SHRINKAGE = 0.05


def projection_attack(
    update: npt.ArrayLike,
    candidates: npt.ArrayLike,
    *,
    known: npt.ArrayLike | None = None,
    a: npt.ArrayLike | None = None,
    reference: npt.ArrayLike | None = None,
    step_size: float | None = None,
    noise_std: float = 0.0,
    noise_at: NoisePlace = "release",
    rank: int | None = None,
) -> Array:
    """Score each candidate gradient for having been in the batch behind ``update``.

    What the attacker knows decides the statistic; candidates are scored one by one, so they may
    be handed over in pieces:

    - ``known`` missing: *alignment*, the cosine of the update and the candidate within the row
      space of A, as a z-score. It needs the base model and the candidate sample only.
    - ``known``, A secret, no noise: *symmetry*, the logarithm of :func:`asymmetry` without the
      candidate over that with it. It needs neither the step size nor the rank of A.
    - ``known``, A secret, noise on the release: the *log-likelihood ratio* of two normal laws with
      the exact mean and covariance of ``G AᵀA + E``, for A i.i.d. N(0, 1/rank). As the noise
      vanishes it is the symmetry test, as it grows the matched filter.
    - ``known`` and ``a``: the exact log-likelihood ratio given A, the most powerful test there is;
      without noise the logarithm of the ratio of both residuals.

    Steps with one A are rows of a taller matrix: pass them stacked. The sum of such updates is one
    update of the sum of the gradients. Over layers or steps with an A each, add the log-likelihood
    ratios.

    Args:
        update: ΔW; with ``a``, the step of the adapter ΔB = -step_size (G Aᵀ + noise) instead.
        candidates: Gradient of each candidate as it would enter the sum: clipped, and divided by
            the batch size, if the training did so.
        known: Sum of the gradients of the rest of the batch; zeros if there is no rest.
        a: A, where it is public.
        reference: Gradients of samples known not to be in the batch, at least 2, for alignment.
            Directions in which they are large count less, and the z-score is against their own
            scores; without them it is against a direction that is uniform.
        step_size: Positive factor in front of ``G AᵀA``, or with ``a`` of ``G Aᵀ``: with learning
            rate η and s = alpha/rank it is η s² (times rank · variance of A's entries), or η s.
        noise_std: Standard deviation of one entry of the i.i.d. noise E, in units of ``G AᵀA``,
            ``G Aᵀ`` or G, whichever it was added to.
        noise_at: Where E was added: ``"release"``, to what is released, ``G AᵀA + E`` or
            ``G Aᵀ + E``; ``"gradient"``, before the projection, ``(G + E) Aᵀ``, with ``a`` only.
        rank: Rows of the secret A, with noise.

    Shape:
        update ``(n, m)`` or ``(steps, n, m)``, with ``a`` ``(n, r)`` or ``(steps, n, r)``;
        ``known`` ``(n, m)`` or ``(steps, n, m)``; candidates and reference with one axis more in
        front; ``a`` ``(r, m)``.

    Returns:
        Shape (candidates,); higher means member. Log-likelihood ratios are in nats, and 0 is
        where both hypotheses are equally likely; alignment is about N(0, 1) for a non-member.

    Raises:
        ValueError: Shapes do not match, a number is out of range, NaN or infinite, something the
            statistic needs is missing, or something it would ignore was given.

    References:
        arXiv:2601.21719, Theorem 2, for symmetry; docs/theory/projection-attack.md.
    """
    _validate.choice("noise_at", noise_at, get_args(NoisePlace))
    _validate.at_least("noise_std", noise_std, 0)
    tested = finite("candidates", candidates, None)
    if tested.ndim not in (3, 4) or not tested.size:
        raise ValueError(
            "candidates must have shape (count, n, m) or (count, steps, n, m), got "
            f"{tested.shape}. Put one candidate as candidate[None]."
        )
    shape = tested.shape[1:]
    public = None if a is None else _frame(finite("a", a, (None, shape[-1])))
    released = shape if public is None else (*shape[:-1], len(public[1]))
    observed = _rows(finite("update", update, released))
    tested = _stacked(tested)
    rounding = max(_rounding(update), _rounding(candidates))
    if not noise_std and not observed.any():
        raise ValueError("update must not be all zero: it says nothing about any candidate.")
    if known is None:
        _refuse("known", step_size=step_size, noise_std=noise_std or None, rank=rank)
        if public is None:
            seen, frame = _row_space(observed, rounding)
        else:
            seen, frame = _solve(public[1], observed), public[0]
        others = None if reference is None else finite("reference", reference, (None, *shape))
        others = None if others is None else _stacked(others) @ frame
        return _alignment(-seen, tested @ frame, others)
    if reference is not None:
        raise ValueError("reference is for attacks without known: leave one of them out.")
    rest = _rows(finite("known", known, shape))
    if public is not None:
        _refuse("a", rank=rank)
        frame, factor = public
        moved = observed / -_checked_step_size(step_size)
        if noise_at == "gradient":  # its covariance σ²AAᵀ turns into σ²I
            moved = _solve(factor, moved)
        else:
            frame = frame @ factor
        return _shift(moved, tested @ frame, rest @ frame, noise_std, rounding)
    if not noise_std:
        _refuse("noise_std", step_size=step_size, rank=rank)
        return _symmetry(observed, tested, rest, rounding)
    if noise_at == "gradient":
        raise ValueError(
            "noise_at='gradient' needs a: no attack is known on noise before a secret projection. "
            "Pass A, which is public wherever that noise is accounted for."
        )
    if rank is None:
        raise ValueError("rank must be given with noise and a secret A: the rows of A.")
    rank = _validate.integer("rank", rank, 1)
    moved = observed / -_checked_step_size(step_size)
    without = _log_likelihood(moved, rest, noise_std, rank)
    return np.array(
        [_log_likelihood(moved, rest + one, noise_std, rank) - without for one in tested]
    )


def asymmetry(update: npt.ArrayLike, gradients: npt.ArrayLike) -> Array:
    """‖G Uᵀ - U Gᵀ‖ / (2 ‖G Uᵀ‖) for each G: 0 if ``update`` U is a multiple of G AᵀA.

    In exact arithmetic it is 0 for the right G whatever A is, and positive with probability 1 for
    another one, unless that is a multiple of G or both are of rank one with the same column
    space. Rounding leaves about 1e-15 in double and 1e-6 in single precision.

    Args:
        update: U, shape (n, m), in any unit, and of either sign.
        gradients: Shape (count, n, m), in any unit.

    Returns:
        Shape (count,), in [0, 1], dimensionless; 0 where G Uᵀ is exactly 0.

    Raises:
        ValueError: Shapes do not match, or an array holds NaN or infinity.

    References:
        arXiv:2601.21719, Theorem 2; docs/theory/projection-attack.md, section 1.
    """
    tested = finite("gradients", gradients, (None, None, None))
    observed = finite("update", update, tested.shape[1:])
    rounding = max(_rounding(update), _rounding(gradients))
    left, right = _row_space(observed, rounding)
    return np.array([_relative_asymmetry(one @ right, left) for one in tested])


def _symmetry(observed: Array, tested: Array, rest: Array, rounding: float) -> Array:
    """Log of the ratio of both asymmetries; an empty rest explains nothing and counts as 1."""
    floor = _ROUNDINGS * rounding
    left, right = _row_space(observed, rounding)
    sketched = rest @ right
    without = _relative_asymmetry(sketched, left) if rest.any() else 1.0
    with_it = [_relative_asymmetry(sketched + one @ right, left) for one in tested]
    return math.log(max(without, floor)) - np.log(np.maximum(with_it, floor))


def _relative_asymmetry(sketched: Array, left: Array) -> float:
    """Of G Uᵀ = (G Q)(U Q)ᵀ, formed in full: differences of traces would lose half the digits."""
    product = sketched @ left.T
    size = float(np.linalg.norm(product))
    return float(np.linalg.norm(product - product.T)) / (2.0 * size) if size else 0.0


def _log_likelihood(released: Array, gradient: Array, noise_std: float, rank: int) -> float:
    """Normal log-density with the mean and covariance of G AᵀA + E, up to a constant.

    With G = P diag(λ) Qᵀ and D = Pᵀ Y Q, the entries of D are uncorrelated but for the pairs
    D_ij, D_ji. Along (λ_i, λ_j)/√(λ_i²+λ_j²) a pair has variance σ² + (λ_i²+λ_j²)/r, across it σ²:
    what lies across is the asymmetry, which the projection cannot make.
    """
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    noise = noise_std**2
    inner = left.T @ released
    outside = released - left @ inner  # rows that no gradient reaches: noise only
    square = inner @ right.T
    beyond = inner - square @ right  # columns outside the rows of G, p × m
    power = values**2
    total = float(np.sum(outside**2)) / noise
    i, j = np.triu_indices(values.size, 1)
    both = np.sqrt(power[i] + power[j])
    live = both > 0
    c = np.divide(values[i], both, out=np.ones_like(both), where=live)
    s = np.divide(values[j], both, out=np.zeros_like(both), where=live)
    along, across = c * square[i, j] + s * square[j, i], s * square[i, j] - c * square[j, i]
    spread = noise + both**2 / rank
    total += float(np.sum(along**2 / spread + np.log(spread / noise) + across**2 / noise))
    spread = noise + 2.0 * power / rank
    gap = np.diag(square) - values
    total += float(np.sum(gap**2 / spread + np.log(spread / noise)))
    spread = noise + power / rank
    extra = released.shape[1] - values.size
    total += float(np.sum(np.sum(beyond**2, axis=1) / spread + extra * np.log(spread / noise)))
    return -0.5 * total


def _shift(released: Array, moved: Array, rest: Array, noise_std: float, rounding: float) -> Array:
    """Two normal laws that differ by a known shift; without noise, the ratio of the residuals."""
    residual = released - rest
    if noise_std:
        inner = np.einsum("kij,ij->k", moved, residual)
        return (inner - 0.5 * np.sum(moved**2, axis=(1, 2))) / noise_std**2
    least = _ROUNDINGS * rounding * float(np.linalg.norm(released))
    without = max(float(np.linalg.norm(residual)), least)
    with_it = np.maximum(np.linalg.norm(residual - moved, axis=(1, 2)), least)
    return math.log(without) - np.log(with_it)


def _alignment(seen: Array, tested: Array, others: Array | None) -> Array:
    """z-scores of <seen, C⁻¹ g>, with C the identity or the shrunk second moment of ``others``."""
    size = float(np.linalg.norm(seen))
    unit, flat = seen.ravel() / size, tested.reshape(len(tested), -1)
    if others is None:
        return math.sqrt(unit.size) * _ratio(flat @ unit, np.einsum("kd,kd->k", flat, flat))
    if len(others) < 2:
        raise ValueError(f"reference must hold at least 2 gradients, got {len(others)}.")
    # C = (1 - s) XᵀX/k + s (‖X‖²/(k d)) I, inverted on and off the row space of X.
    x = others.reshape(len(others), -1)
    values, basis = np.linalg.svd(x, full_matrices=False)[1:]
    share = (1.0 - _SHRINKAGE) / len(x)
    ridge = _SHRINKAGE * float(np.sum(values**2)) / x.size
    if not ridge:
        raise ValueError("reference must hold a gradient that A does not map to 0.")
    taken = share * values**2 / (share * values**2 + ridge)

    def spread(rows: Array) -> Array:
        inner = rows @ basis.T
        return (np.einsum("kd,kd->k", rows, rows) - inner**2 @ taken) / ridge

    whitened = (unit - (taken * (basis @ unit)) @ basis) / ridge
    # A reference gradient took part in C. With h its spread, C without it gives the inner product
    # over (1 - share h) and the spread h/(1 - share h) (Sherman–Morrison).
    own = spread(x)
    null = _ratio(x @ whitened, own * (1.0 - share * own))
    deviation = float(np.std(null, ddof=1))
    if not deviation > 0:
        raise ValueError("reference must hold gradients that differ: their scores are all equal.")
    return (_ratio(flat @ whitened, spread(flat)) - float(np.mean(null))) / deviation


def _ratio(inner: Array, square: Array) -> Array:
    """inner/√square; a candidate that A does not see says nothing and gets 0."""
    return np.divide(inner, np.sqrt(square), out=np.zeros_like(inner), where=square > 0)


def _row_space(observed: Array, rounding: float) -> tuple[Array, Array]:
    """U Q and an orthonormal basis Q of the row space of U, that of A if the batch has rank r."""
    left, values, right = np.linalg.svd(observed, full_matrices=False)
    keep = values > max(observed.shape) * rounding * values[0]
    return left[:, keep] * values[keep], right[keep].T


def _frame(a: Array) -> tuple[Array, Array]:
    """Q (m, r) and triangular T with Aᵀ = Q T, so that G Aᵀ = (G Q) T."""
    if a.shape[0] > a.shape[1]:
        raise ValueError(f"a must have at most as many rows as columns, got shape {a.shape}.")
    frame, factor = np.linalg.qr(a.T)
    pivots = np.abs(np.diag(factor))
    if pivots.min() <= a.shape[1] * np.finfo(np.float64).eps * pivots.max():
        raise ValueError("a must have independent rows: leave out those that add nothing.")
    return frame, factor


def _solve(factor: Array, released: Array) -> Array:
    """X with X T = released."""
    return np.asarray(np.linalg.solve(factor.T, released.T).T, np.float64)


def _stacked(gradients: Array) -> Array:
    """(count, steps, n, m) to (count, steps · n, m): steps with one A are rows of one matrix."""
    return gradients.reshape(len(gradients), -1, gradients.shape[-1])


def _rows(matrices: Array) -> Array:
    return matrices.reshape(-1, matrices.shape[-1])


def _checked_step_size(value: float | None) -> float:
    if value is None:
        raise ValueError("step_size must be given: how far a unit of gradient moves the weights.")
    _validate.positive("step_size", value)
    return value


def _refuse(because: str, **given: float | None) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"{' and '.join(names)} would have no effect with this choice of {because}; leave out."
        )


def _rounding(value: npt.ArrayLike) -> float:
    """Unit roundoff of the input, that of single precision for float32 and float16 arrays."""
    kind = np.asarray(value).dtype
    return float(np.finfo(kind if kind.kind == "f" else np.float64).eps)
