"""The attack on observed updates: what it finds, and that no score beats a proved bound."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lora_privacy.audit.canary import gradient_canaries
from lora_privacy.audit.projection import asymmetry, projection_attack
from lora_privacy.data import plant_secrets, tickets
from lora_privacy.dp import NoisedProjection, PldAccountant, ProjectedGaussian, privacy_curve

Array = npt.NDArray[np.float64]


def samples(rng: np.random.Generator, count: int, n: int, m: int, tokens: int = 1) -> Array:
    """Per-sample gradients of norm 1: sums of ``tokens`` outer products, as a linear layer has."""
    left, right = rng.standard_normal((count, tokens, n)), rng.standard_normal((count, tokens, m))
    gradients = np.einsum("kti,ktj->kij", left, right)
    return gradients / np.linalg.norm(gradients, axis=(1, 2), keepdims=True)


def projection(rng: np.random.Generator, rank: int, m: int) -> Array:
    return rng.standard_normal((rank, m)) / math.sqrt(rank)


def auc(members: Array, others: Array) -> float:
    """Share of pairs in the right order, ties half; the loop over pairs written as a table."""
    difference = np.subtract.outer(np.ravel(members), np.ravel(others))
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def auc_error(count: int) -> float:
    """Standard error of an AUC over ``count`` members and as many others, at most."""
    return 0.5 / math.sqrt(count)


# What it finds without noise.


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_members_of_a_batch_are_found(rank: int) -> None:
    """384 × 384, batches of 16 and 64, A secret, the rest of the batch known: AUC at least .99."""
    rng = np.random.default_rng(rank)
    members, others, strangers = [], [], []
    for batch in (16, 64, 16, 64):
        gradients = samples(rng, batch + 4, 384, 384)
        total = gradients[:batch].sum(axis=0) / batch
        a = projection(rng, rank, 384)
        update = -0.01 * (total @ a.T) @ a
        for one in gradients[:3] / batch:
            found = projection_attack(update, one[None], known=total - one)
            members.append(found[0])
        scores = projection_attack(update, gradients[batch:] / batch, known=total)
        others.extend(scores)
        # Candidates that are not in the batch, beside a rest from which a member is missing.
        rest = total - gradients[0] / batch
        strangers.extend(projection_attack(update, gradients[batch:] / batch, known=rest))
    assert auc(np.array(members), np.array(others)) >= 0.99
    assert min(members) > 20 > 10 > max(map(abs, strangers))
    assert max(others) < -20


@pytest.mark.parametrize(
    ("rank", "batch", "least"), [(8, 16, 0.99), (64, 64, 0.99), (2, 16, 0.97)]
)
def test_the_sample_alone_is_enough(rank: int, batch: int, least: float) -> None:
    """Nothing known but the base model: alignment alone. AUC at the level stated."""
    rng = np.random.default_rng(40 + rank)
    members, others = [], []
    for _ in range(4):
        gradients = samples(rng, batch + 32, 384, 384)
        a = projection(rng, rank, 384)
        update = -(gradients[:batch].sum(axis=0) @ a.T) @ a
        scores = projection_attack(update, gradients)
        members.append(scores[:batch])
        others.append(scores[batch:])
    assert auc(np.concatenate(members), np.concatenate(others)) >= least


def test_another_update_is_rejected() -> None:
    """Right batch, other update: no asymmetry vanishes; alignment is N(0, 1) at KS level 1e-3.

    The same test must reject the scores of members against their own update.
    """
    rng = np.random.default_rng(5)
    own, wrong = [], []
    for _ in range(60):
        first, second = samples(rng, 16, 40, 50, 8), samples(rng, 16, 40, 50, 8)
        a = projection(rng, 8, 50)
        updates = [-(g.sum(axis=0) @ a.T) @ a for g in (first, second)]
        assert asymmetry(updates[0], first.sum(axis=0)[None])[0] < 1e-14
        assert asymmetry(updates[1], first.sum(axis=0)[None])[0] > 0.1
        score = projection_attack(updates[1], first[:1], known=first[1:].sum(axis=0))[0]
        assert abs(score) < 1
        own.append(projection_attack(updates[0], first[:1])[0])
        wrong.append(projection_attack(updates[1], first[:1])[0])
    assert stats.kstest(wrong, "norm").pvalue > 1e-3
    assert stats.kstest(own, "norm").pvalue < 1e-3


def test_an_empty_rest_explains_no_update() -> None:
    """A batch of one: the right candidate is certain, another scores like a random matrix."""
    rng = np.random.default_rng(19)
    candidates, a = samples(rng, 5, 20, 30, 4), projection(rng, 4, 30)
    update = -(candidates[0] @ a.T) @ a
    scores = projection_attack(update, candidates, known=np.zeros((20, 30)))
    assert scores[0] > 20
    assert np.all(np.abs(scores[1:]) < 1)


@pytest.mark.parametrize("law", ["uniform", "rademacher"])
def test_symmetry_needs_no_law_of_a(law: str) -> None:
    """Any A, any step size, either sign; single precision leaves an asymmetry of about 1e-6."""
    rng = np.random.default_rng(6)
    gradients = samples(rng, 8, 30, 40)
    a = rng.uniform(-1, 1, (4, 40)) if law == "uniform" else rng.choice([-1.0, 1.0], (4, 40))
    total = gradients.sum(axis=0)
    update = (total @ a.T) @ a
    scaled = [
        projection_attack(c * update, gradients[:1], known=total - gradients[0])
        for c in (1.0, -3e-7)
    ]
    assert scaled[0] == pytest.approx(scaled[1], abs=2)
    assert scaled[0] > 20
    single = [x.astype(np.float32) for x in (update, gradients, total)]
    assert asymmetry(single[0], single[2][None])[0] < 3e-6
    assert asymmetry(single[0], (single[2] - single[1][0])[None])[0] > 0.01


def test_steps_with_one_matrix_are_one_taller_step() -> None:
    """Two steps with one A find what neither finds alone: every gradient a multiple of one row.

    A layer with one output has symmetric products whatever the batch, so one step says nothing.
    The sum of the updates is an update of the sum.
    """
    rng = np.random.default_rng(7)
    a = projection(rng, 3, 20)
    gradients = rng.standard_normal((9, 2, 1, 20))  # samples, steps
    total = gradients[:8].sum(axis=0)
    update = -0.1 * (total @ a.T) @ a
    rest = total - gradients[0]
    alone = projection_attack(update[0], gradients[:, 0], known=rest[0])
    assert alone == pytest.approx(np.zeros(9), abs=1e-12)
    both = projection_attack(update, gradients, known=rest)
    assert both[0] > 20
    assert np.all(np.abs(both[1:]) < 5)
    tall = projection_attack(
        update.reshape(2, 20), gradients.reshape(9, 2, 20), known=rest.reshape(2, 20)
    )
    assert both == pytest.approx(tall, abs=1e-12)
    gradients = samples(rng, 9, 6, 20).reshape(9, 1, 6, 20) * rng.uniform(0.5, 2, (9, 3, 1, 1))
    total = gradients[:8].sum(axis=(0, 1))
    update = -0.1 * (total @ a.T) @ a
    member = gradients[:1].sum(axis=1)
    assert projection_attack(update, member, known=total - member[0])[0] > 20


def test_planted_tickets_are_found() -> None:
    """Real sentences: softmax regression on hashed letter pairs, coin-flipped secrets, rank 2."""
    train, secrets = plant_secrets(tickets(24, seed=3), 12, seed=4)
    texts = [*train.texts[:24], *(secret.text for secret in secrets)]
    labels = [*(train.labels or ())[:24], *(secret.label or 0 for secret in secrets)]
    inside = np.array([True] * 24 + [secret.included for secret in secrets])
    features = np.zeros((len(texts), 64))
    for row, text in enumerate(texts):
        for pair in itertools.pairwise(text):
            features[row, (ord(pair[0]) * 31 + ord(pair[1])) % 64] += 1
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    error = np.full((len(texts), 8), 1 / 8) - np.eye(8)[labels]
    gradients = np.einsum("ki,kj->kij", error, features)
    a = np.random.default_rng(8).uniform(-1 / 8, 1 / 8, (2, 64))  # the default of PEFT
    total = gradients[inside].sum(axis=0)
    update = -0.5 * (total @ a.T) @ a
    scores = [
        projection_attack(update, g[None], known=total - g if secret.included else total)[0]
        for g, secret in zip(gradients[24:], secrets, strict=True)
    ]
    coins = np.array([secret.included for secret in secrets])
    assert 0 < coins.sum() < 12
    assert auc(np.array(scores)[coins], np.array(scores)[~coins]) == 1.0


# Each statistic against a slow, direct one.


def test_asymmetry_is_its_definition() -> None:
    """Oracle: the loops of the definition; 1e-12 relative, for right and wrong gradients."""
    rng = np.random.default_rng(9)
    gradients = rng.standard_normal((3, 5, 7))
    a = rng.standard_normal((2, 7))
    update = gradients[0] @ a.T @ a
    found = asymmetry(update, gradients)
    for one, value in zip(gradients, found, strict=True):
        p = [[sum(one[i, k] * update[j, k] for k in range(7)) for j in range(5)] for i in range(5)]
        odd = sum((p[i][j] - p[j][i]) ** 2 for i in range(5) for j in range(5))
        size = sum(p[i][j] ** 2 for i in range(5) for j in range(5))
        assert value == pytest.approx(math.sqrt(odd / size) / 2, rel=1e-12, abs=1e-15)


def dense_covariance(gradient: Array, rank: int, noise_std: float) -> Array:
    """Of vec(G AᵀA + E), from E[M_ab M_cd] = δ_ab δ_cd + (δ_ac δ_bd + δ_ad δ_bc)/r (Isserlis)."""
    n, m = gradient.shape
    moment = np.zeros((m, m, m, m))
    for a in range(m):
        for b in range(m):
            for c in range(m):
                for d in range(m):
                    moment[a, b, c, d] = ((a == c) * (b == d) + (a == d) * (b == c)) / rank
    covariance = np.einsum("ia,abcd,kc->ibkd", gradient, moment, gradient)
    return covariance.reshape(n * m, n * m) + noise_std**2 * np.eye(n * m)


@pytest.mark.parametrize(("n", "m"), [(3, 5), (4, 4), (6, 3), (1, 4)])
@pytest.mark.parametrize("noise_std", [0.03, 1.0])
def test_likelihood_ratio_under_a_secret_matrix(n: int, m: int, noise_std: float) -> None:
    """Oracle: scipy's dense normal density; the rest may be empty; 1e-9 absolute + relative."""
    rng = np.random.default_rng(10 * n + m)
    rank, step = 2, 0.2
    candidates, rest = rng.standard_normal((3, n, m)), rng.standard_normal((n, m))
    for known in (rest, np.zeros((n, m))):
        a = projection(rng, rank, m)
        release = (known + candidates[0]) @ a.T @ a + noise_std * rng.standard_normal((n, m))
        found = projection_attack(
            -step * release,
            candidates,
            known=known,
            noise_std=noise_std,
            rank=rank,
            step_size=step,
        )
        log = [
            stats.multivariate_normal.logpdf(
                release.ravel(), g.ravel(), dense_covariance(g, rank, noise_std)
            )
            for g in (known, *(known + c for c in candidates))
        ]
        assert found == pytest.approx(np.array(log[1:]) - log[0], rel=1e-9, abs=1e-9)


