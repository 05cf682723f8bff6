"""Panels of lines (`report.figures.lines`) as matplotlib draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from entropy_experiments.report.figures.lines import Line, Panel
from entropy_experiments.report.figures.style import COLOURS, no_data, zero_line

MOST_MARKED = 60
"""Points of a line beyond which markers and bars would hide each other: it is drawn plain, its intervals as a band."""
_CHARACTERS_ABOVE, _CHARACTERS_OF_A_LINE = 110, 8
"""That a legend over a panel has in a row, and what a line's sample takes of them."""
_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "x",
    "star": "*",
    "none": "",
}
_DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":", "none": "none"}


def colour_of(name: str) -> str:
    """The hexadecimal colour behind a name in `Look`."""
    return COLOURS.get(name, name)


def legend_text(label: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides."""
    return label.replace("$", r"\$").lstrip("_")


def draw_line(axes: Axes, line: Line, shift: float = 0.0) -> None:
    """One line. shift: how far to move it sideways, where lines would cover each other."""
    colour, symbol = colour_of(line.look.colour), line.look.marker.removesuffix("-open")
    many = len(line.x) > MOST_MARKED
    banded = line.bars is not None and (many or line.band)
    x = line.x if many else line.x + shift
    axes.errorbar(
        x,
        line.y,
        yerr=None if banded else line.bars,
        color=colour,
        linestyle=_DASHES[line.look.dash],
        linewidth=1.0 if many else 1.5,
        marker=_MARKERS[symbol],
        markersize=0 if many else 5.5,
        markerfacecolor="white" if line.look.marker.endswith("-open") else colour,
        markeredgewidth=1.5,
        elinewidth=1.1,
        capsize=3,
        label=legend_text(line.name),
    )
    if banded and line.bars is not None:
        known = np.isfinite(line.y) & np.isfinite(line.bars).all(0)
        low, high = (line.y - line.bars[0])[known], (line.y + line.bars[1])[known]
        axes.fill_between(x[known], low, high, color=colour, alpha=0.18, linewidth=0)


def draw_panel(axes: Axes, panel: Panel, *, dodge: float = 0.0, legend: Mapping[str, object] | None = None) -> bool:
    """All lines of a panel; whether there was any.

    Args:
        dodge: sideways distance between neighbouring lines.
        legend: what matplotlib is to be told of the legend; None for one where it fits, if there is more than one line.
    """
    axes.set_title(panel.heading)
    lines = panel.shown
    if not lines:
        no_data(axes, panel.empty)
        return False
    if panel.zero:
        zero_line(axes)
    for place, line in enumerate(lines):
        draw_line(axes, line, dodge * (place - (len(lines) - 1) / 2))
    axes.set_ylabel(panel.label)
    axes.margins(y=0.12)
    if legend is not None:
        axes.legend(**legend)
    elif len(lines) > 1:
        place = axes.get_subplotspec()
        alone = place is not None and place.get_gridspec().ncols == 1 and not panel.heading
        axes.legend(**(_above(lines) if alone else {"loc": "best"}))
    return True


def _above(lines: Sequence[Line]) -> dict[str, object]:
    """A legend over a panel as wide as the figure: inside, "best" covers intervals, which it does not look at."""
    columns = _CHARACTERS_ABOVE // (max(len(line.name) for line in lines) + _CHARACTERS_OF_A_LINE)
    return {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "ncols": max(1, min(len(lines), columns)),
        "borderaxespad": 0.2,
        "frameon": False,
    }


def dodge_of(steps: np.ndarray, count: int) -> float:
    """Sideways distance between `count` lines over these steps: together a fifth of the least distance of two steps."""
    apart = np.diff(np.unique(steps))
    return 0.2 * float(apart.min()) / max(count, 2) if apart.size else 0.02


def log_where_wide(axes: Axes, lines: Sequence[Line], factor: float = 30.0) -> None:
    """A logarithmic axis where all numbers are positive and the largest is `factor` times the smallest."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines]) if lines else np.empty(0)
    if values.size and values.min() > 0 and values.max() > factor * values.min():
        axes.set_yscale("log")
