"""Ledgers of many different releases: rounding of their sum must not lower ε."""

import mpmath as mp

from lora_privacy.dp import GaussianEvent, PldAccountant


def test_many_small_releases_after_a_large_one_are_all_paid_for() -> None:
    """Oracle: μ² and δ of one Gaussian at 40 digits (Balle & Wang); a plain sum loses 1e-12."""
    noises = [1.0, *(1e8 / (1 + 1e-9 * i) / 1.05 for i in range(10_000))]
    assert len(set(noises)) == len(noises)
    found = PldAccountant(events=tuple((GaussianEvent(z), 1) for z in noises)).epsilon(1e-5)
    with mp.workdps(40):
        mu = mp.sqrt(mp.fsum(mp.mpf(z) ** -2 for z in noises))
        a, b = found.epsilon / mu - mu / 2, found.epsilon / mu + mu / 2
        delta = mp.ncdf(-a) - mp.exp(found.epsilon) * mp.ncdf(-b)
        assert mp.mpf("1e-5") * (1 - mp.mpf(10) ** -11) <= delta <= mp.mpf("1e-5")