def test_likelihood_ratio_becomes_symmetry_as_noise_vanishes() -> None:
    """σ² times the ratio tends to half the squared part of Y that no symmetric matrix explains.

    Oracle: least squares over all symmetric matrices; 1e-4 relative at σ = 1e-4.
    """
    rng = np.random.default_rng(11)
    n, m, std = 4, 5, 1e-4
    g, rest = rng.standard_normal((n, m)), rng.standard_normal((n, m))
    a = projection(rng, 2, m)
    release = (g + rest) @ a.T @ a
    pairs = [(i, j) for i in range(m) for j in range(i, m)]
    columns = []
    for i, j in pairs:
        s = np.zeros((m, m))
        s[i, j] = s[j, i] = 1
        columns.append((rest @ s).ravel())
    design = np.array(columns).T
    best = np.linalg.lstsq(design, release.ravel(), rcond=None)[0]
    misfit = float(np.sum((release.ravel() - design @ best) ** 2))
    found = projection_attack(-release, g[None], known=rest, noise_std=std, rank=2, step_size=1.0)[
        0
    ]
    assert found * std**2 == pytest.approx(misfit / 2, rel=1e-4, abs=0)


@pytest.mark.parametrize("place", ["gradient", "release"])
def test_likelihood_ratio_under_a_public_matrix(place: str) -> None:
    """Oracle: scipy's normal density with covariance σ²AAᵀ or σ²I; two steps; 1e-10."""
    rng = np.random.default_rng(12)
    a = rng.uniform(-2, 2, (3, 6))
    candidates, rest = rng.standard_normal((2, 2, 4, 6)), rng.standard_normal((2, 4, 6))
    noise = 0.7 * rng.standard_normal((2, 4, 6 if place == "gradient" else 3))
    noise = noise @ a.T if place == "gradient" else noise
    release = (rest + candidates[0]) @ a.T + noise
    found = projection_attack(
        -0.1 * release, candidates, known=rest, a=a, noise_std=0.7, noise_at=place, step_size=0.1
    )
    covariance = 0.49 * (a @ a.T if place == "gradient" else np.eye(3))

    def log(gradient: Array) -> float:
        rows = (release - gradient @ a.T).reshape(-1, 3)
        return float(np.sum(stats.multivariate_normal.logpdf(rows, np.zeros(3), covariance)))

    expected = [log(rest + c) - log(rest) for c in candidates]
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_a_public_matrix_without_noise_leaves_a_residual() -> None:
    """Oracle: log ‖residual without‖/‖residual with‖, 1e-10; a member is certain."""
    rng = np.random.default_rng(13)
    a = projection(rng, 3, 6)
    candidates, rest = rng.standard_normal((2, 4, 6)), rng.standard_normal((4, 6))
    release = (rest + candidates[0]) @ a.T
    found = projection_attack(-release, candidates, known=rest, a=a, step_size=1.0)
    assert found[0] > 25
    norms = [np.linalg.norm(release - g @ a.T) for g in (rest, rest + candidates[1])]
    assert found[1] == pytest.approx(math.log(norms[0] / norms[1]), rel=1e-10, abs=0)


