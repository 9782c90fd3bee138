"""Figures of single results: a law, a privacy curve, an attack. Each labels its units.

Each takes the result and an ``ax`` of matplotlib and returns the ``ax``. Without one it makes a
new figure, which a notebook shows. Nothing is saved or shown here, and matplotlib is imported
only for a new figure. Figures of a whole assessment are in ``lora_privacy.assess.plots``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_privacy._digits import at_most
from lora_privacy.noise import EntryNoise, tv_to_gaussian

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

    from lora_privacy.audit import RocCurve
    from lora_privacy.dp import Adjacency, PrivacyBound, PrivacyCurve

__all__ = ["STYLES", "TradeOff", "plot_law", "plot_profile", "plot_roc", "plot_trade_off"]

#: Colour, marker and line of the first series, the second, …: told apart in grey print too.
STYLES = (("#1b4f8a", "o", "-"), ("#c8553d", "s", "--"), ("#4a4a4a", "^", ":"))

_REACH = 4.5  # of the drawn part of a law, in standard deviations
_POINTS = 600  # even, so that no point is at the centre, where a law of rank 1 is infinite


class TradeOff(Protocol):
    """What bounds the errors of any attack; ``PrivacyCurve`` and ``PldAccountant`` do."""

    @property
    def adjacency(self) -> Adjacency:
        """Neighbouring relation."""
        ...

    def trade_off(self, fpr: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Lower bound on the false-negative rate at ``fpr``."""
        ...

    def advantage(self) -> float:
        """Upper bound on true minus false positive rate."""
        ...


def plot_law(law: EntryNoise, ax: Axes | None = None) -> Axes:
    """Density of one entry of the noise, and of the Gaussian with its mean and variance.

    The label says how far apart they are; ``ax.set_yscale("log")`` shows the tails.
    """
    ax = _axes(ax)
    std, mean = law.std(), law.mean()
    x = mean + std * np.linspace(-_REACH, _REACH, _POINTS)
    distance = tv_to_gaussian(law)
    colour, _, line = STYLES[0]
    ax.plot(x, law.pdf(x), line, color=colour, label=f"noise of rank {law.rank}")
    colour, _, line = STYLES[1]
    gaussian = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    label = f"Gaussian at total variation {distance.value:.3g}"
    ax.plot(x, gaussian, line, color=colour, label=label)
    ax.set_xlabel("noise of an entry, in units of the gradient")
    ax.set_ylabel("density, per unit of the gradient")
    ax.set_title("law of the noise, not a guarantee")
    ax.legend(loc="best")
    return ax


def plot_profile(
    curve: PrivacyCurve, ax: Axes | None = None, marked: PrivacyBound | None = None
) -> Axes:
    """Proved δ against ε; ``marked`` is drawn as a point with its numbers."""
    ax = _axes(ax)
    finite = [bound for bound in curve.bounds if np.isfinite(bound.epsilon)]
    colour, _, line = STYLES[0]
    ax.plot(
        [bound.epsilon for bound in finite],
        [bound.delta for bound in finite],
        line,
        color=colour,
        label=f"proved by {curve.method}",
    )
    if marked is not None and np.isfinite(marked.epsilon):
        colour, marker, _ = STYLES[1]
        ax.plot(
            [marked.epsilon],
            [marked.delta],
            marker,
            color=colour,
            label=f"ε ≤ {at_most(marked.epsilon)} at δ = {at_most(marked.delta)}",
        )
    ax.set_yscale("log")
    ax.set_xlabel("ε, nats")
    ax.set_ylabel("δ, at most")
    ax.set_title(f"privacy profile, {curve.adjacency}")
    ax.legend(loc="best")
    return ax


def plot_trade_off(
    curve: TradeOff, ax: Axes | None = None, label: str = "any attack is above"
) -> Axes:
    """Least false-negative rate of any attack against its false-positive rate.

    Call it again with the same ``ax`` and other labels to compare runs.
    """
    ax = _axes(ax)
    colour, _, line = _next_style(ax, [0, 1], [1, 0])
    fpr = np.concatenate([np.logspace(-6, -2, 81), np.linspace(0.01, 1, 200)])
    least = curve.trade_off(fpr)
    label = f"{label}, advantage ≤ {at_most(curve.advantage())}"
    ax.plot(fpr, least, line, color=colour, label=label)
    ax.fill_between(fpr, least, 1 - fpr, color=colour, alpha=0.12, linewidth=0)
    ax.set_aspect("equal")
    ax.set_xlabel("false-positive rate")
    ax.set_ylabel("false-negative rate")
    ax.set_title(f"trade-off, {curve.adjacency}")
    ax.legend(loc="upper right", fontsize=8)
    return ax


def plot_roc(curve: RocCurve, ax: Axes | None = None, label: str = "attack") -> Axes:
    """True against false positive rate of one attack on these scores, without an interval.

    Both axes are logarithmic: what an attack gets at few false positives is what matters. Call it
    again with the same ``ax`` and other labels to compare attacks.
    """
    ax = _axes(ax)
    seen = [float(rate) for rates in (curve.fpr, curve.tpr) for rate in rates if rate > 0]
    least = min(seen)
    guess = np.geomspace(least, 1, 50)
    colour, _, line = _next_style(ax, guess, guess)
    # Rates of 0 have no place on the axes; a step up from the edge keeps the first true positives.
    fpr = np.maximum(curve.fpr, least)
    ax.step(fpr, curve.tpr, line, color=colour, where="post", label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("false-positive rate")
    ax.set_ylabel("true-positive rate")
    ax.set_title("evidence, not a guarantee")
    ax.legend(loc="lower right")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.2, 3.9), layout="constrained")[1]


def _next_style(ax: Axes, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[str, str, str]:
    """Style of a further curve; on an empty ``ax`` the line of blind guessing is drawn first."""
    if not ax.lines:
        ax.plot(x, y, "-", color="#9a9a9a", linewidth=0.8, label="blind guessing")
    return STYLES[(len(ax.lines) - 1) % len(STYLES)]
