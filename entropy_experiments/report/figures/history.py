"""Entropy through training: what it did, and how well each step's change was predicted.

`history_panels` are of what the probe wrote while training, `checkpoint_panels` of the analyses of several checkpoints of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.history import holds_means, probed_sums
from entropy_experiments.records.training_course import entropy_course_words, reward_course_words
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.drawing import dodge_of, draw_panel, log_where_wide
from entropy_experiments.report.figures.lines import (
    DELTA_H_LABEL,
    Look,
    Panel,
    bars_described,
    line_of,
    line_of_columns,
)
from entropy_experiments.statistics.confidence import correlation_words
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.text.numbers import as_number, counted, series

_HISTORY_TITLE = "Entropy and reward over training, and the change of every step"
_EVOLUTION_TITLE = "The Fisher analysis over the checkpoints of a run"
ENTROPY_LABEL = "entropy h\n(nats per token)"
PREDICTED_LOOK, MEASURED_LOOK = Look("predicted"), Look("measured", "square-open")


def with_steps(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that carry a training step, in its order."""
    return sorted((row for row in rows if as_number(row.get("step")) is not None), key=lambda row: row["step"])


def history_panels(history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Entropy, reward, and predicted beside measured Δh, over training steps.

    Args:
        history: one mapping a step with "step" and any of "entropy", "reward", "probe/entropy", "probe/predicted",
            "probe/measured", "probe/momentum", and of those with errors "…_se" and "…_df" (degrees of freedom); nats per token.
    """
    rows = with_steps(history)
    watched = ("probe/entropy_se", "probe/measured_df")
    changes = [
        line_of_columns(name, look, rows, key, (f"{key}_se", f"{key}_df"))
        for name, look, key in (
            ("predicted change", PREDICTED_LOOK, "probe/predicted"),
            ("measured change", MEASURED_LOOK, "probe/measured"),
        )
    ]
    momentum = line_of_columns("momentum's part of predicted", Look("neutral", "none", "dot"), rows, "probe/momentum")
    entropies = [
        line_of_columns("entropy in training", Look("entropy"), rows, "entropy", plus=False),
        line_of_columns(
            "entropy on the probe's tokens", Look("neutral", "triangle-up", "dot"), rows, "probe/entropy", watched, plus=False
        ),
    ]  # fmt: skip
    reward = line_of_columns(
        "reward", Look("reward", "diamond"), rows, "reward", ("reward_se", "reward_df"), plus=False
    )
    return [
        Panel(ENTROPY_LABEL, entropies, empty="no data: no entropy"),
        Panel("mean reward", [reward], empty="no data: no reward"),
        Panel(
            DELTA_H_LABEL,
            [momentum, *changes],
            zero=True,
            empty="no data: no predicted or measured change of entropy",
        ),
    ]


@style.in_house_style
def plot_training_history(history: Sequence[Mapping[str, Any]], *, analysed_step: float | None = None) -> Figure:
    """Entropy, reward, and predicted beside measured Δh over training steps.

    Args:
        history: as `history_panels` takes it.
        analysed_step: the step whose checkpoint the analysis looked at, marked by a vertical line.
    """
    rows = with_steps(history)
    if not rows:
        return style.no_data_figure(_HISTORY_TITLE, "the training history is empty.")
    steps, panels = series(rows, "step"), history_panels(rows)
    figure = style.new_figure(8.6, 6.2)
    grid = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 0.8, 1.3))
    for axes, panel in zip(grid, panels, strict=True):
        draw_panel(axes, panel, dodge=dodge_of(steps, 2) if panel.zero else 0.0)
    _from_zero(grid[0], panels[0])
    style.step_axis(grid[2], steps.min(), steps.max())
    grid[2].set_xlabel("training step")
    if analysed_step is not None and steps.min() <= analysed_step <= steps.max():
        for axes in grid:
            axes.axvline(analysed_step, color=style.NEUTRAL, linewidth=1.0, linestyle="-.", zorder=1)
        grid[0].annotate(
            "analysed here", (analysed_step, 1), (4, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8.5, color=style.NEUTRAL,
        )  # fmt: skip
    caption = " ".join([_courses(rows), _agreement(rows), bars_described(panels)])
    return style.finish(figure, _HISTORY_TITLE, caption)


def checkpoint_panels(evolution: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Entropy, reward, predicted beside measured Δh, and the kernel, over the analysed checkpoints of one run.

    Args:
        evolution: one mapping a checkpoint with "step" and any of "entropy", "reward", "predicted", "actual" (numbers, with
            "predicted_se" and "actual_se" beside them, or {"value", "standard_error"}; nats per token), "kernel_norm",
            "same_prompt_mean", "cross_prompt_mean" (of |K₁|).
    """
    rows = with_steps(evolution)
    steps = series(rows, "step")
    kernel = (
        ("norm of the kernel", Look("ink"), "kernel_norm"),
        ("mean, same prompt", Look("predicted", "square", "dash"), "same_prompt_mean"),
        ("mean, other prompts", Look("measured", "triangle-up", "dot"), "cross_prompt_mean"),
    )
    entropy = line_of("evaluation buffer", Look("entropy"), steps, _entries(rows, "entropy"), plus=False)
    changes = [
        line_of("predicted", PREDICTED_LOOK, steps, _entries(rows, "predicted")),
        line_of("measured", MEASURED_LOOK, steps, _entries(rows, "actual")),
    ]
    return [
        Panel(ENTROPY_LABEL, [entropy], empty="no data: no entropy"),
        Panel("mean reward", [line_of_columns("reward", Look("reward", "diamond"), rows, "reward")],
              empty="no data: no reward"),
        Panel(DELTA_H_LABEL, changes, zero=True, empty="no data: no predicted or measured change of entropy"),
        Panel("Fisher kernel K₁\n(nats² × P)", [line_of_columns(name, look, rows, key) for name, look, key in kernel],
              empty="no data: no kernel"),
    ]  # fmt: skip


@style.in_house_style
def plot_fisher_evolution(evolution: Sequence[Mapping[str, Any]]) -> Figure:
    """`checkpoint_panels` of `evolution`, two by two."""
    rows = with_steps(evolution)
    if not rows:
        return style.no_data_figure(_EVOLUTION_TITLE, "no checkpoint was analysed.")
    steps, panels = series(rows, "step"), checkpoint_panels(rows)
    figure = style.new_figure(8.6, 6.4)
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, panel in zip(grid, panels, strict=True):
        draw_panel(axes, panel, dodge=dodge_of(steps, 2) if panel.zero else 0.0)
    _from_zero(grid[0], panels[0])
    log_where_wide(grid[3], panels[3].shown)
    for axes in grid[2:]:
        style.step_axis(axes, steps.min(), steps.max())
        axes.set_xlabel("training step")
    caption = f"{counted(len(rows), 'analysed checkpoint')}. {_shared(panels[2])} {bars_described(panels)}"
    return style.finish(figure, _EVOLUTION_TITLE, caption)


def _from_zero(axes: Axes, panel: Panel) -> None:
    """Entropy's axis begins at 0."""
    if panel.shown:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9))


