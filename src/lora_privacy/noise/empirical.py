"""Monte Carlo law of one entry of the noise, for every law of A."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.laws import LawName, entry_law
from lora_privacy.noise._rows import Array, finite_row, norm_of
from lora_privacy.noise.moments import noise_variance

__all__ = ["EmpiricalNoise"]

# Doubles held at a time while simulating: 16 MB.
_BLOCK = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class EmpiricalNoise:
    """Sampled law of coordinate i of ``q (AᵀA / (v r) - I)``: exact draws, exact moments.

    A uniform or Rademacher A takes O(draws·rank·m) time, for its noise depends on the whole row;
    an orthonormal or Gaussian one takes O(draws). Memory is O(draws).

    Args:
        law: Law of A's entries.
        rank: Rows of A, at least 1.
        row: q, shape (in_features,), in units of the gradient, not all zero.
        index: i, from 0.
        draws: Number of independent A, at least 1.
        random_state: Source of all randomness.

    Attributes:
        norm: ‖q‖, in units of the gradient.
        coord: q_i, same unit.
        samples: The draws, sorted, shape (draws,), same unit.

    Raises:
        ValueError: An argument is out of range, or rank > in_features for the orthonormal law.
        IndexError: ``index`` lies outside the row.
        NonFiniteError: The row holds NaN or infinity.
        TypeError: ``random_state`` is no generator.

    References:
        Massart, "The Tight Constant in the Dvoretzky–Kiefer–Wolfowitz Inequality", for the band.
    """

    law: LawName
    rank: int
    row: InitVar[npt.ArrayLike]
    index: InitVar[int]
    draws: int
    random_state: InitVar[np.random.Generator]
    norm: float = field(init=False)
    coord: float = field(init=False)
    samples: Array = field(init=False, repr=False)
    _variance: float = field(init=False, repr=False)

    def __post_init__(
        self, row: npt.ArrayLike, index: int, random_state: np.random.Generator
    ) -> None:
        q = finite_row(row)
        if not q.any():
            raise ValueError("row must be a vector that is not all zero; skip this row.")
        entry_law(self.law, self.rank, q.size)
        draws = _validate.integer("draws", self.draws, 1)
        index = _validate.integer("index", index, 0)
        if index >= q.size:
            raise IndexError(f"index must be below {q.size}, the length of the row, got {index}.")
        if not isinstance(random_state, np.random.Generator):  # pyright: ignore[reportUnnecessaryIsInstance]
            name = type(random_state).__name__
            raise TypeError(f"random_state must be a numpy.random.Generator, got {name}.")
        norm = norm_of(q)
        unit = q / norm
        if self.law in ("uniform", "rademacher"):
            noise = _independent(self.law, self.rank, unit, index, draws, random_state)
        elif self.law == "gaussian":
            noise = _gaussian(self.rank, float(unit[index]), draws, random_state)
        else:
            noise = _orthonormal(self.rank, unit.size, float(unit[index]), draws, random_state)
        noise *= norm
        noise.sort()
        noise.flags.writeable = False
        values = {"norm": norm, "coord": float(q[index]), "samples": noise, "draws": draws}
        values["_variance"] = float(noise_variance(unit, self.law, self.rank)[index])
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def mean(self) -> float:
        """0, exactly: the projection is unbiased under every law."""
        return 0.0

    def var(self) -> float:
        """Exact variance, not that of the sample, in squared units of the gradient."""
        return self._variance * self.norm * self.norm

    def std(self) -> float:
        """Root of the exact variance, in units of the gradient."""
        return math.sqrt(self._variance) * self.norm

    def cdf(self, x: npt.ArrayLike) -> Array:
        """Share of draws at or below ``x``, same shape; ``band`` says how far it may be off."""
        points = np.asarray(x, np.float64)
        if np.isnan(points).any():
            raise ValueError("x must hold numbers, got NaN. Remove or repair those points first.")
        return np.searchsorted(self.samples, points, side="right") / self.draws

    def ppf(self, probability: npt.ArrayLike) -> Array:
        """Smallest draw whose ``cdf`` reaches ``probability``; ValueError outside [0, 1]."""
        p = np.asarray(probability, np.float64)
        if not np.all((p >= 0) & (p <= 1)):
            raise ValueError("probability must lie in [0, 1], and be no NaN.")
        place = np.ceil(p * self.draws * (1.0 - 1e-15)).astype(np.int64)
        return self.samples[np.clip(place - 1, 0, self.draws - 1)]

    def band(self, confidence: float) -> float:
        """Half-width h: with this confidence ``|cdf(x) - P(noise <= x)| <= h`` for all x at once.

        Args:
            confidence: In (0, 1), such as 0.99.
        """
        _validate.inside("confidence", confidence, 0.0, 1.0)
        return math.sqrt(math.log(2.0 / (1.0 - confidence)) / (2.0 * self.draws))


def _independent(
    law: str, rank: int, unit: Array, index: int, draws: int, rng: np.random.Generator
) -> Array:
    """Draws for ‖q‖ = 1: the mean over the rows a of A, of variance 1, of a_i (a·q), minus q_i."""
    noise = np.empty(draws)
    step = max(1, _BLOCK // rank)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        products = np.empty(count * rank)
        block = max(1, _BLOCK // unit.size)
        for row in range(0, products.size, block):
            part = slice(row, min(row + block, products.size))
            a = _entries(law, (part.stop - row, unit.size), rng)
            products[part] = (a @ unit) * a[:, index]
        noise[start : start + count] = products.reshape(count, rank).mean(axis=1)
    return noise - unit[index]


def _entries(law: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """I.i.d. entries of variance 1."""
    if law == "uniform":
        return rng.uniform(-math.sqrt(3.0), math.sqrt(3.0), shape)
    size = shape[0] * shape[1]
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-size // 8)), np.uint8), count=size)
    signs = bits.astype(np.float64)
    signs *= 2.0
    signs -= 1.0
    return signs.reshape(shape)


def _gaussian(rank: int, rho: float, draws: int, rng: np.random.Generator) -> Array:
    """Draws for ‖q‖ = 1: given S, N(ρ(S - 1), (1 - ρ²) S/r)."""
    s = rng.chisquare(rank, draws) / rank
    spread = math.sqrt(max(0.0, 1.0 - rho * rho) / rank)
    return rho * (s - 1.0) + spread * np.sqrt(s) * rng.standard_normal(draws)


def _orthonormal(rank: int, m: int, rho: float, draws: int, rng: np.random.Generator) -> Array:
    """Draws for ‖q‖ = 1: qP = βq + √(β(1-β)) u, with β ~ Beta(r/2, (m-r)/2).

    u is uniform on the unit sphere of the complement of q, independent of β. Its entry i is
    √(1-ρ²) times one entry of a uniform unit vector of R^(m-1).
    """
    if rank == m:
        return np.zeros(draws)
    beta = rng.beta(rank / 2, (m - rank) / 2, draws)
    g = rng.standard_normal(draws)
    rest = rng.chisquare(m - 2, draws) if m > 2 else np.zeros(draws)
    u = math.sqrt(max(0.0, 1.0 - rho * rho)) * g / np.sqrt(g * g + rest)
    return (m / rank) * (beta * rho + np.sqrt(beta * (1.0 - beta)) * u) - rho
