"""Several analyses in one picture: their changes of entropy side by side, their differences, their courses.

The first side, A, is what the others are compared with. Each side keeps its colour, marker and letter in every chart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.report.figures.bars import BARS, values_and_bars
from entropy_experiments.report.figures.style import (
    finish,
    in_house_style,
    new_figure,
    no_data,
    no_data_figure,
    step_axis,
    zero_line,
)
from entropy_experiments.statistics.confidence import ALIKE, known, shown
from entropy_experiments.text.numbers import series

SIDE_COLOURS = ("#222222", "#D55E00", "#0072B2", "#117733", "#AA4499", "#E69F00", "#56B4E9", "#882255")
SIDE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_CHANGES_TITLE = "Changes of entropy in the analysed step, side by side"
_COURSES_TITLE = "Entropy and reward in training, side by side"
_CHECKPOINTS_TITLE = "The analysed checkpoints, side by side"
# Above the axes, where it hides nothing.
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.08), "ncols": 2, "fontsize": 8.5}
_Entries = Sequence[Mapping[str, Any] | None]
"""Numbers as `statistics.confidence.known` takes them, None where there is none."""


def _legend_text(label: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides."""
    return label.replace("$", r"\$").lstrip("_")


def _points(axes: Axes, places: np.ndarray, pairs: _Entries, side: int, label: str, line: str = "none") -> bool:
    values, bars = values_and_bars(pairs)
    if not np.isfinite(values).any():
        return False
    axes.errorbar(
        places,
        values,
        yerr=np.where(np.isfinite(bars), bars, 0.0),
        color=SIDE_COLOURS[side],
        marker=SIDE_MARKERS[side],
        linestyle=line,
        linewidth=1.3,
        markersize=5.5,
        markerfacecolor="white" if side else SIDE_COLOURS[side],
        capsize=3,
        label=_legend_text(label),
    )
    return True


@in_house_style
def plot_compared_changes(
    names: Sequence[str],
    values: Sequence[_Entries],
    differences: Sequence[_Entries],
    labels: Sequence[str],
) -> Figure:
    """Left: every quantity of every side; right: each side minus the first.

    Parameters
    ----------
    names: (Q,) what the quantities are called, in words short enough for an axis.
    values: for each of S sides, (Q,) {"value", "standard_error", "low", "high", …}, nats per token; None where not known.
    differences: the same for sides 1 … S − 1, minus side 0.
    labels: (S,) for the legend, shown as text.
    """
    if not names or not any(known(entry) is not None for side in values for entry in side):
        return no_data_figure(_CHANGES_TITLE, "no change of entropy was stored on any side.")
    figure = new_figure(9.4, 4.4)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(names), dtype=float)
    for axes, sets, first, ylabel in (
        (left, values, 0, "change of entropy Δh\n(nats per token)"),
        (right, differences, 1, "difference from A\n(nats per token)"),
    ):
        zero_line(axes)
        spread = np.linspace(-0.22, 0.22, len(sets)) if len(sets) > 1 else [0.0]
        drawn = [
            _points(axes, places + shift, pairs, k + first, labels[k + first])
            for k, (shift, pairs) in enumerate(zip(spread, sets, strict=True))
        ]
        if not any(drawn):
            no_data(axes, "no difference is known")
            continue
        axes.set_xticks(places, [name.replace(" ", "\n", 1) for name in names], fontsize=8.5)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(False, axis="x")
        axes.set_ylabel(ylabel)
        axes.margins(y=0.15)
    left.set_title("each side", fontsize=10)
    right.set_title("minus A", fontsize=10)
    left.legend(**_ABOVE)
    told = [
        f"{labels[side + 1].split(':')[0]} minus A, {names[0]}: {shown(pairs[0])}"
        for side, pairs in enumerate(differences)
    ]
    caption = (
        f"{'; '.join(told)} nats per token. Bars and brackets: {BARS}; a difference whose bar crosses 0 cannot "
        "be told from none. On shared evaluation prompts a difference is known better than the two values it is made of."
    )
    return finish(figure, _CHANGES_TITLE, caption)