def test_alignment_is_its_definition() -> None:
    """Oracle: dense inverses, one for each reference left out; 1e-9 relative.

    With A public the cosine is taken with G Q, with A secret Q is the row space of the update.
    """
    rng = np.random.default_rng(14)
    a = rng.uniform(-2, 2, (2, 6))
    gradients, reference = rng.standard_normal((5, 3, 6)), rng.standard_normal((7, 3, 6))
    q = np.linalg.qr(a.T)[0]
    total = gradients[:3].sum(axis=0)
    seen = {
        "public": (total @ q).ravel(),
        "secret": (total @ a.T @ a @ q).ravel(),
    }
    for who, y in seen.items():
        rows, others = ((g @ q).reshape(len(g), -1) for g in (gradients, reference))

        def score(x: Array, c: Array, y: Array = y) -> float:
            inverse = np.linalg.inv(c)
            return float(x @ inverse @ y / math.sqrt(x @ inverse @ x))

        second = 0.95 / 7 * others.T @ others
        ridge = 0.05 * np.sum(others**2) / others.size * np.eye(6)
        null = [score(x, second + ridge - 0.95 / 7 * np.outer(x, x)) for x in others]
        raw = np.array([score(x, second + ridge) for x in rows])
        expected = (raw - np.mean(null)) / np.std(null, ddof=1)
        plain = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) * math.sqrt(6) for x in rows]
        update = -total @ a.T if who == "public" else -total @ a.T @ a
        known = {"a": a} if who == "public" else {}
        found = projection_attack(update, gradients, reference=reference, **known)
        assert found == pytest.approx(expected, rel=1e-9, abs=0)
        assert projection_attack(update, gradients, **known) == pytest.approx(plain, rel=1e-9)


