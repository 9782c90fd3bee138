"""The laws of the noise for every shape of layer that a model has, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_privacy import _notebook, _validate
from lora_privacy._plain import plain_fields
from lora_privacy.noise.bounds import tv_bound
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import kolmogorov_to_gaussian, tv_to_gaussian
from lora_privacy.noise.jl import jl_distortion
from lora_privacy.noise.joint import joint_tv_to_gaussian
from lora_privacy.noise.shapes import LayerShape

__all__ = ["JL_FAILURE", "LawsRow", "LawsTable", "laws_table"]

#: Failure probability that the distortion in a table is stated at.
JL_FAILURE = 0.05

_KIND = "Laws, not a guarantee"
_NOTE = (
    "For Gaussian A and an entry of average size. tv, kolmogorov and joint_tv are distances to "
    "the Gaussian of the same covariance, 0 to 1. All rows of one gradient keep their norm within "
    f"1 ± jl_distortion but for a probability of {JL_FAILURE:g}. Two rows or more are at distance "
    "1 from independent Gaussian noise at every rank."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LawsRow:
    """Laws of the noise that a Gaussian A injects into gradients of one shape.

    Entry laws are for an entry of average size, q_i² = ‖q‖²/m. Laws and distances, no guarantee.

    Attributes:
        layers: Names of the layers of this shape.
        count: Number of layers of this shape in the model.
        in_features: m.
        out_features: n.
        rank: r.
        relative_std: Standard deviation of an entry over ‖q‖, dimensionless.
        excess_kurtosis: Kurtosis of an entry minus 3.
        tv: Total variation of an entry to the Gaussian of its own variance.
        tv_bound: Proved upper bound on ``tv``.
        kolmogorov: Kolmogorov distance to the same Gaussian.
        joint_tv: Total variation of a whole row to the Gaussian of its own covariance.
        jl_distortion: Least τ at which all n rows keep their norm within 1 ± τ, but for a
            probability of ``JL_FAILURE``; from 1 on the lower side says nothing.
    """

    layers: tuple[str, ...]
    count: int
    in_features: int
    out_features: int
    rank: int
    relative_std: float
    excess_kurtosis: float
    tv: float
    tv_bound: float
    kolmogorov: float
    joint_tv: float
    jl_distortion: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return plain_fields(self)

    def _repr_html_(self) -> str:
        return _notebook.table(_KIND, [self.to_dict()], _NOTE)


class LawsTable(tuple[LawsRow, ...]):
    """Rows of laws: a tuple that a notebook shows as a table."""

    __slots__ = ()

    def to_pandas(self) -> Any:  # noqa: ANN401  (pandas is no dependency)
        """A ``pandas.DataFrame``, a row a shape; MissingPackageError without pandas."""
        return _notebook.frame([row.to_dict() for row in self])

    def _repr_html_(self) -> str:
        return _notebook.table(_KIND, [row.to_dict() for row in self], _NOTE)


def laws_table(shapes: Iterable[LayerShape], rank: int) -> LawsTable:
    """State the laws of the noise for every distinct shape, at one rank, for Gaussian A.

    Args:
        shapes: Layers, as :func:`model_shapes` lists them.
        rank: r, at least 1.

    Returns:
        A tuple of one row per distinct (in_features, out_features), in the order of first
        appearance.

    Raises:
        ValueError: The rank or a shape is out of range, or there are no shapes.
        ConvergenceError: A quadrature missed its tolerance.
    """
    rank = _validate.integer("rank", rank, 1)
    groups: dict[tuple[int, int], list[LayerShape]] = {}
    for shape in shapes:
        groups.setdefault((shape.in_features, shape.out_features), []).append(shape)
    if not groups:
        raise ValueError("shapes must name at least one layer, got none.")
    # Layers of one input size share all laws but the distortion.
    laws = {m: _laws(m, rank) for m in dict.fromkeys(m for m, _ in groups)}
    return LawsTable(
        LawsRow(
            layers=tuple(layer.name for layer in layers),
            count=sum(layer.count for layer in layers),
            in_features=m,
            out_features=n,
            rank=rank,
            jl_distortion=jl_distortion(rank, JL_FAILURE, vectors=n),
            **laws[m],
        )
        for (m, n), layers in groups.items()
    )


def _laws(in_features: int, rank: int) -> dict[str, float]:
    m = _validate.integer("in_features", in_features, 1)
    law = EntryNoise(rank, 1.0, 1.0 / math.sqrt(m))
    return {
        "relative_std": law.std(),
        "excess_kurtosis": law.kurtosis() - 3.0,
        "tv": tv_to_gaussian(law).value,
        "tv_bound": tv_bound(law).value,
        "kolmogorov": kolmogorov_to_gaussian(law).value,
        "joint_tv": joint_tv_to_gaussian(rank, m).value,
    }
