"""Entropy through training: what it did, and how well the probe predicted each step's change."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.history import holds_means, probed_sums
from entropy_experiments.records.history_rows import HistoryRow, values_of
from entropy_experiments.records.training_course import entropy_course_words, reward_course_words
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.drawing import dodge_of, draw_panel
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Look, Panel, bars_described, history_line
from entropy_experiments.statistics.confidence import correlation_words
from entropy_experiments.text.numbers import counted

_HISTORY_TITLE = "Entropy and reward over training, and the change of every step"
ENTROPY_LABEL = "entropy h\n(nats per token)"
PREDICTED_LOOK, MEASURED_LOOK = Look("predicted"), Look("measured", "square-open")


def history_panels(rows: Sequence[HistoryRow]) -> list[Panel]:
    """Entropy, reward, and predicted beside measured Δh (nats per token), over training steps."""
    watched = ("probe_entropy_se", "probe_measured_df")
    rows = [_without_doubted_error(row) for row in rows]
    changes = [
        history_line(name, look, rows, key, (f"{key}_se", f"{key}_df"))
        for name, look, key in (
            ("predicted change", PREDICTED_LOOK, "probe_predicted"),
            ("measured change", MEASURED_LOOK, "probe_measured"),
        )
    ]
    momentum = history_line("momentum's part of predicted", Look("neutral", "none", "dot"), rows, "probe_momentum")
    entropies = [
        history_line("entropy, sequences trained on", Look("entropy"), rows, "entropy", plus=False),
        history_line(
            "entropy, probe's sequences", Look("neutral", "triangle-up", "dot"), rows, "probe_entropy", watched, plus=False
        ),
    ]  # fmt: skip
    reward = history_line("reward", Look("reward", "diamond"), rows, "reward", ("reward_se", "reward_df"), plus=False)
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


def _without_doubted_error(row: HistoryRow) -> HistoryRow:
    """Without an interval where a step of the row was measured on less than half of its sequences: the error says nothing."""
    return row.model_copy(update={"probe_measured_se": None}) if row.probe_low_ess else row


@style.in_house_style
def plot_training_history(rows: Sequence[HistoryRow], *, analysed_step: float | None = None) -> Figure:
    """`history_panels` as a picture; analysed_step: whose checkpoint the analysis looked at, marked by a vertical line."""
    if not rows:
        return style.no_data_figure(_HISTORY_TITLE, "the training history is empty.")
    steps, panels = values_of(rows, "step"), history_panels(rows)
    figure = style.new_figure(8.6, 6.2)
    grid = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 0.8, 1.3))
    for axes, panel in zip(grid, panels, strict=True):
        draw_panel(axes, panel, dodge=dodge_of(steps, 2) if panel.zero else 0.0)
    from_zero(grid[0], panels[0])
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


def from_zero(axes: Axes, panel: Panel) -> None:
    """Entropy's axis begins at 0."""
    if panel.shown:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9))


def _courses(rows: Sequence[HistoryRow]) -> str:
    reward = reward_course_words(rows)
    text = f"Entropy {entropy_course_words(rows)[0]}. "
    return text + ("No reward was stored." if reward is None else f"Mean reward {reward}.")


def _agreement(rows: Sequence[HistoryRow]) -> str:
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