@in_house_style
def plot_compared_histories(histories: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> Figure:
    """Entropy and reward over training steps, a line a side.

    histories: for each side, mappings with "step" and any of "entropy" (nats per token) and "reward".
    """
    sides = [(series(rows, "step"), series(rows, "entropy"), series(rows, "reward")) for rows in histories]
    sides = [tuple(column[np.argsort(steps)] for column in (steps, *rest)) for steps, *rest in sides]
    if not any(np.isfinite(column).any() for _, *columns in sides for column in columns):
        return no_data_figure(_COURSES_TITLE, "no side has a training history.")
    figure = new_figure(9.4, 4.6)
    panels = figure.subplots(2, 1, sharex=True)
    for panel, place, ylabel in ((panels[0], 1, "entropy h\n(nats per token)"), (panels[1], 2, "mean reward")):
        drawn = False
        for k, columns in enumerate(sides):
            steps, values = columns[0], columns[place]
            known = np.isfinite(steps) & np.isfinite(values)
            if known.any():
                drawn = True
                panel.plot(
                    steps[known], values[known], color=SIDE_COLOURS[k], linewidth=1.4, label=_legend_text(labels[k]),
                    marker=SIDE_MARKERS[k] if known.sum() <= 60 else None, markersize=4.5,
                    markerfacecolor="white" if k else SIDE_COLOURS[k],
                )  # fmt: skip
        panel.set_ylabel(ylabel)
        if not drawn:
            no_data(panel, f"no data: no {'entropy' if place == 1 else 'reward'}")
    everything = np.concatenate([columns[0][np.isfinite(columns[0])] for columns in sides])
    step_axis(panels[1], everything.min(), everything.max())
    panels[1].set_xlabel("training step")
    next((panel for panel in panels if panel.lines), panels[0]).legend(**_ABOVE)
    caption = (
        "Entropy and reward of the training buffers, one run a line: there are no error bars, because another seed of training "
        "would give another line."
    )
    return finish(figure, _COURSES_TITLE, caption)


@in_house_style
def plot_compared_checkpoints(
    steps: Sequence[Sequence[float]],
    panels: Mapping[str, Sequence[_Entries]],
    differences: Mapping[str, tuple[Sequence[float], Sequence[_Entries]]],
    labels: Sequence[str],
) -> Figure:
    """Each quantity over the analysed checkpoints of every side, and beside it the differences where steps are shared.

    steps: for each of S sides its steps. panels: name -> for each side its numbers at these steps.
    differences: name -> (shared steps, for sides 1 … S − 1 the numbers at these), minus side 0.
    """
    if not any(known(e) is not None for sides in panels.values() for entries in sides for e in entries):
        return no_data_figure(_CHECKPOINTS_TITLE, "no checkpoint has numbers to show.")
    figure = new_figure(9.4, 2.5 * len(panels))
    grid = figure.subplots(len(panels), 2, sharex=True, squeeze=False)
    low, high = (f(step for side in steps for step in side) for f in (min, max))
    width = 0.012 * (high - low) if high > low else 0.02
    for row, (name, sides) in enumerate(panels.items()):
        left, right = grid[row]
        for axes in (left, right) if not name.startswith("entropy") else (right,):
            zero_line(axes)
        for k, pairs in enumerate(sides):
            _points(left, np.array(steps[k], dtype=float) + width * k, pairs, k, labels[k], "-")
        left.set_ylabel(f"{name}\n(nats per token)")
        shared, sets = differences.get(name, ((), ()))
        drawn = [
            _points(right, np.array(shared, dtype=float) + width * k, pairs, k + 1, labels[k + 1], "-")
            for k, pairs in enumerate(sets)
        ]
        if not any(drawn):
            no_data(right, "no shared step")
        right.set_ylabel("minus A\n(nats per token)")
    for axes in grid[-1]:
        step_axis(axes, low, high)
        axes.set_xlabel("training step")
    grid[0][0].legend(**_ABOVE)
    caption = (
        f"Left: every analysed checkpoint. Right: the difference from A where a step was analysed on both sides. Bars: "
        f"{BARS}; where the bar crosses 0 the sides {ALIKE}."
    )
    return finish(figure, _CHECKPOINTS_TITLE, caption)
