"""Oracles for Rényi accounting, from the definitions, with mpmath. They import nothing of ours."""

import mpmath as mp


def excess_forward(z: float, p: float, alpha: float, digits: int = 30) -> mp.mpf:
    """E_P (M/P)^α - 1, P = N(0, z²), M = (1-p) N(0, z²) + p N(1, z²), by quadrature."""
    with mp.workdps(digits):
        z, p, alpha = mp.mpf(z), mp.mpf(p), mp.mpf(alpha)

        def integrand(y: mp.mpf) -> mp.mpf:
            u = p * mp.expm1(y / z - 1 / (2 * z * z))
            return mp.npdf(y) * (mp.power(1 + u, alpha) - 1 - alpha * u)

        return mp.quad(integrand, _pieces(z, alpha))


def excess_backward(z: float, p: float, alpha: float, digits: int = 30) -> mp.mpf:
    """E_M (P/M)^α - 1, as above with the roles swapped."""
    with mp.workdps(digits):
        z, p, alpha = mp.mpf(z), mp.mpf(p), mp.mpf(alpha)

        def integrand(y: mp.mpf) -> mp.mpf:
            u = p * mp.expm1(y / z - 1 / (2 * z * z))
            # M (P/M)^α = P (1+u)^{1-α}; subtract its tangent at u = 0, whose mean is 1.
            return mp.npdf(y) * (mp.power(1 + u, 1 - alpha) - 1 - (1 - alpha) * u)

        return mp.quad(integrand, _pieces(z, alpha))


def divergence(excess: mp.mpf, alpha: float, digits: int = 30) -> mp.mpf:
    """Rényi divergence from E (ratio)^α - 1."""
    with mp.workdps(digits):
        return mp.log1p(excess) / (mp.mpf(alpha) - 1)


def gaussian_delta(mu: float, epsilon: float, digits: int = 60) -> mp.mpf:
    """δ of N(0,1) against N(μ,1) at ε (Balle & Wang 2018): Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)."""
    with mp.workdps(digits):
        mu, epsilon = mp.mpf(mu), mp.mpf(epsilon)

        def cdf(x: mp.mpf) -> mp.mpf:
            return mp.erfc(-x / mp.sqrt(2)) / 2

        return cdf(mu / 2 - epsilon / mu) - mp.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def _pieces(z: mp.mpf, alpha: mp.mpf) -> list[mp.mpf]:
    """Break points a few standard deviations apart, from -13 to 13 beyond the outermost mode."""
    end = alpha / z + 13
    count = int(mp.ceil((end + 13) / 2))
    return [-13 + (end + 13) * i / count for i in range(count + 1)]
