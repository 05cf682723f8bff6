"""Several analyses in one picture: their changes of entropy side by side, their differences, their courses.

The first side, A, is what the others are compared with. Each side keeps its colour, marker and letter in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS
from entropy_experiments.report.figures.drawing import draw_panel
from entropy_experiments.report.figures.history import ENTROPY_LABEL
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Line, Look, Panel, history_line, line_of
from entropy_experiments.statistics.confidence import ALIKE, Known, shown

_CHANGES_TITLE = "Changes of entropy in the analysed step, side by side"
_COURSES_TITLE = "Entropy and reward in training, side by side"
_CHECKPOINTS_TITLE = "The analysed checkpoints, side by side"
# Legible on paper, on the light and on the dark page; A is drawn in the ink of the text.
_COLOURS = ("ink", "#D55E00", "#3A8FD0", "#2E9E5B", "#B45FA8", "#C98A00", "#56B4E9", "#B0506F")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
# Above the axes, where it hides nothing.
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.08), "ncols": 2, "fontsize": 8.5}
_SPREAD = 0.22
Numbers = Sequence[Known | None]


@dataclass(frozen=True)
class ComparedChanges:
    """Changes of entropy of S sides, nats per token.

    names: (Q,) what they are called, in words short enough for an axis. values: for each side (Q,) numbers. differences: for
    sides 1 … S − 1 (Q,) numbers minus side 0's. labels: (S,) for the legend, shown as text.
    """

    names: Sequence[str]
    values: Sequence[Numbers]
    differences: Sequence[Numbers]
    labels: Sequence[str]

    def panels(self) -> tuple[Panel, Panel]:
        """Every quantity of every side, and each side minus the first; the sides stand beside each other at each quantity."""

        def beside(count: int) -> list[np.ndarray]:
            shifts = np.linspace(-_SPREAD, _SPREAD, count) if count > 1 else np.zeros(count)
            return [np.arange(len(self.names)) + shift for shift in shifts]

        each = _lines(beside(len(self.values)), self.values, self.labels, 0, "none")
        minus = _lines(beside(len(self.differences)), self.differences, self.labels, 1, "none")
        return (
            Panel(DELTA_H_LABEL, each, heading="each side", zero=True),
            Panel("difference from A\n(nats per token)", minus, "minus A", zero=True, empty="no difference is known"),
        )


@dataclass(frozen=True)
class ComparedCheckpoints:
    """Quantities over the analysed checkpoints of S sides, nats per token.

    steps: for each side its steps. values: name -> for each side the numbers at these. shared_steps: of all sides. differences:
    name -> for sides 1 … S − 1 the numbers at the shared steps, minus side 0's. labels: (S,) for the legend.
    """

    steps: Sequence[Sequence[float]]
    values: Mapping[str, Sequence[Numbers]]
    shared_steps: Sequence[float]
    differences: Mapping[str, Sequence[Numbers]]
    labels: Sequence[str]

    def panels(self) -> list[tuple[Panel, Panel]]:
        """Each quantity over the checkpoints of every side, and beside it the differences where steps are shared."""
        found = []
        for name, sets in self.values.items():
            gaps = self.differences[name]
            each = _lines(self.steps, sets, self.labels, 0, "solid")
            minus = _lines([self.shared_steps] * len(gaps), gaps, self.labels, 1, "solid")
            found.append(
                (
                    Panel(f"{name}\n(nats per token)", each, zero=not name.startswith("entropy")),
                    Panel("minus A\n(nats per token)", minus, zero=True, empty="no shared step"),
                )
            )
        return found


def _look(place: int, dash: str = "none") -> Look:
    return Look(_COLOURS[place], _MARKERS[place] + ("-open" if place else ""), dash)


def _lines(places: Sequence[Any], sets: Sequence[Numbers], labels: Sequence[str], first: int, dash: str) -> list[Line]:
    """One line a side from side `first` on. places: for each its places on the axis."""
    return [
        line_of(labels[k], _look(k, dash), at, numbers)
        for k, (at, numbers) in enumerate(zip(places, sets, strict=True), start=first)
    ]


@style.in_house_style
def plot_compared_changes(compared: ComparedChanges) -> Figure:
    """Its panels as a picture."""
    names, panels = compared.names, compared.panels()
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
        f"{label.split(':')[0]} minus A, {names[0]}: {shown(numbers[0])}"
        for label, numbers in zip(compared.labels[1:], compared.differences, strict=True)
    ]
    caption = (
        f"{'; '.join(told)} nats per token. Bars and brackets: {BARS}; where the bar of a difference crosses 0 the sides "
        f"{ALIKE}. On shared evaluation prompts a difference is known better than the two values it is made of."
    )
    return style.finish(figure, _CHANGES_TITLE, caption)


def course_panels(histories: Sequence[Sequence[HistoryRow]], labels: Sequence[str]) -> tuple[Panel, Panel]:
    """Entropy and reward over training steps, a line a side. labels: (S,) for the legend."""
    entropy, reward = (
        [history_line(labels[k], _look(k, "solid"), rows, field) for k, rows in enumerate(histories)]
        for field in ("entropy", "reward")
    )
    return (
        Panel(ENTROPY_LABEL, entropy, empty="no data: no entropy"),
        Panel("mean reward", reward, empty="no data: no reward"),
    )


@style.in_house_style
def plot_compared_histories(histories: Sequence[Sequence[HistoryRow]], labels: Sequence[str]) -> Figure:
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


@style.in_house_style
def plot_compared_checkpoints(compared: ComparedCheckpoints) -> Figure:
    """Its panels as a picture."""
    rows = compared.panels()
    if not any(each.shown for each, _ in rows):
        return style.no_data_figure(_CHECKPOINTS_TITLE, "no checkpoint has numbers to show.")
    figure = style.new_figure(9.4, 2.5 * len(rows))
    grid = figure.subplots(len(rows), 2, sharex=True, squeeze=False)
    low, high = (end(step for steps in compared.steps for step in steps) for end in (min, max))
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
