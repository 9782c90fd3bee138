"""A guarantee for projected vectors: the certified worst pair of a declared family."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp._family_cover import FamilyCover
from lora_privacy.dp._vector_loss import VectorLoss, projected_sign_flip
from lora_privacy.dp.pairwise import check_pair
from lora_privacy.dp.result import ADJACENCIES, Adjacency, PrivacyBound

__all__ = ["VectorFamily"]

Array = npt.NDArray[np.float64]
Cell = tuple[float, float, float, float]
"""Least and largest φ, least and largest ν."""

# The bound lies above the worst pair that was found by at most this factor; looser ones are tried
# when the search is too long, up to the last one.
_LOOSENESS = (0.01, 0.05, 0.25, 1.0)
_MAX_CELLS = 1500  # a cell takes 3 ms
_BATCH = 8


@dataclass(frozen=True, slots=True)
class VectorFamily:
    """All pairs v, v' with a least cosine and a range of norm ratios, under ``v -> AᵀA v``.

    A declared family is a claim about the data: every two neighbouring inputs lie in it, in one
    order or the other. The worst pair need not be a corner, so the maximum is certified by
    branch and bound over cells of (angle, ratio), each with a proved upper bound.

    Args:
        in_features: Length m of the vectors, at least 2.
        rank: Rows of A, at least 1.
        min_cosine: Least cosine of a pair, in [-1, 1]; at or below 0 no δ < 1/2 is reached.
        norm_ratios: Least and largest ‖v'‖/‖v‖, within [0.01, 100].
        adjacency: ``"replace"``. Under ``"add-remove"`` or Poisson sampling v' = 0 is a
            neighbour, which is told from any other vector surely: ε is then infinite.

    Raises:
        TypeError: A size is no integer.
        ValueError: An argument is out of range or NaN.

    References:
        Proof in docs/theory/projection-pairs.md, section 6.
    """

    in_features: int
    rank: int
    min_cosine: float
    norm_ratios: tuple[float, float]
    adjacency: Adjacency = "replace"

    def __post_init__(self) -> None:
        m, r, cosine = check_pair(self.in_features, self.rank, self.min_cosine)
        low, high = (float(ratio) for ratio in self.norm_ratios)
        for name, ratio in (("least norm ratio", low), ("largest norm ratio", high)):
            _validate.between(name, ratio, 0.01, 100, "Clip or normalise the vectors first.")
        if low > high:
            raise ValueError(
                f"norm_ratios must be (least, largest), got {self.norm_ratios!r}. Exchange them."
            )
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        for name, value in (
            ("in_features", m),
            ("rank", r),
            ("min_cosine", cosine),
            ("norm_ratios", (low, high)),
        ):
            object.__setattr__(self, name, value)

    def epsilon(self, delta: float) -> PrivacyBound:
        """Certified upper bound on the family's ε at ``delta``, usually within 1 % (or .001).

        ``method`` says how far it may lie above the worst pair that was found.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
            ConvergenceError: A quadrature missed its tolerance.
        """
        _validate.inside("delta", delta, 0, 1)
        delta = float(delta)
        if (reason := self._no_bound(delta)) is not None:
            return self._bound(math.inf, delta, None, reason)
        cover = FamilyCover(self.in_features, self.rank, delta)

        def worst(angle: float, ratio: float, level: float) -> float:
            loss = self._loss(angle, ratio)
            # Most pairs need no search: δ at the level says that their ε is below it.
            if level > 0 and loss.delta(level) <= delta:
                return 0.0
            return loss.epsilon(delta)

        def excess(level: float, cells: list[Cell]) -> Array:
            return _cover(cover, level, cells) / delta

        level, looseness = self._certify(worst, excess, math.inf, 0.1)
        reason = None if level < math.inf else _NOT_CERTIFIED
        return self._bound(level, delta, looseness, reason)

    def delta(self, epsilon: float) -> PrivacyBound:
        """Certified upper bound on the family's δ at ``epsilon``, usually within 1 %.

        Raises:
            ValueError: ``epsilon`` is not positive and finite.
            ConvergenceError: A quadrature missed its tolerance.
        """
        _validate.positive("epsilon", epsilon)
        epsilon = float(epsilon)
        if (reason := self._no_bound(1.0)) is not None:
            return self._bound(epsilon, 1.0, None, reason)
        covers: dict[float, FamilyCover] = {}

        def worst(angle: float, ratio: float, level: float) -> float:
            del level
            return self._loss(angle, ratio).delta(epsilon)

        def excess(level: float, cells: list[Cell]) -> Array:
            # The bins follow the level by powers of ten.
            scale = 10.0 ** math.floor(math.log10(max(level, 1e-290)))
            if scale not in covers:
                covers[scale] = FamilyCover(self.in_features, self.rank, min(scale, 0.1))
            return _cover(covers[scale], epsilon, cells) / level

        level, looseness = self._certify(worst, excess, 1.0, 1e-13)
        reason = None if level < 1 else f"no δ below 1 is certified at ε = {epsilon!r}."
        return self._bound(epsilon, min(level, 1.0), looseness, reason)

    def _no_bound(self, delta: float) -> str | None:
        if self.adjacency != "replace":
            return (
                "adding or removing a record makes v' = 0 a neighbour, and a zero output tells it "
                "from any other vector surely."
            )
        floor = projected_sign_flip(self.rank, self.min_cosine)
        if floor >= delta * (1 - 1e-9):
            return (
                f"the pair at the least cosine of the family is told apart with probability "
                f"{floor:.3g}, which is not below δ."
            )
        return None

    def _loss(self, angle: float, ratio: float) -> VectorLoss:
        cosine = self.min_cosine if angle == self._widest else math.cos(angle)
        return VectorLoss(self.in_features, self.rank, cosine, ratio)

    @property
    def _widest(self) -> float:
        return math.acos(self.min_cosine)

    def _roots(self) -> list[Cell]:
        """The family in both orders of each pair."""
        low, high = self.norm_ratios
        # Upwards by more than the rounding of acos.
        widest = min(self._widest * (1 + 1e-15) + 1e-15, math.pi)
        spans = {(low, high), (1 / high, 1 / low)}
        return [(0.0, widest, a, b) for a, b in sorted(spans)]

    def _samples(self) -> Iterator[tuple[float, float]]:
        angles = self._widest * np.array([1.0, 0.7, 0.4, 0.1, 0.01, 0.0])
        for _, _, low, high in self._roots():
            ratios: list[float] = sorted(
                {low, math.sqrt(low * high), high, *([1.0] if low < 1 < high else [])}
            )
            yield from itertools.product(angles.tolist(), ratios)

    def _certify(
        self,
        worst: Callable[[float, float, float], float],
        excess: Callable[[float, list[Cell]], Array],
        limit: float,
        grain: float,
    ) -> tuple[float, float | None]:
        """Raise a level above every pair found until every cell is proved to lie below it.

        Args:
            worst: Level of the pair at (φ, ν); it may return 0 when that is below the third
                argument.
            excess: Bound of each cell over what the first argument, a level, allows.
            limit: A level that is no news.
            grain: A level counted as large, for the looseness of small ones.

        Returns:
            The level and its looseness, or ``limit`` and None.
        """
        found = 0.0
        for angle, ratio in self._samples():
            found = max(found, worst(angle, ratio, found))
        for looseness in _LOOSENESS:
            level = found + looseness * max(found, grain)
            cells = self._roots()
            heap = [(-math.inf, i, cell) for i, cell in enumerate(cells)]
            count = len(heap)
            while heap and count < _MAX_CELLS and level < limit:
                batch = [heapq.heappop(heap)[2] for _ in range(min(_BATCH, len(heap)))]
                values = excess(level, batch)
                open_cells = [(v, c) for v, c in zip(values, batch, strict=True) if not v <= 1]
                if open_cells:
                    # A pair inside the worst cell may raise the level; what is closed stays so.
                    low, high, least, most = max(open_cells)[1]
                    pair = worst((low + high) / 2, math.sqrt(least * most), found)
                    found = max(found, pair)
                    level = max(level, found + looseness * max(found, grain))
                for value, cell in open_cells:
                    for part in self._split(cell):
                        heapq.heappush(heap, (-float(value), count, part))
                        count += 1
            if not heap and level < limit:
                return level, looseness
        return limit, None

    def _split(self, cell: Cell) -> tuple[Cell, Cell]:
        """Halve the side that moves the loss more."""
        low, high, least, most = cell
        score = 4.0  # where the tails that matter begin
        spread = score * math.sqrt((self.in_features + self.rank) / 2) + self.rank - 1
        by_angle = (high - low) * (score / math.sqrt(self.rank) + high) * spread
        by_ratio = math.log(most / least) * (spread + self.rank - 1)
        if by_angle >= by_ratio:
            middle = (low + high) / 2
            return (low, middle, least, most), (middle, high, least, most)
        middle = math.sqrt(least * most)
        return (low, high, least, middle), (low, high, middle, most)

    def _bound(
        self, epsilon: float, delta: float, looseness: float | None, reason: str | None
    ) -> PrivacyBound:
        low, high = self.norm_ratios
        method = "certified maximum over a family of pairs"
        if looseness is not None:
            method += f", within {100 * looseness:g} % of its worst pair"
        return PrivacyBound(
            epsilon=epsilon,
            delta=delta,
            adjacency=self.adjacency,
            method=method,
            assumptions=(
                f"every two neighbouring inputs are vectors of length {self.in_features} with "
                f"cosine at least {self.min_cosine!r} and, in one order or the other, a ratio of "
                f"norms within [{low!r}, {high!r}]; Poisson sampling, or adding and removing "
                "records, would make v' = 0 a neighbour, and ε infinite",
                f"A ({self.rank} rows) is Gaussian, drawn for this release only, independent of "
                "the data and secret",
                "one vector is released, once",
            ),
            references=("p2-projections-2026",),
            reason=reason,
        )


_NOT_CERTIFIED = "no finite ε could be certified over the family; declare a narrower one."


def _cover(cover: FamilyCover, epsilon: float, cells: list[Cell]) -> Array:
    boxes = np.array(cells)
    return cover.delta(epsilon, boxes[:, :2], boxes[:, 2:])