def _courses(rows: Sequence[Mapping[str, Any]]) -> str:
    reward = reward_course_words(rows)
    text = f"Entropy {entropy_course_words(rows)[0]}. "
    return text + ("No reward was stored." if reward is None else f"Mean reward {reward}.")


def _agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    if holds_means(rows):
        return "Changes are means over the steps of each logged row."
    sums = probed_sums(rows)
    if sums is None:
        return "No step has both a predicted and a measured change."
    where = f"Summed over the {sums.steps} steps with both" if sums.steps > 1 else "At the one step with both"
    text = f"{where}: predicted {sums.predicted.text()}, measured {sums.measured.text()} nats per token"
    text += f", {correlation_words(sums.correlation, sums.steps)}" if sums.steps > 1 else ""
    return text + (
        f"; {counted(sums.left_out, 'step')} with too small an effective sample left out." if sums.left_out else "."
    )


def _shared(panel: Panel) -> str:
    """How predicted and measured changes go together over the checkpoints that have both."""
    predicted, measured = (line.y for line in panel.lines)
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() < 2:
        one = "At the one step with both: see the bars."
        return one if both.any() else "No step has both a predicted and a measured change."
    words = correlation_words(correlation(predicted[both], measured[both]), int(both.sum()))
    return f"Over the {both.sum()} steps with both, predicted and measured: {words}."


def _entries(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Numbers with what is known of their errors, given as {"value", ...} or as a number beside ``key_se``."""
    found = []
    for row in rows:
        entry = row.get(key)
        own = dict(entry) if isinstance(entry, Mapping) else {"value": entry}
        beside = as_number(row.get(f"{key}_se"))
        found.append(own if beside is None else own | {"standard_error": beside})
    return found
