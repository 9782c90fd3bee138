"""Figures of a privacy curve: δ against ε, and what it leaves to an attacker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lora_privacy.assess.accounting import at_most
from lora_privacy.assess.plots import _SETTINGS, _STYLES

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from lora_privacy.dp import PrivacyBound
    from lora_privacy.dp.curve import PrivacyCurve

__all__ = ["plot_profile", "plot_trade_off", "write_figure"]

_KINDS = (".png", ".svg", ".pdf")


def write_figure(path: Path, curve: PrivacyCurve, marked: PrivacyBound | None = None) -> None:
    """Draw both figures beside each other into ``path``.

    Args:
        path: Ends in ``.png``, ``.svg`` or ``.pdf``.
        curve: What is drawn.
        marked: A bound to mark on the curve.

    Raises:
        ValueError: The ending is another one.
        OSError: The file cannot be written.
    """
    if path.suffix not in _KINDS:
        raise ValueError(f"The plot must end in {', '.join(_KINDS)}, got {path.name!r}.")
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(8.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_profile(curve, left, marked)
        plot_trade_off(curve, right)
        # No date, so that the same numbers give the same file.
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=150, metadata=dates.get(path.suffix))


def plot_profile(curve: PrivacyCurve, ax: Axes, marked: PrivacyBound | None = None) -> Axes:
    """Proved δ against ε; ``marked`` is drawn as a point with its numbers."""
    finite = [bound for bound in curve.bounds if np.isfinite(bound.epsilon)]
    colour, _, line = _STYLES[0]
    ax.plot(
        [bound.epsilon for bound in finite],
        [bound.delta for bound in finite],
        line,
        color=colour,
        label=f"proved by {curve.method}",
    )
    if marked is not None and np.isfinite(marked.epsilon):
        colour, marker, _ = _STYLES[1]
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


def plot_trade_off(curve: PrivacyCurve, ax: Axes) -> Axes:
    """Least false-negative rate of any attack against its false-positive rate."""
    fpr = np.concatenate([np.logspace(-6, -2, 81), np.linspace(0.01, 1, 200)])
    colour, _, line = _STYLES[0]
    ax.plot(fpr, curve.trade_off(fpr), line, color=colour, label="any attack is above")
    ax.fill_between(fpr, curve.trade_off(fpr), 1 - fpr, color=colour, alpha=0.12, linewidth=0)
    colour, _, line = _STYLES[2]
    ax.plot([0, 1], [1, 0], line, color=colour, label="blind guessing")
    ax.plot([], [], " ", label=f"advantage ≤ {at_most(curve.advantage())}")
    ax.set_aspect("equal")
    ax.set_xlabel("false-positive rate")
    ax.set_ylabel("false-negative rate")
    ax.set_title(f"trade-off, {curve.adjacency}")
    ax.legend(loc="upper right")
    return ax
