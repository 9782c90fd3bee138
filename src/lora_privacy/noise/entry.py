"""Exact law of one entry of the injected noise, for Gaussian A."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy import _validate
from lora_privacy.errors import ConvergenceError
from lora_privacy.noise._density import chi_square_logpdf, entry_logpdf
from lora_privacy.noise._quadrature import entry_tails
from lora_privacy.noise._rows import Array

__all__ = ["EntryNoise"]

# |ρ| may exceed 1 by rounding when norm and coord come from the same vector.
_UNIT_SLACK = 4e-15
# Root search of ppf: relative accuracy of the tail probability, and steps before giving up.
_PPF_RTOL = 1e-13
_PPF_STEPS = 200


@dataclass(frozen=True, slots=True)
class EntryNoise:
    """Law of coordinate i of ``q (AᵀA - I)``, with ``A`` (rank, m) i.i.d. N(0, 1/rank).

    With ρ = q_i / ‖q‖ and independent X, Y ~ χ²(rank), it is that of
    ``(‖q‖ / rank) (a X - b Y) - q_i``, where a = (1 + ρ)/2 and b = (1 - ρ)/2: a variance-gamma
    law. At |ρ| = 1 it is the scaled chi-square ``q_i (X/rank - 1)``. It does not depend on m.

    Args:
        rank: Rows of ``A``, at least 1.
        norm: ‖q‖, in units of the gradient, > 0 and finite.
        coord: q_i, same unit, between -norm and norm, both allowed.

    Raises:
        ValueError: An argument is out of range or NaN; from the methods, an ``x`` that is NaN.
        ConvergenceError: From cdf, sf, ppf or isf, when a tolerance is missed.

    References:
        R. E. Gaunt, "Variance-Gamma approximation via Stein's method"; derivation in
        docs/theory/noise-laws.md.

    >>> law = EntryNoise(rank=8, norm=2.0, coord=0.5)
    >>> law.var() == (2.0**2 + 0.5**2) / 8
    True
    >>> f"{law.cdf(0.0):.4f}"
    '0.5350'
    """

    rank: int
    norm: float = 1.0
    coord: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _validate.integer("rank", self.rank, 1))
        object.__setattr__(self, "norm", float(self.norm))
        object.__setattr__(self, "coord", float(self.coord))
        _validate.positive("norm", self.norm, "It is ‖q‖; a zero row receives no noise.")
        slack = self.norm * (1.0 + _UNIT_SLACK)
        _validate.between("coord", self.coord, -slack, slack, "It is one entry of q.")

    @property
    def rho(self) -> float:
        """ρ = coord / norm, dimensionless, in [-1, 1]."""
        return max(-1.0, min(1.0, self.coord / self.norm))

    @property
    def _one_sided(self) -> bool:
        """Whether |ρ| = 1, where the law is that of ``q_i (X/rank - 1)``."""
        return abs(self.rho) == 1.0

    def mean(self) -> float:
        """0: the projection is unbiased."""
        return 0.0

    def var(self) -> float:
        """(‖q‖² + q_i²) / rank, in squared units of the gradient."""
        return (self.norm * self.norm) * (1.0 + self.rho * self.rho) / self.rank

    def std(self) -> float:
        """Square root of the variance, in units of the gradient; no overflow at large norms."""
        return self.norm * math.sqrt((1.0 + self.rho * self.rho) / self.rank)

    def skewness(self) -> float:
        """Third moment over std³, (6ρ + 2ρ³) / ((1 + ρ²)^1.5 √rank); 0 for ρ = 0."""
        rho = self.rho
        return (6 * rho + 2 * rho**3) / ((1 + rho * rho) ** 1.5 * math.sqrt(self.rank))

    def kurtosis(self) -> float:
        """Fourth moment over var², 3 for a Gaussian: the kurtosis itself and not the excess."""
        square = self.rho * self.rho
        return 3.0 + 6 * (1 + 6 * square + square * square) / (self.rank * (1 + square) ** 2)

    def pdf(self, x: npt.ArrayLike) -> Array:
        """Density at ``x``, same shape, in 1 / unit of the gradient.

        It is infinite at ``x = -coord`` for rank 1, and at the end of the support of |ρ| = 1.
        """
        return np.exp(self.logpdf(x))

    def logpdf(self, x: npt.ArrayLike) -> Array:
        """Log density at ``x``, same shape; -inf outside the support."""
        y = self._standard(x)
        finite = np.isfinite(y)
        if self._one_sided:
            value = chi_square_logpdf(self.rank, self.rho * y)
        else:
            value = entry_logpdf(self.rank, self.rho, np.where(finite, y, 0.0))
        return np.where(finite, value, -math.inf) - math.log(self.norm)

    def cdf(self, x: npt.ArrayLike) -> Array:
        """P(noise <= x), same shape as ``x``; a lower tail has full relative accuracy."""
        return self._tails(x)[0]

    def sf(self, x: npt.ArrayLike) -> Array:
        """P(noise > x), same shape as ``x``; an upper tail has full relative accuracy."""
        return self._tails(x)[1]

    def ppf(self, probability: npt.ArrayLike) -> Array:
        """Inverse of cdf, in units of the gradient; ValueError unless 0 <= probability <= 1."""
        return self._quantile(probability, lower=True)

    def isf(self, probability: npt.ArrayLike) -> Array:
        """Inverse of sf; exact far into the upper tail, where ``ppf(1 - p)`` has no digits."""
        return self._quantile(probability, lower=False)

    def rvs(self, size: int | tuple[int, ...], random_state: np.random.Generator) -> Array:
        """Draw an array of shape ``size``; the generator is required, so draws can be repeated."""
        x = random_state.chisquare(self.rank, size)
        y = random_state.chisquare(self.rank, size)
        rho = self.rho
        noise = ((1.0 + rho) * x - (1.0 - rho) * y) / (2 * self.rank) - rho
        return np.asarray(self.norm * noise, np.float64)

    def _standard(self, x: npt.ArrayLike) -> Array:
        """``x`` in units of ‖q‖; ValueError at NaN."""
        y = np.asarray(x, np.float64) / self.norm
        if np.isnan(y).any():
            raise ValueError("x must hold numbers, got NaN. Remove or repair those points first.")
        return y

    def _tails(self, x: npt.ArrayLike) -> tuple[Array, Array]:
        y = self._standard(x)
        if self._one_sided:
            s = np.maximum(self.rho * y + 1.0, 0.0) * (self.rank / 2)
            below = np.asarray(special.gammainc(self.rank / 2, s), np.float64)
            above = np.asarray(special.gammaincc(self.rank / 2, s), np.float64)
            return (below, above) if self.rho > 0 else (above, below)
        finite = np.isfinite(y)
        low, high = entry_tails(self.rank, self.rho, np.where(finite, y, 0.0))
        return np.where(finite, low, y > 0), np.where(finite, high, y < 0)

    def _quantile(self, probability: npt.ArrayLike, *, lower: bool) -> Array:
        p = np.asarray(probability, np.float64)
        if not np.all((p >= 0) & (p <= 1)):
            raise ValueError("probability must lie in [0, 1], and be no NaN; see ppf and isf.")
        if self._one_sided:
            inverse = special.gammaincinv if lower == (self.rho > 0) else special.gammainccinv
            s = np.asarray(inverse(self.rank / 2, p), np.float64) / (self.rank / 2)
            return self.rho * self.norm * (s - 1.0)
        end = math.inf if lower else -math.inf
        result = np.asarray(np.where(p, end, -end))  # as it is where p is 0 or 1
        inner = (p > 0) & (p < 1)
        if inner.any():
            result[inner] = self.norm * self._root(p[inner], lower=lower)
        return result

    def _root(self, p: Array, *, lower: bool) -> Array:
        """Solve tail(x) = p in units of ‖q‖: Newton on the log of a tail inside a bracket."""
        scale = self.std() / self.norm
        low, high = np.full(p.size, -scale), np.full(p.size, scale)

        def excess(x: Array) -> tuple[Array, Array]:
            """Signed relative miss, rising in x, and the tail it is relative to."""
            below, above = entry_tails(self.rank, self.rho, x)
            return (below - p, below) if lower else (p - above, above)

        while (short := excess(low)[0] > 0).any():
            low[short] *= 2.0
        while (short := excess(high)[0] < 0).any():
            high[short] *= 2.0
        x = np.zeros(p.size)
        for _ in range(_PPF_STEPS):
            miss, tail = excess(x)
            low, high = np.where(miss <= 0, x, low), np.where(miss >= 0, x, high)
            done = (np.abs(miss) <= _PPF_RTOL * p) | (high - low <= 1e-15 * np.abs(x))
            if done.all():
                return x
            # Newton on ln(tail) = ln p: nearly linear in x far out, where Newton on p would crawl.
            with np.errstate(all="ignore"):
                slope = np.exp(entry_logpdf(self.rank, self.rho, x)) / tail
                step = np.log(tail / p) / slope
                guess = x - step if lower else x + step
            ok = np.isfinite(guess) & (guess > low) & (guess < high)
            x = np.where(done, x, np.where(ok, guess, (low + high) / 2))
        raise ConvergenceError(
            f"The quantile search of {self} missed its tolerance {_PPF_RTOL:g}; no value is "
            "returned. Please report the law and the probability."
        )
