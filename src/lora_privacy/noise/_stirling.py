"""What Stirling's formulas leave over, without cancellation at large ranks.

Both series are enveloping for k > 0: the sum after any term errs by less than the next term and
to its side (Abramowitz & Stegun 6.1.42 and 6.3.18), so that they also give proved bounds.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import math

import numpy as np
from scipy import special

from lora_privacy.noise._rows import Array

__all__ = [
    "chi_square_entropy",
    "digamma_remainder",
    "log_gamma_remainder",
    "log_gamma_series",
]

# From here the first neglected term is below 3e-13 relative, and below it the direct
# difference loses less than 1e-14 of what is subtracted.
_SERIES_FROM = 16.0
# B₂ⱼ/(2j(2j − 1)) and B₂ⱼ/(2j), by rising powers of 1/k².
_LOG_GAMMA = 1.0 / np.array([12.0, -360.0, 1260.0, -1680.0, 1188.0])
_DIGAMMA = 1.0 / np.array([12.0, -120.0, 252.0, -240.0, 132.0])


def log_gamma_remainder(k: float) -> float:
    """Remainder ln Γ(k) − [(k − ½) ln k − k + ½ ln 2π], for k > 0; about 1/(12k)."""
    if k < _SERIES_FROM:
        return math.lgamma(k) - ((k - 0.5) * math.log(k) - k + 0.5 * math.log(2.0 * math.pi))
    return float(log_gamma_series(np.float64(k)))


def log_gamma_series(k: Array | np.float64) -> Array:
    """The same by its series, for k from 16 on."""
    return np.polynomial.polynomial.polyval(1.0 / (k * k), _LOG_GAMMA) / k


def digamma_remainder(k: float) -> float:
    """Remainder ln k − 1/(2k) − ψ(k), for k > 0; about 1/(12k²)."""
    if k < _SERIES_FROM:
        return math.log(k) - 0.5 / k - float(special.digamma(k))
    square = 1.0 / (k * k)
    return square * float(np.polynomial.polynomial.polyval(square, _DIGAMMA))


def chi_square_entropy(freedom: int) -> float:
    """Relative entropy of χ² to the Gaussian of its mean and variance, in nats; about 2/(3r)."""
    k = freedom / 2
    return 0.5 / k - log_gamma_remainder(k) - (k - 1.0) * digamma_remainder(k)
