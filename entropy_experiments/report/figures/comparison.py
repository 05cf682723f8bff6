"""Several analyses in one picture: their changes of entropy side by side, their differences, their courses.

The first side, A, is what the others are compared with. Each side keeps its colour, marker and letter in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS
from entropy_experiments.report.figures.drawing import draw_panel
from entropy_experiments.report.figures.history import ENTROPY_LABEL, with_steps
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Line, Look, Panel, line_of, line_of_columns
from entropy_experiments.statistics.confidence import ALIKE, shown

_CHANGES_TITLE = "Changes of entropy in the analysed step, side by side"
_COURSES_TITLE = "Entropy and reward in training, side by side"
_CHECKPOINTS_TITLE = "The analysed checkpoints, side by side"
# Legible on paper, on the light and on the dark page; A is drawn in the ink of the text.
_COLOURS = ("ink", "#D55E00", "#3A8FD0", "#2E9E5B", "#B45FA8", "#C98A00", "#56B4E9", "#B0506F")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
# Above the axes, where it hides nothing.
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.08), "ncols": 2, "fontsize": 8.5}
_SPREAD = 0.22
Entries = Sequence[Mapping[str, Any] | None]
"""Numbers as `statistics.confidence.known` takes them, None where there is none."""


def _look(side: int, dash: str = "none") -> Look:
    return Look(_COLOURS[side], _MARKERS[side] + ("-open" if side else ""), dash)


def _lines(places: Sequence[Any], sets: Sequence[Entries], labels: Sequence[str], first: int, dash: str) -> list[Line]:
    """One line a side from side `first` on. places: for each its places on the axis."""
    return [
        line_of(labels[k], _look(k, dash), at, entries)
        for k, (at, entries) in enumerate(zip(places, sets, strict=True), start=first)
    ]


def change_panels(
    names: Sequence[str], values: Sequence[Entries], differences: Sequence[Entries], labels: Sequence[str]
) -> tuple[Panel, Panel]:
    """Every quantity of every side, and each side minus the first; the sides stand beside each other at each quantity.

    Args:
        names: (Q,) what the quantities are called, in words short enough for an axis.
        values: for each of S sides, (Q,) numbers, nats per token.
        differences: the same for sides 1 … S − 1, minus side 0.
        labels: (S,) for the legend, shown as text.
    """

    def beside(count: int) -> list[np.ndarray]:
        shifts = np.linspace(-_SPREAD, _SPREAD, count) if count > 1 else np.zeros(count)
        return [np.arange(len(names)) + shift for shift in shifts]

    each = _lines(beside(len(values)), values, labels, 0, "none")
    minus = _lines(beside(len(differences)), differences, labels, 1, "none")
    return (
        Panel(DELTA_H_LABEL, each, heading="each side", zero=True),
        Panel("difference from A\n(nats per token)", minus, "minus A", zero=True, empty="no difference is known"),
    )


@style.in_house_style
def plot_compared_changes(
    names: Sequence[str], values: Sequence[Entries], differences: Sequence[Entries], labels: Sequence[str]
) -> Figure:
    """`change_panels` as a picture, with its arguments."""
    panels = change_panels(names, values, differences, labels)
    if not panels[0].shown:
        return style.no_data_figure(_CHANGES_TITLE, "no change of entropy was stored on any side.")
    figure = style.new_figure(9.4, 4.4)
    for axes, panel, legend in zip(figure.subplots(1, 2), panels, (_ABOVE, None), strict=True):
        if draw_panel(axes, panel, legend=legend):
            axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8.5)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.grid(False, axis="x")
            if legend is None and axes.get_legend() is not None:
                axes.get_legend().remove()
    told = [
        f"{labels[side + 1].split(':')[0]} minus A, {names[0]}: {shown(pairs[0])}"
        for side, pairs in enumerate(differences)
    ]
    caption = (
        f"{'; '.join(told)} nats per token. Bars and brackets: {BARS}; where the bar of a difference crosses 0 the sides "
        f"{ALIKE}. On shared evaluation prompts a difference is known better than the two values it is made of."
    )
    return style.finish(figure, _CHANGES_TITLE, caption)


def course_panels(histories: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> tuple[Panel, Panel]:
    """Entropy and reward over training steps, a line a side.

    Args:
        histories: for each side, mappings with "step" and any of "entropy" (nats per token) and "reward".
        labels: (S,) for the legend.
    """
    sides = [with_steps(rows) for rows in histories]
    entropy, reward = (
        [line_of_columns(labels[k], _look(k, "solid"), rows, key) for k, rows in enumerate(sides)]
        for key in ("entropy", "reward")
    )
    return (
        Panel(ENTROPY_LABEL, entropy, empty="no data: no entropy"),
        Panel("mean reward", reward, empty="no data: no reward"),
    )


@style.in_house_style
def plot_compared_histories(histories: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> Figure:
    """`course_panels` as a picture, with its arguments."""
    panels = course_panels(histories, labels)
    lines = [line for panel in panels for line in panel.shown]
    if not lines:
        return style.no_data_figure(_COURSES_TITLE, "no side has a training history.")
    figure = style.new_figure(9.4, 4.6)
    grid = figure.subplots(2, 1, sharex=True)
    first = 0 if panels[0].shown else 1
    for place, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        if draw_panel(axes, panel, legend=_ABOVE) and place != first:
            axes.get_legend().remove()
    steps = np.concatenate([line.x for line in lines])
    style.step_axis(grid[1], steps.min(), steps.max())
    grid[1].set_xlabel("training step")
    caption = (
        "Entropy and reward of the training buffers, one run a line: there are no error bars, because another seed of training "
        "would give another line."
    )
    return style.finish(figure, _COURSES_TITLE, caption)


def compared_checkpoint_panels(
    steps: Sequence[Sequence[float]],
    panels: Mapping[str, Sequence[Entries]],
    differences: Mapping[str, tuple[Sequence[float], Sequence[Entries]]],
    labels: Sequence[str],
) -> list[tuple[Panel, Panel]]:
    """Each quantity over the analysed checkpoints of every side, and beside it the differences where steps are shared.

    Args:
        steps: for each of S sides its steps.
        panels: name -> for each side its numbers at these steps.
        differences: name -> (shared steps, for sides 1 … S − 1 the numbers at these), minus side 0.
        labels: (S,) for the legend.
    """
    found = []
    for name, sides in panels.items():
        shared, sets = differences.get(name, ((), ()))
        each = _lines(steps, sides, labels, 0, "solid")
        minus = _lines([shared] * len(sets), sets, labels, 1, "solid")
        found.append(
            (
                Panel(f"{name}\n(nats per token)", each, zero=not name.startswith("entropy")),
                Panel("minus A\n(nats per token)", minus, zero=True, empty="no shared step"),
            )
        )
    return found


@style.in_house_style
def plot_compared_checkpoints(
    steps: Sequence[Sequence[float]],
    panels: Mapping[str, Sequence[Entries]],
    differences: Mapping[str, tuple[Sequence[float], Sequence[Entries]]],
    labels: Sequence[str],
) -> Figure:
    """`compared_checkpoint_panels` as a picture, with its arguments."""
    rows = compared_checkpoint_panels(steps, panels, differences, labels)
    if not any(each.shown for each, _ in rows):
        return style.no_data_figure(_CHECKPOINTS_TITLE, "no checkpoint has numbers to show.")
    figure = style.new_figure(9.4, 2.5 * len(rows))
    grid = figure.subplots(len(rows), 2, sharex=True, squeeze=False)
    low, high = (f(step for side in steps for step in side) for f in (min, max))
    width = 0.012 * (high - low) if high > low else 0.02
    for place, pair in enumerate(rows):
        for column, (axes, panel) in enumerate(zip(grid[place], pair, strict=True)):
            if draw_panel(axes, panel, dodge=width, legend=_ABOVE) and (place or column):
                axes.get_legend().remove()
    for axes in grid[-1]:
        style.step_axis(axes, low, high)
        axes.set_xlabel("training step")
    caption = (
        f"Left: every analysed checkpoint. Right: the difference from A where a step was analysed on both sides. Bars: "
        f"{BARS}; where the bar crosses 0 the sides {ALIKE}."
    )
    return style.finish(figure, _CHECKPOINTS_TITLE, caption)
