"""Oracles for loss distributions, from the definitions, with mpmath; nothing of ours is used."""

import mpmath as mp
import numpy as np


def cdf(x: mp.mpf) -> mp.mpf:
    return mp.erfc(-x / mp.sqrt(2)) / 2


def removal_delta(mu: float, p: float, epsilon: float, digits: int = 60) -> mp.mpf:
    """sup_E M(E) - e^ε N(E) for M = (1-p) N(0,1) + p N(μ,1), N = N(0,1), any real ε.

    The best E is {x > t} with M(t)/N(t) = e^ε densities.
    """
    with mp.workdps(digits):
        mu, p, x = mp.mpf(mu), mp.mpf(p), mp.exp(mp.mpf(epsilon))
        if x <= 1 - p:
            return 1 - x
        t = mp.log((x - 1 + p) / p) / mu + mu / 2
        return (1 - p) * cdf(-t) + p * cdf(mu - t) - x * cdf(-t)


def addition_delta(mu: float, p: float, epsilon: float, digits: int = 60) -> mp.mpf:
    """sup_E N(E) - e^ε M(E), as above; E is {x < t} with N(t)/M(t) = e^ε."""
    with mp.workdps(digits):
        mu, p, x = mp.mpf(mu), mp.mpf(p), mp.exp(mp.mpf(epsilon))
        if 1 / x <= 1 - p:
            return mp.mpf(0)
        t = mp.log((1 / x - 1 + p) / p) / mu + mu / 2
        return cdf(t) - x * ((1 - p) * cdf(t) + p * cdf(t - mu))


DELTAS = {"remove": removal_delta, "add": addition_delta}


def measure_delta(
    masses: np.ndarray, losses: np.ndarray, infinite: float, epsilon: float
) -> float:
    """Σ mass (1 - e^{ε - loss})_+ + infinite, straight from the definition."""
    gain = -np.expm1(np.minimum(epsilon - losses, 0.0))
    return float(np.sum(masses * gain)) + infinite


def exchange_delta(mu: float, p: float, epsilon: float, digits: int = 60) -> mp.mpf:
    """sup_E M(E) - e^ε M'(E), M = (1-p) N(0,1) + p N(μ,1) and M' its reflection at 0, any real ε.

    The likelihood ratio rises, so the best E is {x > t}; t by bisection of its logarithm.
    """
    with mp.workdps(digits):
        mu, p, e = mp.mpf(mu), mp.mpf(p), mp.mpf(epsilon)

        def loss(x: mp.mpf) -> mp.mpf:
            up, down = (mp.log(1 - p + p * mp.exp(s * mu * x - mu * mu / 2)) for s in (1, -1))
            return up - down

        low, high = mp.mpf(-1), mp.mpf(1)
        while loss(low) > e:
            low *= 2
        while loss(high) < e:
            high *= 2
        while high - low > mp.mpf(10) ** (3 - digits // 2) * (1 + abs(low)):
            middle = (low + high) / 2
            low, high = (middle, high) if loss(middle) < e else (low, middle)
        ours, theirs = ((1 - p) * cdf(-low) + p * cdf(s * mu - low) for s in (1, -1))
        return ours - mp.exp(e) * theirs