def test_reference_gradients_help_where_gradients_are_alike() -> None:
    """Inputs with a common mean and decaying variances: AUC from below .9 to above .95."""
    rng = np.random.default_rng(15)
    x, y = (np.exp(-np.arange(96) / 8) + 0.05 for _ in range(2))

    def draw(count: int) -> Array:
        left, right = rng.standard_normal((count, 96)) * y, rng.standard_normal((count, 96)) * x
        return np.einsum("ki,kj->kij", left, right + x)

    plain, aided = ([], []), ([], [])
    for _ in range(8):
        batch, others, reference = draw(16), draw(16), draw(400)
        a = projection(rng, 8, 96)
        update = -(batch.sum(axis=0) @ a.T) @ a
        for k, group in enumerate((batch, others)):
            plain[k].extend(projection_attack(update, group))
            aided[k].extend(projection_attack(update, group, reference=reference))
    assert auc(np.array(plain[0]), np.array(plain[1])) < 0.9
    assert auc(np.array(aided[0]), np.array(aided[1])) > 0.95
    assert np.mean(aided[1]) == pytest.approx(0, abs=0.5)


# With noise: the attack weakens, and stays below what is proved.


def largest_auc(tpr_bound: Callable[[Array], Array]) -> float:
    """Upper sum of ∫ TPR d FPR for a curve that does not fall."""
    edges = np.concatenate([[0.0], np.logspace(-6, 0, 800)])
    return float(np.sum(np.diff(edges) * np.minimum(1.0, tpr_bound(edges[1:]))))


