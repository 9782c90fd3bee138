"""Rényi divergences behind a fresh projection: oracles are mpmath and drawn projections."""

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.dp import ProjectedGaussian, RdpAccountant

# (layers, z, p, α, ε_α): theory of the projected Gaussian, eight to nine digits.
PINS = [
    ([(768, 8)], 1.0, 0.01, 4.0, 2.0974793e-6),
    ([(768, 8)], 1.0, 0.01, 16.0, 8.4032130e-6),
    ([(768, 8)], 1.0, 0.01, 32.0, 1.6842595e-5),
    ([(64, 8)], 1.0, 1.0, 4.0, 0.27178246),
    ([(64, 8)], 1.0, 1.0, 16.0, 4.0975593),
]


@pytest.mark.parametrize(("layers", "z", "p", "alpha", "expected"), PINS)
def test_pinned_divergences(
    layers: list[tuple[int, int]], z: float, p: float, alpha: float, expected: float
) -> None:
    """Reference numbers; 1e-7 relative."""
    found = ProjectedGaussian(layers, z, p).rdp([alpha])[0]
    assert found == pytest.approx(expected, rel=1e-7, abs=0)
