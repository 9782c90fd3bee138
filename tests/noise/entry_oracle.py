"""The law of one entry from the definitions, in mpmath; nothing of ours is used."""

import mpmath as mp


def log_bessel_density(rank: int, rho: mp.mpf, t: mp.mpf) -> mp.mpf:
    """Gaunt's variance-gamma density of t = r(x + ρ), in mpmath."""
    nu, spread = mp.mpf(rank - 1) / 2, 1 - rho**2
    constant = mp.log(mp.pi * spread) / 2 + mp.loggamma(mp.mpf(rank) / 2)
    return nu * mp.log(abs(t) / 2) + rho * t / spread + log_k(rank, abs(t) / spread) - constant


def log_k(rank: int, z: mp.mpf) -> mp.mpf:
    """Logarithm of K_(rank-1)/2: the finite sum of DLMF 10.49.12 for even rank, else mpmath's."""
    if rank % 2:
        return mp.log(mp.besselk(mp.mpf(rank - 1) / 2, z))
    n, term, total = rank // 2 - 1, mp.mpf(1), mp.mpf(1)
    for j in range(n):
        term *= mp.mpf((n + j + 1) * (n - j)) / ((j + 1) * 2 * z)
        total += term
    return mp.log(mp.pi / (2 * z)) / 2 - z + mp.log(total)


def even_upper(rank: int, rho: mp.mpf, t: mp.mpf) -> mp.mpf:
    """P(Z > t) for even rank and t >= 0: a finite sum, negative binomial times Poisson tail."""
    k, alpha, beta = rank // 2, 1 + rho, 1 - rho
    poisson, term = [], mp.exp(-t / alpha)
    for j in range(k):
        poisson.append(term + (poisson[-1] if poisson else 0))
        term *= t / alpha / (j + 1)
    total, weight = mp.mpf(0), (alpha / 2) ** k
    for i in range(k):
        total += weight * poisson[k - 1 - i]
        weight *= (beta / 2) * (k + i) / (i + 1)
    return total


def odd_upper(rank: int, rho: mp.mpf, t: mp.mpf) -> mp.mpf:
    """P(Z > t) for rank 1 or 3 and t >= 0: the χ² tail in erfc, averaged over Y = w²."""

    def integrand(w: mp.mpf) -> mp.mpf:
        u = (2 * t + (1 - rho) * w**2) / (2 * (1 + rho))
        tail = mp.erfc(mp.sqrt(u))
        if rank == 3:
            tail += 2 * mp.sqrt(u / mp.pi) * mp.exp(-u)
        return 2 * mp.npdf(w) * w ** (rank - 1) * tail * scale

    # mpmath's tolerance is absolute: bring the integral to the size of 1.
    scale = mp.exp(t / (1 + rho))
    return mp.quad(integrand, [0, 0.25, 1, 4, 10, 20]) / scale


def upper_tail(rank: int, rho: float, x: float) -> mp.mpf:
    """P(N > x) at ‖q‖ = 1."""
    if rho == 1.0:
        k = mp.mpf(rank) / 2
        return mp.gammainc(k, k * (1 + mp.mpf(x)), regularized=True)
    at, cosine = mp.mpf(x), mp.mpf(rho)
    t = rank * (at + cosine)
    beyond = even_upper if rank % 2 == 0 else odd_upper
    if t >= 0:
        return beyond(rank, cosine, t)
    return 1 - beyond(rank, -cosine, -t)
