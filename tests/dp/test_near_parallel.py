"""Pairs whose angle a scalar product does not see: ε must not be that of parallel vectors."""

import math

import numpy as np
import pytest

from lora_privacy.dp import NoisedProjection, VectorProjection, matrix_projection
from lora_privacy.dp.matrix_pairs import cosine_between


@pytest.mark.parametrize("angle", [1e-11, 1e-9, 1e-8, 3e-8])
def test_a_tiny_angle_keeps_its_floor(angle: float) -> None:
    """Oracle: at rank 1 the product is negative with probability angle/π; below it ε is ∞."""
    v, v_prime = np.array([[1.0], [0.0]]), np.array([[math.cos(angle)], [math.sin(angle)]])
    delta = 0.3 * angle / math.pi
    assert matrix_projection(v, v_prime, 1, delta).epsilon == math.inf
    assert NoisedProjection(v, v_prime, 1, 1e-30).epsilon(delta).epsilon > 1e6


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("angle", [1e-15, 1e-9, 2.2e-8, 1e-6, 1e-3, 0.7, math.pi / 2 - 1e-9])
def test_the_cosine_is_never_closer_to_a_line_than_the_vectors(angle: float, side: float) -> None:
    """Oracle: the angle itself; acos of the rounded cosine is above it, and by 3e-8 at most."""
    vector = np.array([math.cos(angle), math.sin(angle)])
    found = cosine_between(np.array([1.0, 0.0]), side * vector)
    assert found * side < 1
    # 1 - cos is exact here, and acos(x) = 2 asin(√((1 - x)/2)) keeps its digits.
    seen = 2 * math.asin(math.sqrt((1 - found * side) / 2))
    assert angle <= seen <= angle * (1 + 1e-7) + 3e-8


def test_multiples_stay_parallel() -> None:
    v = np.random.default_rng(3).standard_normal(20)
    unit = v / np.linalg.norm(v)
    assert cosine_between(unit, unit) == 1.0
    assert cosine_between(unit, -unit) == -1.0


def test_a_seen_angle_gives_the_same_profile() -> None:
    """Oracle: ``VectorProjection`` at the cosine of the angle; 1e-9 relative."""
    angle = 0.01
    v, v_prime = np.zeros((30, 1)), np.zeros((30, 1))
    v[0], v_prime[:2, 0] = 1.0, (math.cos(angle), math.sin(angle))
    expected = VectorProjection(30, 6, math.cos(angle)).epsilon(1e-6).epsilon
    found = matrix_projection(v, v_prime, 6, 1e-6).epsilon
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_column_in_the_span_of_the_others_has_no_residual_to_split() -> None:
    """What is left of it is rounding, 1e-16 of it: the bound is that of a revealed A."""
    rng = np.random.default_rng(2)
    unit, other = rng.standard_normal(2), rng.standard_normal(2)
    v = np.stack([3 * unit, unit], axis=1)
    v_prime = np.stack([3 * unit + other, unit], axis=1)
    for first, second in ((v, v_prime), (v_prime, v)):
        found = NoisedProjection(first, second, 3, 1e-6).epsilon(1e-3)
        assert found.method == "upper bound, A revealed"
