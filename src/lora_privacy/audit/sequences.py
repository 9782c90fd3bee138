"""Scores of texts under a causal language model, from the log-probabilities of their tokens.

A higher score means member. Shapes: N texts, T token positions, padding masked out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_privacy.audit._arrays import (
    Array,
    Mask,
    agree,
    boolean,
    finite,
    log_probabilities,
    refuse,
)

__all__ = ["mean_log_prob", "min_k", "min_k_plus_plus", "reference_calibrated"]


def mean_log_prob(*, token_log_probs: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """Mean log-probability of the tokens of a sequence: minus its loss a token, in nats.

    Its exponential, the geometric mean, lies in (0, 1] whatever the length; ``attack_p``, ``lira``
    and ``rmia`` take it for sequences.

    Args:
        token_log_probs: ln p(token | those before it), (N, T), <= 0 where ``mask`` is true; what
            stands at padding is never read.
        mask: True at tokens that count, bool (N, T), at least one a row. From lengths:
            ``np.arange(T) < lengths[:, None]``. The first token of a text has no prediction.

    Returns:
        (N,), <= 0.

    Raises:
        ValueError: A shape disagrees, a value is NaN, infinite or positive, or a row is empty.
        TypeError: ``mask`` is not boolean.

    >>> mean_log_prob(token_log_probs=[[-1.0, -2.0, np.nan]], mask=[[True, True, False]])
    array([-1.5])
    """
    values, counted = _tokens("token_log_probs", token_log_probs, mask)
    return np.sum(values, axis=1) / np.sum(counted, axis=1)


def reference_calibrated(
    *,
    token_log_probs: npt.ArrayLike,
    reference_token_log_probs: npt.ArrayLike,
    mask: npt.ArrayLike,
) -> Array:
    """Mean over the tokens of ln p_target - ln p_reference, in nats a token.

    Args:
        token_log_probs: As in ``mean_log_prob``, (N, T), under the target model.
        reference_token_log_probs: The same under one reference model with the same tokenizer, such
            as the model before fine-tuning, (N, T).
        mask: As in ``mean_log_prob``, (N, T).

    Raises:
        ValueError, TypeError: As in ``mean_log_prob``.

    References:
        Carlini et al., "Extracting Training Data from Large Language Models", USENIX Security
        2021, arXiv:2012.07805, which compares perplexities in this way.
    """
    values, counted = _tokens("token_log_probs", token_log_probs, mask)
    reference, _ = _tokens("reference_token_log_probs", reference_token_log_probs, mask)
    agree("reference_token_log_probs", reference.shape, values.shape)
    return np.sum(values - reference, axis=1) / np.sum(counted, axis=1)


def min_k(*, token_log_probs: npt.ArrayLike, mask: npt.ArrayLike, k: float = 0.2) -> Array:
    """Min-K%: the mean log-probability of the least likely share k of a sequence's tokens.

    Args:
        token_log_probs: As in ``mean_log_prob``, (N, T).
        mask: As in ``mean_log_prob``, (N, T).
        k: Share in (0, 1]; ⌊k · tokens⌋ of them count, at least one.

    Raises:
        ValueError, TypeError: As in ``mean_log_prob``, or k is out of range.

    References:
        Shi et al., "Detecting Pretraining Data from Large Language Models", ICLR 2024,
        arXiv:2310.16789.

    >>> min_k(token_log_probs=[[-1.0, -4.0, -2.0, -3.0]], mask=[[True] * 4], k=0.5)
    array([-3.5])
    """
    _check_k(k)
    values, counted = _tokens("token_log_probs", token_log_probs, mask)
    return _mean_of_least(values, counted, k)


def min_k_plus_plus(
    *,
    token_log_probs: npt.ArrayLike,
    means: npt.ArrayLike,
    stds: npt.ArrayLike,
    mask: npt.ArrayLike,
    k: float = 0.2,
) -> Array:
    """Min-K%++: Min-K% of (ln p - μ) / σ, each token standardised by its own prediction.

    μ and σ are the mean and standard deviation of ln p(w | context) for w drawn from the model's
    own p(w | context). A certain prediction, σ = 0 with ln p = μ, counts as 0.

    Args:
        token_log_probs: As in ``mean_log_prob``, (N, T).
        means: μ, (N, T), minus the entropy of the prediction in nats, <= 0.
        stds: σ >= 0, (N, T). Subtract μ before squaring: E[x²] - μ² cancels in float32.
        mask: As in ``mean_log_prob``, (N, T).
        k: As in ``min_k``.

    Raises:
        ValueError, TypeError: As in ``min_k``; or σ is negative, or 0 where ln p differs from μ.

    References:
        Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large
        Language Models", ICLR 2025, arXiv:2404.02936.
    """
    _check_k(k)
    values, counted = _tokens("token_log_probs", token_log_probs, mask)
    mean, _ = _tokens("means", means, mask)
    spread, _ = _tokens("stds", stds, mask, probabilities=False)
    agree("means", mean.shape, values.shape)
    agree("stds", spread.shape, values.shape)
    refuse("stds", spread < 0, "is negative; a standard deviation is not")
    gap = values - mean
    refuse(
        "stds",
        (spread == 0) & (gap != 0),
        "is 0 where the token's log-probability differs from the mean; compute it in float64",
    )
    scores = np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)
    return _mean_of_least(scores, counted, k)


def _tokens(
    name: str, values: npt.ArrayLike, mask: npt.ArrayLike, *, probabilities: bool = True
) -> tuple[Array, Mask]:
    """Values (N, T), 0 at padding, and the mask."""
    array = np.asarray(values, dtype=np.float64)
    agree(name, array.shape, (None, None))
    counted = boolean("mask", mask, array.shape)
    refuse("mask", ~np.any(counted, axis=1), "counts no token; leave empty sequences out")
    array = np.where(counted, array, 0.0)
    check = log_probabilities if probabilities else finite
    return check(name, array, None), counted


def _mean_of_least(values: Array, counted: Mask, k: float) -> Array:
    ordered = np.sort(np.where(counted, values, np.inf), axis=1)
    kept = np.maximum(np.floor(k * np.sum(counted, axis=1)), 1.0)
    positions = np.arange(values.shape[1], dtype=np.float64)
    least: Mask = np.less(positions, np.reshape(kept, (-1, 1)))
    return np.sum(ordered, axis=1, where=least) / kept


def _check_k(k: float) -> None:
    if not 0.0 < k <= 1.0:
        raise ValueError(f"k must lie in (0, 1], got {k!r}. It is a share: 20 % is 0.2.")