def public_scores(
    rng: np.random.Generator,
    trials: int,
    rank: int,
    noise_std: float,
    canary: Array | None = None,
    a: Array | None = None,
) -> tuple[Array, Array]:
    """Scores with and without a canary of norm 1, for (G + E)Aᵀ; a fresh A unless one is given."""
    n, m = 4, 24
    scores = np.zeros((2, trials))
    for trial in range(trials):
        g = samples(rng, 3, n, m)
        g[0] = g[0] if canary is None else canary
        matrix = projection(rng, rank, m) if a is None else a
        for k in (0, 1):
            noise = noise_std * rng.standard_normal((n, m))
            release = (g[1:].sum(axis=0) + k * g[0] + noise) @ matrix.T
            scores[k, trial] = projection_attack(
                -release,
                g[:1],
                known=g[1] + g[2],
                a=matrix,
                noise_std=noise_std,
                noise_at="gradient",
                step_size=1.0,
            )[0]
    return scores[1], scores[0]


@pytest.mark.parametrize("noise_std", [0.3, 1.0, 3.0])
def test_fresh_projections_keep_their_bound(noise_std: float) -> None:
    """AUC of 2,000 + 2,000 releases against the most that ProjectedGaussian allows, at 4 errors.

    Oracle of the value itself: given shares β, β' the log ratios are normal, so that the AUC is
    E Φ(√(β+β')/(2σ)) for a candidate of rank one.
    """
    rng = np.random.default_rng(int(10 * noise_std))
    trials, rank = 2_000, 4
    found = auc(*public_scores(rng, trials, rank, noise_std))
    event = ProjectedGaussian([(24, rank)], noise_std)
    bound = largest_auc(privacy_curve(PldAccountant().compose(event)).tpr_bound)
    share = stats.beta(rank / 2, (24 - rank) / 2).rvs((2, 200_000), random_state=rng).sum(axis=0)
    expected = float(np.mean(stats.norm.cdf(np.sqrt(share) / (2 * noise_std))))
    assert found == pytest.approx(expected, abs=4 * auc_error(trials))
    assert expected <= bound
    assert found <= bound + 4 * auc_error(trials)
    if noise_std == 3.0:
        assert found < 0.56


def test_a_reused_matrix_and_half_the_noise_break_the_bound() -> None:
    """The check above can fail: a canary aligned with a reused A, and half the noise claimed."""
    rng = np.random.default_rng(16)
    trials, rank = 1_500, 4
    event = ProjectedGaussian([(24, rank)], 1.0)
    bound = largest_auc(privacy_curve(PldAccountant().compose(event)).tpr_bound)
    limit = bound + 4 * auc_error(trials)
    a = projection(rng, rank, 24)
    canary = gradient_canaries("aligned", shape=(4, 24), norm=1.0, count=1, random_state=rng, a=a)[
        0
    ]
    reused = auc(*public_scores(rng, trials, rank, 1.0, canary, a))
    assert reused == pytest.approx(stats.norm.cdf(math.sqrt(0.5)), abs=4 * auc_error(trials))
    assert reused > limit
    assert auc(*public_scores(rng, trials, rank, 1.0, canary)) < limit  # A fresh: no harm
    assert auc(*public_scores(rng, trials, rank, 0.5)) > limit


