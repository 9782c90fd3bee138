"""Oracles for projected Gaussians, from the definitions. They import nothing of ours."""

import math

import mpmath as mp
import numpy as np
from scipy import special, stats


def log_excess(features: int, rank: int, x: float, digits: int = 40) -> mp.mpf:
    """log(₁F₁(rank/2; features/2; x) - 1): its series, or mpmath's function for large x."""
    with mp.workdps(digits):
        a, b, x = mp.mpf(rank) / 2, mp.mpf(features) / 2, mp.mpf(x)
        if x > 3000:
            return mp.log(mp.hyp1f1(a, b, x, maxterms=10**6) - 1)
        term = total = a / b * x
        k = 1
        while term > total * mp.mpf(10) ** (2 - digits):
            term *= (a + k) / (b + k) * x / (k + 1)
            total += term
            k += 1
        return mp.log(total)


def divergence(features: int, rank: int, z: float, p: float, alpha: int) -> mp.mpf:
    """Rényi divergence of the worst record at a whole order, by the binomial sum with k = 0, 1."""
    with mp.workdps(40):
        a, b, q = mp.mpf(rank) / 2, mp.mpf(features) / 2, mp.mpf(p)
        total = mp.mpf(0)
        for k in range(alpha + 1):
            moment = mp.hyp1f1(a, b, mp.mpf(k * (k - 1)) / (2 * mp.mpf(z) ** 2))
            total += mp.binomial(alpha, k) * (1 - q) ** (alpha - k) * q**k * moment
        return mp.log(total) / (alpha - 1)


def shares(features: int, rank: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Jacobi points and weights of the Beta law of the share a projection keeps."""
    a, c = rank / 2, (features - rank) / 2
    roots, weights = special.roots_jacobi(count, c - 1, a - 1)
    return (1 + roots) / 2, weights / weights.sum()


def hockey_stick(z: float, p: float, epsilon: float, beta: float, direction: str) -> float:
    """∫ (P - e^ε Q)₊ given the share β, by integrating the two densities; 1e-12 absolute."""
    shift = math.sqrt(beta) / z
    x = np.linspace(-12.0, 12.0 + shift, 400_001)
    base = stats.norm.pdf(x)
    mixed = (1 - p) * base + p * stats.norm.pdf(x - shift)
    first, second = (mixed, base) if direction == "remove" else (base, mixed)
    return float(np.maximum(first - math.exp(epsilon) * second, 0.0).sum() * (x[1] - x[0]))


def gaussian_delta(epsilon: float | np.ndarray, mu: np.ndarray) -> np.ndarray:
    """δ of N(μ,1) against N(0,1); Balle & Wang (2018). Enough digits for δ over 1e-8."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(
        -mu / 2 - epsilon / mu
    )


def rank_one_delta(
    features: int, rank: int, z: float, p: float, epsilon: float, direction: str, digits: int = 30
) -> mp.mpf:
    """E δ given β, β ~ Beta, for a record of rank one: exact for it, and for no other record."""
    with mp.workdps(digits):
        a, c = mp.mpf(rank) / 2, mp.mpf(features - rank) / 2
        z, p, e = mp.mpf(z), mp.mpf(p), mp.exp(mp.mpf(epsilon))
        if direction == "remove":
            scale, inner = p, mp.log(1 + (e - 1) / p)
        else:
            scale = 1 - e * (1 - p)
            if scale <= 0:
                return mp.mpf(0)
            inner = mp.log(e * p / scale)

        def given(t: mp.mpf) -> mp.mpf:
            beta, gamma = 1 / (1 + mp.exp(-t)), 1 / (1 + mp.exp(t))
            mu = mp.sqrt(beta) / z
            delta = mp.ncdf(mu / 2 - inner / mu) - mp.exp(inner) * mp.ncdf(-mu / 2 - inner / mu)
            return beta**a * gamma**c * delta

        # Steps of 2 are wrong by 0.4 % where the integrand is narrow.
        pieces = [mp.mpf(k) / 2 for k in range(-36, 37)]
        pieces = [-150, -100, -60, -30, *pieces, 30, 60, 100, 150]
        return scale * mp.quad(given, pieces) / mp.beta(a, c)


def least_majorant(
    features: int, rank: int, z: float, epsilon: float, touches: int = 150
) -> float:
    """Least E ψ_c(β) over c: φ up to its inflection β₀, or the tangent at c >= β₀ where above.

    φ(β) = δ_Gauss(ε; √β/z). A plain sum over the logit of β, steps of 4e-3; 1e-6 relative.
    """
    a, c = rank / 2, (features - rank) / 2
    t = np.arange(-80.0, 60.0, 4e-3)
    beta = special.expit(t)
    log_weight = a * special.log_expit(t) + c * special.log_expit(-t) - special.betaln(a, c)
    weight = np.exp(log_weight) * 4e-3
    mu = np.sqrt(np.maximum(beta, 1e-12)) / z
    height = np.where(beta > 1e-12, gaussian_delta(epsilon, mu), 0.0)
    turn = 2 * z * z * (math.sqrt(1 + epsilon * epsilon) - 1)
    if turn >= 1:
        return float(weight @ height)
    found = 1.0
    for at in np.geomspace(max(turn, 1e-4), 1.0, touches):
        m = math.sqrt(at) / z
        slope = stats.norm.pdf(epsilon / m - m / 2) / (2 * z * math.sqrt(at))
        line = gaussian_delta(epsilon, np.array(m)) + slope * (beta - at)
        psi = np.where(beta <= turn, np.maximum(height, line), line)
        found = min(found, float(weight @ psi))
    return found


def rank_one_composed_delta(
    features: int, rank: int, z: float, steps: int, epsilon: float
) -> float:
    """δ of ``steps`` fresh releases for records of rank one, without sampling.

    δ = (1/2πi) ∫ M(θ)^steps e^{-θε} / (θ(θ+1)) dθ up a vertical line right of 0, with
    M(θ) = E e^{βθ(θ+1)/(2z²)}, the moment generating function of the loss. The line goes through
    the saddle point, about; other lines and half the step agree to 1e-9.
    """
    beta, weight = shares(features, rank, 150)

    def log_transform(theta: np.ndarray) -> np.ndarray:
        powers = np.exp(beta[:, None] * (theta * (theta + 1))[None, :] / (2 * z * z))
        return steps * np.log(weight @ powers) - theta * epsilon - np.log(theta * (theta + 1))

    real = np.geomspace(0.05, 20, 200)
    centre = real[np.argmin(log_transform(real))]
    line = np.linspace(-40, 40, 16_001)
    total = sum(
        np.exp(log_transform(centre + 1j * part)).sum().real for part in np.array_split(line, 16)
    )
    return float(total) * (line[1] - line[0]) / (2 * math.pi)


def drawn_shares(
    rng: np.random.Generator, features: int, rank: int, directions: int, count: int
) -> np.ndarray:
    """Shares kept of the first ``directions`` unit vectors by drawn Gaussian A, (count, K)."""
    A = rng.standard_normal((count, rank, features))
    Q = np.linalg.qr(A.transpose(0, 2, 1)).Q
    return np.square(Q[:, :directions, :]).sum(axis=2)
