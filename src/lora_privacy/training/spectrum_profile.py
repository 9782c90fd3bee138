"""A record of the singular values of gradients, before and after their noise and restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lora_privacy.errors import TrainingOrderError
from lora_privacy.training.denoising import check_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["SpectrumProfile", "SpectrumRecord"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumRecord:
    """Singular values of one gradient at one step, in falling order, in units of the gradient.

    Attributes:
        step: Number of gradients of this path recorded before.
        noise_std: s.
        shape: (n, m).
        noisy: After the noise, (min(n, m),).
        restored: After the denoiser.
        before: Of the clipped mean before the noise; None unless asked for. **Not private.**
    """

    step: int
    noise_std: float
    shape: tuple[int, int]
    noisy: npt.NDArray[np.float64]
    restored: npt.NDArray[np.float64]
    before: npt.NDArray[np.float64] | None = None


class SpectrumProfile:
    """Record singular values around a denoiser: ``make_private(denoiser=SpectrumProfile(…))``.

    What it records after the noise is computed from the released gradient: as private as that.

    **With ``before_noise=True`` the profile also holds the singular values of the clipped mean
    before any noise. They are computed from private data, without noise, and no guarantee covers
    them: neither the profile nor anything chosen by looking at it may leave the machine. It is a
    diagnostic, for data that is not secret.**

    It costs a singular value decomposition of every gradient before and after: not for timed runs.

    Args:
        denoiser: Denoiser to wrap, such as ``SingularValueDenoiser()``; None changes nothing.
        before_noise: Whether to expect :meth:`before` ahead of each call.

    Attributes:
        records: Path -> one record a step. Vectors are not recorded.
    """

    def __init__(
        self,
        denoiser: Callable[[str, Tensor, float], Tensor] | None = None,
        *,
        before_noise: bool = False,
    ) -> None:
        self.denoiser: Callable[[str, Tensor, float], Tensor] | None = denoiser
        self._before_noise = bool(before_noise)
        self.records: dict[str, list[SpectrumRecord]] = {}
        self._before: dict[str, npt.NDArray[np.float64]] = {}

    @property
    def before_noise(self) -> bool:
        """Whether it holds private data; fixed when it is made."""
        return self._before_noise

    def before(self, path: str, mean_gradient: Tensor) -> None:
        """Take the clipped mean before its noise: **private data**, see the class.

        Raises:
            TrainingOrderError: The profile was not made with ``before_noise=True``.
        """
        if not self.before_noise:
            raise TrainingOrderError(
                "This profile records nothing from before the noise. SpectrumProfile(…, "
                "before_noise=True) does, and is then not private."
            )
        if mean_gradient.dim() >= 2:
            self._before[path] = _singular_values(path, mean_gradient)

    def __call__(self, path: str, gradient: Tensor, noise_std: float) -> Tensor:
        """Denoise and record.

        Raises:
            TrainingOrderError: ``before_noise=True``, and :meth:`before` was not called.
            NonFiniteError: The gradient holds NaN or infinity.
        """
        if gradient.dim() >= 2 and self.before_noise and path not in self._before:
            raise TrainingOrderError(
                f"before({path!r}, …) was not called ahead of the noised gradient. Where nothing "
                "calls it, use SpectrumProfile(…, before_noise=False)."
            )
        restored = gradient
        if self.denoiser is not None:
            restored = self.denoiser(path, gradient, noise_std)
        if gradient.dim() >= 2:
            history = self.records.setdefault(path, [])
            noisy = _singular_values(path, gradient)
            history.append(
                SpectrumRecord(
                    step=len(history),
                    noise_std=float(noise_std),
                    shape=(gradient.shape[0], gradient[0].numel()),
                    noisy=noisy,
                    restored=noisy if restored is gradient else _singular_values(path, restored),
                    before=self._before.pop(path, None),
                )
            )
        return restored

    def to_dict(self) -> dict[str, Any]:
        """All records as plain lists and numbers, ready for JSON."""
        return {
            "denoiser": repr(self.denoiser),
            "private": not self.before_noise,
            "note": (
                "Holds singular values from before the noise: computed from private data, covered "
                "by no guarantee."
                if self.before_noise
                else "Computed from noised gradients alone: covered by the guarantee of the run."
            ),
            "records": {
                path: [
                    {
                        "step": record.step,
                        "noise_std": record.noise_std,
                        "shape": list(record.shape),
                        "noisy": record.noisy.tolist(),
                        "restored": record.restored.tolist(),
                        "before": None if record.before is None else record.before.tolist(),
                    }
                    for record in history
                ]
                for path, history in self.records.items()
            },
        }


def _singular_values(path: str, gradient: Tensor) -> npt.NDArray[np.float64]:
    matrix = gradient.detach().flatten(1).double().cpu()
    check_finite(path, matrix, float(matrix.sum()))
    return torch.linalg.svdvals(matrix).numpy()
