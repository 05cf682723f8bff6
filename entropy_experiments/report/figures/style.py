"""One look for every chart: legible in print, on a dark page and to the colour-blind.

Colours are Okabe and Ito's, which differ in lightness as well as in hue; whatever a colour says, a marker, a
hatch or a label says again. Charts are plain ``matplotlib.figure.Figure`` objects: pyplot and its global
state are not used, and a user's matplotlibrc changes nothing, so the same numbers give the same picture.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropy_experiments.report.content import PageFigure
from rl_training.files import write_whole

PREDICTED = "#0072B2"
MEASURED = "#D55E00"
ENTROPY = "#332288"
REWARD = "#117733"
NEUTRAL = "#6E6E6E"
FIXED_PREFIX = "#56B4E9"
FIXED_PREFIX_MEASURED = "#E69F00"
INK = "#222222"
COLOURS = {
    "predicted": PREDICTED,
    "measured": MEASURED,
    "entropy": ENTROPY,
    "reward": REWARD,
    "neutral": NEUTRAL,
    "fixed": FIXED_PREFIX,
    "fixed-measured": FIXED_PREFIX_MEASURED,
    "ink": INK,
}
"""By the names that the page has for them (templates/page.css): there each theme has its own shade."""

_HOUSE_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.7,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "#DDDDDD",
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_DOTS_PER_INCH = 150
_CAPTION_CHARACTERS_PER_INCH = 15.3
_LINE_HEIGHT_INCHES = 0.175

Arguments = ParamSpec("Arguments")


def in_house_style(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Decorator: ``draw`` runs under matplotlib's defaults and the house style, whatever the user's
    settings are.
    """

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.style.context(["default", _HOUSE_STYLE]):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float = 8.6, height: float = 4.4) -> Figure:
    """An empty figure of ``width`` × ``height`` inches whose axes keep clear of each other."""
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, title: str, caption: str) -> Figure:
    """Write ``title`` above and ``caption`` below the axes, in room added for them; see ``caption_of``."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, int(width * _CAPTION_CHARACTERS_PER_INCH))
    below = (len(lines) + 1.0) * _LINE_HEIGHT_INCHES
    above = 0.42
    height += below + above
    figure.set_size_inches(width, height)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0.005, below / height, 0.99, 1 - (below + above) / height))
    figure.text(0.012, 1 - 0.12 / height, title, ha="left", va="top", fontsize=12, fontweight="bold")
    figure.text(
        0.012,
        (below - 0.08) / height,
        "\n".join(lines),
        ha="left",
        va="top",
        fontsize=8.8,
        color="#333333",
        linespacing=1.25,
    )
    figure.set_label(caption)
    return figure


def caption_of(figure: Figure) -> str:
    """What the figure says of itself in words: its caption, fit for an alternative text."""
    return str(figure.get_label())


@in_house_style
def no_data_figure(title: str, reason: str) -> Figure:
    """A figure that states that there is nothing to show, and why."""
    figure = new_figure(height=0.9)
    no_data(figure.add_subplot(), "no data")
    return finish(figure, title, f"No data: {reason}")


def no_data(axes: Axes, reason: str) -> None:
    """Turn ``axes`` into an empty panel that states ``reason``; its horizontal axis stays where panels
    share it.
    """
    if axes.get_shared_x_axes().get_siblings(axes) == [axes]:
        axes.set_axis_off()
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", fontsize=11, color=NEUTRAL)


def zero_line(axes: Axes) -> None:
    """The horizontal line of no change."""
    axes.axhline(0.0, color="#444444", linewidth=0.9, zorder=1.5)


def row_bar(
    axes: Axes,
    value: float,
    place: float,
    reach: tuple[float, float],
    *,
    color: str,
    marker: str = "o",
    hollow: bool = False,
) -> None:
    """A number at the height ``place`` with its interval, whose halves are ``reach`` long."""
    below, above = reach
    axes.errorbar(
        value,
        place,
        xerr=[[below], [above]],
        fmt=marker,
        color=color,
        capsize=3,
        markerfacecolor="white" if hollow else color,
    )


def row_note(axes: Axes, words: str, place: float, fontsize: float = 8.8) -> None:
    """Words at the right end of the row ``place``, in place of a number."""
    axes.annotate(
        words, (0.99, place), xycoords=("axes fraction", "data"), ha="right", va="center", color=NEUTRAL, fontsize=fontsize,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def step_axis(axes: Axes, low: float, high: float) -> None:
    """A horizontal axis of whole training steps from ``low`` to ``high``, with room for markers at both
    ends.
    """
    margin = max(0.5, 0.03 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14, min_n_ticks=1))


def png_bytes(figure: Figure) -> bytes:
    """``figure`` as PNG, the same bytes for the same figure."""
    buffer = BytesIO()
    with matplotlib.style.context(["default", _HOUSE_STYLE]):
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> Path:
    """Write ``figure`` to ``path`` as PNG and return the path."""
    write_whole(path, png_bytes(figure))
    return path


def page_figure(
    name: str, words: tuple[str, str, str], figure: Figure, plot: Mapping[str, Any] | None, file: str
) -> PageFigure:
    """`figure` as a page shows it. words: (heading, how to read it, source). plot, file: as of PageFigure."""
    heading, reading, source = words
    return PageFigure(name, heading, reading, caption_of(figure), png_bytes(figure), plot, file, source)
