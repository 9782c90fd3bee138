"""What figures of reports share: series that survive a grey print, fonts, files without dates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_privacy.plots import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["METADATA", "SERIES", "SETTINGS", "legend_above", "series"]

#: As ``lora_privacy.plots.STYLES``, and more of them: an assessment may compare many methods.
SERIES = (
    *STYLES,
    ("#2e7d4f", "D", "-."),
    ("#7b3fa0", "v", (0, (6, 1.5))),
    ("#9a6a00", "P", (0, (1, 1))),
    ("#00738c", "X", (0, (3, 1, 1, 1, 1, 1))),
    ("#a01f5c", "<", (0, (8, 2, 2, 2))),
    ("#000000", ">", (0, (2, 2))),
    ("#5b6d00", "p", (0, (5, 1))),
    ("#6d4c41", "h", (0, (4, 3))),
    ("#3949ab", "*", (0, (2, 1, 6, 1))),
)

#: Of matplotlib, while a figure is drawn.
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.4,
    "svg.fonttype": "path",
    "svg.hashsalt": "lora-privacy",  # the same numbers give the same file
    "pdf.fonttype": 42,  # fonts are embedded as TrueType, which journals ask for
    "text.usetex": False,  # names of the data are no LaTeX
    "text.parse_math": True,  # axes in powers of ten need it; labels are escaped
}

#: Kind of file -> what is written into it: no date, for the same reason as the salt.
METADATA: dict[str, dict[str, Any] | None] = {
    "png": None,
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def series(index: int) -> tuple[str, str, str | tuple[int, tuple[float, ...]]]:
    """Colour, marker and line of the series number ``index``."""
    return SERIES[index % len(SERIES)]


def legend_above(ax: Axes, columns: int) -> None:
    """A small legend above ``ax``, where it hides no point."""
    ax.legend(frameon=False, fontsize=7, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0))
