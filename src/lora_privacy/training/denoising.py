"""Restoring the singular values of a gradient after its noise.

A noised gradient is ``G̃ = Ḡ + s Z``, Z i.i.d. N(0, 1) and s public, so whatever is computed from
G̃ and s alone is post-processing: it costs no privacy. It recovers Ḡ, the *clipped* mean; what the
clip took away stays away. Derivations and limits: ``docs/theory/denoising.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lora_privacy import _validate
from lora_privacy.errors import NonFiniteError, UnsupportedTrainingError

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer
    from torch import Tensor

__all__ = [
    "NormCorrection",
    "OnEmpty",
    "Shrinker",
    "SingularValueDenoiser",
    "check_finite",
    "denoise",
    "predicted_cosine",
]

Shrinker = Literal["frobenius", "debias", "hard", "partial"]
OnEmpty = Literal["keep", "zero"]
NormCorrection = Literal["none", "signal", "noisy"]

# From this many rows a Cholesky factorisation, which shows that nothing passes the edge, is so
# much faster than the eigenvectors that trying it first pays: 2 ms against 18 at 384 rows.
_CHOLESKY_ROWS = 128

# ‖G̃‖/s, squared, beyond which the noise is less than the rounding of the gradient, in float64 too.
_NOISELESS = 1e32


def denoise(
    gradient: Tensor,
    noise_std: float,
    shrinker: Shrinker = "frobenius",
    *,
    strength: float = 0.5,
    edge_factor: float = 1.0,
    on_empty: OnEmpty = "keep",
    norm: NormCorrection = "none",
) -> Tensor:
    """Replace each singular value y of a noised gradient by f(y), and keep its singular vectors.

    With the edge ``s(√n + √m)`` of the noise alone, ``q(y) = (y² − s²(n+m))² − 4nms⁴``, f is

    * ``"frobenius"``: ``√q/y``, of asymptotically least expected ‖Ĝ − Ḡ‖_F;
    * ``"debias"``: ``λ(y)``, ``λ² = (y² − s²(n+m) + √q)/2``, the value that noise moves to y;
    * ``"hard"``: y, above ``edge_factor`` times the edge;
    * ``"partial"``: ``(1−t) y + t λ(y)`` for every y,

    and 0 (λ = 0 for ``"partial"``) up to the edge. It pays at low signal-to-noise ratios only: of
    a gradient far above the noise all four return nearly what they got.

    Args:
        gradient: G̃, (n, m), floating point. Further dimensions count as part of m; what has fewer
            than two, a bias or the weight of a norm, comes back as it is.
        noise_std: s >= 0, standard deviation of each entry's independent Gaussian noise, in units
            of the gradient. At 0 the gradient comes back as it is.
        shrinker: f.
        strength: t of ``"partial"``, in [0, 1]; at 0 the gradient comes back as it is.
        edge_factor: At least 1, of ``"hard"``.
        on_empty: When no singular value passes: ``"keep"`` returns the gradient as it is,
            ``"zero"`` what f says, which is 0 (for ``"partial"`` (1−t) G̃).
        norm: What to rescale the result to: ``"signal"`` is ``√max(0, ‖G̃‖² − nms²)``, an estimate
            of ‖Ḡ‖, ``"noisy"`` is ‖G̃‖. A gradient that is kept as it is, is not rescaled.

    Returns:
        Ĝ, same shape, dtype and device, without a graph. Half precision is computed in float32,
        singular values in float64: those below 1e-8 of the largest are not told from 0.

    Raises:
        ValueError: An argument is out of range.
        TypeError: The gradient is not of a floating-point dtype.
        NonFiniteError: The gradient holds NaN or infinity.

    References:
        Gavish & Donoho 2017 (the first two shrinkers); arXiv:2510.01137 (their use on private
        gradients); ``docs/theory/denoising.md``.
    """
    return SingularValueDenoiser(
        shrinker, strength=strength, edge_factor=edge_factor, on_empty=on_empty, norm=norm
    )("gradient", gradient, noise_std)


@dataclass(frozen=True, slots=True)
class SingularValueDenoiser:
    """:func:`denoise` with its options set, as ``make_private(denoiser=…)`` takes it.

    Options are those of :func:`denoise`.
    """

    shrinker: Shrinker = "frobenius"
    strength: float = field(default=0.5, kw_only=True)
    edge_factor: float = field(default=1.0, kw_only=True)
    on_empty: OnEmpty = field(default="keep", kw_only=True)
    norm: NormCorrection = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        _validate.choice("shrinker", self.shrinker, get_args(Shrinker))
        _validate.between("strength", self.strength, 0, 1)
        _validate.between(
            "edge_factor", self.edge_factor, 1, math.inf, "Below 1 most of the noise would pass."
        )
        _validate.choice("on_empty", self.on_empty, get_args(OnEmpty))
        _validate.choice("norm", self.norm, get_args(NormCorrection))

    def __call__(self, path: str, gradient: Tensor, noise_std: float) -> Tensor:
        """Denoise one gradient; ``path`` is for messages."""
        _check_std(noise_std)
        if not gradient.is_floating_point():
            raise TypeError(f"{path} must be of a floating-point dtype, got {gradient.dtype}.")
        untouched = self.shrinker == "partial" and self.strength == 0
        if gradient.dim() < 2 or not gradient.numel() or noise_std == 0 or untouched:
            check_finite(path, gradient, float(gradient.sum()) if gradient.numel() else 0.0)
            return gradient
        # autocast would round the last products to half precision
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            found = self._of_matrix(path, gradient.flatten(1), noise_std)
        return gradient if found is None else found.view(gradient.shape).to(gradient.dtype)

    def attach(self, optimizer: DPOptimizer) -> None:
        """Denoise every gradient of a ``DPOptimizer`` of Opacus, each time its noise is added.

        Opacus has a single step hook, which its accountant uses: that one goes on running, first.
        Attach after ``PrivacyEngine.make_private``, which sets the hook anew.

        Raises:
            UnsupportedTrainingError: Where the noise is not known to be that of
                ``noise_multiplier``: distributed and adaptively clipping optimizers, or one that
                a denoiser is attached to.
        """
        _check_optimizer(optimizer)
        before = optimizer.step_hook
        if isinstance(before, _AfterNoise):
            raise UnsupportedTrainingError(
                "A denoiser is attached to this optimizer: after the first one the noise is not "
                "what a second one would take it for. Attach one."
            )
        optimizer.attach_step_hook(_AfterNoise(self, before))

    def _of_matrix(self, path: str, gradient: Tensor, noise_std: float) -> Tensor | None:
        """Ĝ of a matrix, or None to keep it."""
        if gradient.dtype != torch.float64:
            gradient = gradient.float()
        flat = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        unit = flat.double() / noise_std  # the noise has standard deviation 1 from here on
        gram = unit @ unit.T
        size = float(gram.trace())  # ‖G̃‖²/s²
        check_finite(path, gradient, size)
        if not size < _NOISELESS:
            return None
        vectors, y = _passing(gram, self.threshold(*flat.shape))
        if not len(y) and self.on_empty == "keep":
            return None
        gain = (_restored(self.shrinker, y, *flat.shape) / y).unsqueeze(1).to(flat.dtype)
        vectors = vectors.to(flat.dtype)
        restored = vectors @ (gain * (vectors.T @ flat))
        if self.shrinker == "partial":
            restored = torch.lerp(flat, restored, self.strength)
        if self.norm != "none":
            goal = size if self.norm == "noisy" else max(0.0, size - flat.numel())
            length = float(restored.norm())
            restored = restored * (noise_std * math.sqrt(goal) / length if length else 0.0)
        return restored if flat is gradient else restored.T.contiguous()

    def threshold(self, n: int, m: int) -> float:
        """What a singular value of (n, m) must exceed, in standard deviations of the noise."""
        return _edge(n, m) * (self.edge_factor if self.shrinker == "hard" else 1.0)


def predicted_cosine(
    singular_values: npt.ArrayLike,
    noise_std: float,
    shape: tuple[int, int],
    shrinker: Shrinker | None = "frobenius",
    *,
    strength: float = 0.5,
    edge_factor: float = 1.0,
    on_empty: OnEmpty = "keep",
) -> float:
    """Cosine ⟨Ĝ, Ḡ⟩/(‖Ĝ‖‖Ḡ‖) of a denoised to a clean gradient, in the limit of large matrices.

    The limit has a fixed number of distinct singular values, n and m growing in proportion and
    s√m fixed. ``docs/theory/denoising.md`` says how far it is off at the ranks of adapters.

    Args:
        singular_values: Of the clean gradient Ḡ, >= 0 and not all 0; those left out are 0.
        noise_std: s >= 0, same unit.
        shape: (n, m).
        shrinker: As in :func:`denoise`; None leaves the noise in.
        strength: As in :func:`denoise`.
        edge_factor: As in :func:`denoise`.
        on_empty: As in :func:`denoise`.

    Returns:
        The cosine, in [0, 1]; 0 where the denoised gradient is 0.

    Raises:
        ValueError: An argument is out of range.

    References:
        Benaych-Georges & Nadakuditi 2012, Sec. 3.1 (values and overlaps); the cosine in
        ``docs/theory/denoising.md``.

    >>> [round(predicted_cosine([60.0], 1.0, (768, 768), f), 3) for f in (None, "frobenius")]
    [0.078, 0.787]
    """
    values = np.atleast_1d(np.asarray(singular_values, dtype=np.float64))
    n, m = (_validate.integer("shape", side, 1) for side in shape)
    _check_std(noise_std)
    if values.ndim != 1 or not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"singular_values must be finite and at least 0, got {values!r}.")
    if not values.any() or len(values) > min(n, m):
        raise ValueError(
            f"singular_values must hold up to min(n, m) = {min(n, m)} numbers, not all of them 0."
        )
    options = SingularValueDenoiser(
        shrinker or "frobenius", strength=strength, edge_factor=edge_factor, on_empty=on_empty
    )
    if noise_std == 0:
        return 1.0
    values = values / noise_std
    clean, noise = float(values @ values), n * m  # ‖Ḡ‖² and E‖Z‖²
    undenoised = math.sqrt(clean / (clean + noise))
    if shrinker is None:
        return undenoised
    found = values[values > (n * m) ** 0.25]
    y = np.sqrt((found**2 + n) * (found**2 + m)) / found
    above = y > options.threshold(n, m)
    y, found = y[above], found[above]
    # c_l c_r: how much of u_i v_iᵀ is left in the singular vectors that go with y
    overlap = (found**4 - n * m) / (found**3 * y)
    if not len(y):
        some_noise_stays = on_empty == "keep" or (shrinker == "partial" and strength < 1)
        return undenoised if some_noise_stays else 0.0
    f = _restored(shrinker, torch.from_numpy(y), n, m).numpy()
    along, size = float(f @ (found * overlap)), float(f @ f)
    if shrinker == "partial":
        t = strength
        along = (1 - t) * clean + t * along
        size = (1 - t) ** 2 * (clean + noise) + 2 * t * (1 - t) * float(y @ f) + t * t * size
    return along / math.sqrt(clean * size)


class _AfterNoise:
    """A step hook of Opacus: the hook that was there, then the denoiser on every gradient."""

    def __init__(
        self, denoiser: SingularValueDenoiser, before: Callable[[DPOptimizer], None] | None
    ) -> None:
        self._denoiser, self._before = denoiser, before

    def __call__(self, optimizer: DPOptimizer) -> None:
        if self._before is not None:
            self._before(optimizer)
        _check_optimizer(optimizer)  # what adapts the noise may have been set up since
        # Noise of std z·C is added to the sum, for per-layer clips too (C = √ΣC_l²), and the sum
        # is then divided as the loss was; this hook comes last.
        std = float(optimizer.noise_multiplier * optimizer.max_grad_norm)
        if optimizer.loss_reduction == "mean":
            assert optimizer.expected_batch_size is not None  # as Opacus checks
            std /= optimizer.expected_batch_size * optimizer.accumulated_iterations
        for index, parameter in enumerate(optimizer.params):
            assert parameter.grad is not None
            name = f"parameter {index} of the optimizer"
            parameter.grad = self._denoiser(name, parameter.grad, std)


def _check_optimizer(optimizer: DPOptimizer) -> None:
    from opacus.optimizers import (
        DPOptimizer,
        DPOptimizerFastGradientClipping,
        DPPerLayerOptimizer,
    )

    # The exact type: distributed ones add noise on one process and average after this hook, and
    # adaptive ones change the noise.
    known = (DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer)
    if type(optimizer) not in known or hasattr(optimizer, "_adjusted_noise_multiplier"):
        raise UnsupportedTrainingError(
            f"The noise of a {type(optimizer).__name__} is not known to be noise_multiplier · "
            "max_grad_norm at the step hook. Use a plain DPOptimizer (flat, per-layer or ghost "
            "clipping, one process, no adaptive clipping), or call denoise with the noise_std "
            "that holds."
        )


def _check_std(noise_std: float) -> None:
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std must be at least 0 and finite, got {noise_std!r}.")


def check_finite(path: str, gradient: Tensor, hint: float) -> None:
    """Raise unless all entries are finite; ``hint`` is finite only if they are."""
    if not math.isfinite(hint) and not bool(gradient.isfinite().all()):
        raise NonFiniteError(
            f"{path} holds NaN or infinity after its noise. Lower the learning rate, or look for "
            "an overflow in half precision."
        )


def _edge(n: int, m: int) -> float:
    """Largest singular value of large standard normal matrices (n, m)."""
    return math.sqrt(n) + math.sqrt(m)


def _passing(gram: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """Vectors (k, count) and roots (count,) of the eigenvalues above edge²; float64."""
    if len(gram) >= _CHOLESKY_ROWS:
        room = -gram
        room.diagonal().add_(edge**2)
        if not int(torch.linalg.cholesky_ex(room).info):  # positive definite: nothing passes
            return gram[:, :0], gram[0, :0]
    values, vectors = torch.linalg.eigh(gram)
    first = int((values <= edge**2).sum())  # they rise
    return vectors[:, first:], values[first:].sqrt()


def _restored(shrinker: Shrinker, y: Tensor, n: int, m: int) -> Tensor:
    """f(y), or λ(y) for "partial", of values above the edge; noise of standard deviation 1."""
    if shrinker == "hard":
        return y
    # (y² − n − m)² − 4nm, as a product: nothing cancels near the edge
    wide, narrow = _edge(n, m), math.sqrt(m) - math.sqrt(n)
    root = ((y - wide) * (y + wide) * (y - narrow) * (y + narrow)).clamp(min=0).sqrt()
    return root / y if shrinker == "frobenius" else ((y * y - (n + m) + root) / 2).sqrt()
