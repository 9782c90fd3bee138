"""The file that ``lora-privacy account --plot`` writes: both figures of a privacy curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from lora_privacy.assess.figure_style import METADATA, SETTINGS
from lora_privacy.plots import plot_profile, plot_trade_off

if TYPE_CHECKING:
    from pathlib import Path

    from lora_privacy.dp import PrivacyBound
    from lora_privacy.dp.curve import PrivacyCurve

__all__ = ["write_figure"]


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
    kind = path.suffix.removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"The plot must end in .{', .'.join(METADATA)}, got {path.name!r}.")
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_profile(curve, left, marked)
        plot_trade_off(curve, right)
        figure.savefig(path, dpi=150, metadata=METADATA[kind])