def test_noise_after_a_secret_projection() -> None:
    """AUC falls to chance; it stays below the pair's proved ε and below the test that sees A.

    One row of the gradient differs, as NoisedProjection needs. 500 + 500 releases a level
    of noise, comparisons at 4 standard errors; a matched filter is worse where noise is small.
    """
    rng = np.random.default_rng(17)
    n, m, rank, trials = 8, 24, 4, 500
    row = np.zeros((1, n, m))
    row[0, 0] = rng.standard_normal(m) / 5
    rest = samples(rng, 4, n, m).sum(axis=0)
    found, matched, revealed = [], [], []
    for std in (0.01, 0.1, 0.3, 1.0, 10.0):
        scores = np.zeros((3, 2, trials))
        for trial in range(trials):
            for k in (0, 1):
                projected = (a := projection(rng, rank, m)).T @ a
                noisy = (rest + k * row[0]) @ projected + std * rng.standard_normal((n, m))
                shift = row[0] @ projected
                scores[0, k, trial] = projection_attack(
                    -noisy, row, known=rest, noise_std=std, rank=rank, step_size=1.0
                )[0]
                scores[1, k, trial] = np.vdot(noisy - rest, row[0])
                residual = noisy - rest @ projected
                scores[2, k, trial] = np.vdot(residual - shift / 2, shift) / std**2
        for kept, values in zip((found, matched, revealed), scores, strict=True):
            kept.append(auc(values[1], values[0]))
        pair = NoisedProjection(rest.T, (rest + row[0]).T, rank, std)
        deltas = np.logspace(-6, -0.05, 12)
        costs = np.exp([min(pair.epsilon(float(d)).epsilon, 500.0) for d in deltas])

        def allowed(fpr: Array, costs: Array = costs, deltas: Array = deltas) -> Array:
            one = deltas[:, None] + costs[:, None] * fpr
            other = 1 - (1 - deltas[:, None] - fpr) / costs[:, None]
            return np.minimum(one, other).min(axis=0)

        assert found[-1] <= largest_auc(allowed) + 4 * auc_error(trials)
        assert found[-1] <= revealed[-1] + 4 * auc_error(trials)
    assert found[0] > 0.99
    assert found[:4] == sorted(found[:4], reverse=True)
    assert found[-1] == pytest.approx(0.5, abs=4 * auc_error(trials))
    assert found[0] > matched[0] + 4 * auc_error(trials)


# What it refuses.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"candidates": np.ones((3, 4))}, r"candidates must have shape \(count, n, m\)"),
        ({"update": np.ones((4, 3))}, r"update must have shape \(3, 4\)"),
        ({"update": np.full((3, 4), np.nan)}, "update.* is NaN or infinite"),
        ({"update": np.zeros((3, 4))}, "update must not be all zero"),
        ({"known": np.ones((1, 3, 4))}, r"known must have shape \(3, 4\)"),
        ({"known": None, "noise_std": 1.0, "rank": 2}, "noise_std and rank would have no effect"),
        ({"step_size": 1.0}, "step_size would have no effect"),
        ({"noise_std": 1.0, "step_size": 1.0}, "rank must be given"),
        ({"noise_std": 1.0, "rank": 2}, "step_size must be given"),
        ({"noise_std": 1.0, "rank": 0, "step_size": 1.0}, "rank must be at least 1"),
        ({"noise_std": math.inf}, "noise_std must be finite"),
        ({"noise_std": 1.0, "noise_at": "gradient"}, "needs a"),
        ({"noise_at": "weights"}, "noise_at must be one of"),
        ({"reference": np.ones((2, 3, 4))}, "reference is for attacks without known"),
        ({"known": None, "reference": np.ones((1, 3, 4))}, "at least 2"),
        ({"known": None, "reference": np.zeros((3, 3, 4))}, "does not map to 0"),
        ({"known": None, "reference": np.ones((3, 3, 4))}, "must hold gradients that differ"),
        ({"a": np.ones((2, 5))}, r"a must have shape"),
        ({"a": np.ones((2, 4)), "update": np.ones((3, 2))}, "independent rows"),
        ({"a": np.eye(4), "update": np.ones((3, 4)), "rank": 4}, "rank would have no effect"),
        ({"a": np.eye(4), "update": np.ones((3, 4))}, "step_size must be given"),
        ({"a": np.ones((5, 4)), "update": np.ones((3, 5))}, "as many rows as columns"),
    ],
)
def test_what_is_refused(change: dict[str, object], match: str) -> None:
    """A bad or useless argument is named, with what to do."""
    rng = np.random.default_rng(18)
    arguments: dict[str, object] = {
        "update": rng.standard_normal((3, 4)),
        "candidates": rng.standard_normal((2, 3, 4)),
        "known": rng.standard_normal((3, 4)),
    }
    with pytest.raises(ValueError, match=match):
        projection_attack(**{**arguments, **change})  # type: ignore[arg-type]
