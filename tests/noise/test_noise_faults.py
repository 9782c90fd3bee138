"""A tolerance that is missed raises and says so; no number is returned. Faults put in by hand."""

import math

import numpy as np
import pytest

from lora_privacy.errors import ConvergenceError, NonFiniteError
from lora_privacy.noise import (
    Distance,
    EntryNoise,
    _crossings,
    entry,
    gaussianity,
    joint,
    joint_tv_to_gaussian,
    kl_to_gaussian,
    kolmogorov_to_gaussian,
    lyapunov_ratio,
    tv_of_entries,
    tv_to_gaussian,
)

LAW = EntryNoise(8, 1.0, 0.3)


@pytest.mark.parametrize("height", [-1.0, 1.0])
def test_a_density_that_does_not_cross_as_proved(
    height: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_crossings, "log_ratio", lambda _r, _p, _s, x: np.full(x.shape, height))
    for distance in (tv_to_gaussian, kolmogorov_to_gaussian):
        with pytest.raises(ConvergenceError, match="must cross its Gaussian"):
            distance(LAW)


def test_a_joint_distance_that_misses_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_TOLERANCE", 1e-13)  # below what is granted for rounding
    with pytest.raises(ConvergenceError, match="must be accurate to 1e-13, got an error of"):
        joint_tv_to_gaussian(8, 64)


def test_an_entropy_that_misses_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussianity, "_KL_RTOL", -1.0)
    with pytest.raises(ConvergenceError, match="must be accurate to -1 relative"):
        kl_to_gaussian(LAW)


def test_a_row_that_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussianity, "_MAX_HALVINGS", 1)
    monkeypatch.setattr(gaussianity, "_INTERPOLATION_RTOL", 0.0)
    monkeypatch.setattr(gaussianity, "_CDF_ERROR", 0.0)
    with pytest.raises(ConvergenceError, match="within 1 halvings"):
        tv_of_entries(np.geomspace(0.01, 1.0, 2_000), 8)


def test_a_quantile_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_PPF_STEPS", 2)
    with pytest.raises(ConvergenceError, match="missed its tolerance 1e-13; no value is returned"):
        LAW.ppf(1e-9)


@pytest.mark.parametrize(("value", "error"), [(math.nan, 0.0), (0.5, math.nan)])
def test_a_distance_is_a_number(value: float, error: float) -> None:
    with pytest.raises(NonFiniteError, match="a distance must be a number"):
        Distance(
            value=value,
            metric="total variation",
            kind="exact",
            error=error,
            law="a law",
            reference="N(0, 1)",
            method="by hand",
            references=(),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_is_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="row must be finite"):
        lyapunov_ratio([1.0, bad], 8)
