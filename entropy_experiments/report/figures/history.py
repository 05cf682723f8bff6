"""Entropy through training: what it did, and how well each step's change was predicted.

``plot_training_history`` reads what the probe wrote while training; ``plot_fisher_evolution`` reads the
analyses of several checkpoints of one run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.history import holds_means, probed_sums
from entropy_experiments.records.training_course import entropy_course_words, reward_course_words
from entropy_experiments.report.figures.bars import BARS, bars_of_columns, values_and_bars
from entropy_experiments.report.figures.style import (
    DELTA_H_LABEL,
    ENTROPY,
    MEASURED,
    NEUTRAL,
    PREDICTED,
    REWARD,
    finish,
    in_house_style,
    new_figure,
    no_data,
    no_data_figure,
    step_axis,
    zero_line,
)
from entropy_experiments.statistics.confidence import correlation_words
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.text.numbers import as_number, counted, series

_HISTORY_TITLE = "Entropy and reward over training, and the change of every step"
# Longer histories are drawn as lines and bands: markers and bars would hide each other.
_MOST_MARKED_STEPS = 60
_EVOLUTION_TITLE = "The Fisher analysis over the checkpoints of a run"


def _with_steps(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that carry a training step, in its order."""
    return sorted((row for row in rows if as_number(row.get("step")) is not None), key=lambda row: row["step"])


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str, form: str) -> bool:
    if not np.isfinite(values).any():
        return False
    axes.plot(
        steps,
        values,
        form,
        color=colour,
        label=label,
        markersize=5 if len(steps) <= _MOST_MARKED_STEPS else 0,
        markerfacecolor="white",
        markeredgewidth=1.4,
        linewidth=1.8 if len(steps) <= _MOST_MARKED_STEPS else 1.1,
    )
    return True


def _changes(
    axes: Axes,
    steps: np.ndarray,
    predicted: tuple[np.ndarray, np.ndarray],
    measured: tuple[np.ndarray, np.ndarray],
    extras: Sequence[tuple[np.ndarray, str, str]] = (),
) -> None:
    """Predicted and measured Δh side by side at every step; each pair is ((n,) values, (2, n) bars)."""
    known = [name for name, (values, _) in (("p", predicted), ("m", measured)) if np.isfinite(values).any()]
    if not known:
        no_data(axes, "no data: no predicted or measured change of entropy")
        return
    zero_line(axes)
    offset = 0.08 * float(np.min(np.diff(steps))) if len(steps) > 1 and np.all(np.diff(steps) > 0) else 0.02
    for values, label, form in extras:
        if np.isfinite(values).any():
            axes.plot(steps, values, form, color=NEUTRAL, linewidth=1.1, label=label)
    styles = (
        (predicted, -offset, "o", PREDICTED, PREDICTED, "predicted"),
        (measured, offset, "s", MEASURED, "white", "measured"),
    )
    for (values, errors), shift, marker, colour, face, label in styles:
        if np.isfinite(values).any():
            bars = errors if np.isfinite(errors).any() else None
            if len(steps) > _MOST_MARKED_STEPS:
                axes.plot(steps, values, color=colour, linewidth=0.9, label=label)
                if bars is not None:
                    low, high = values - bars[0], values + bars[1]
                    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
                continue
            axes.errorbar(
                steps + shift,
                values,
                yerr=bars,
                fmt=marker,
                color=colour,
                markerfacecolor=face,
                markeredgewidth=1.5,
                markersize=5.5,
                capsize=3,
                linewidth=1.2,
                label=label,
            )
    axes.set_ylabel(DELTA_H_LABEL)
    axes.margins(y=0.12)
    axes.legend(loc="best", ncols=1)


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


def _bars_are_described(bars: Sequence[np.ndarray]) -> str:
    known = any(np.isfinite(lengths).any() for lengths in bars)
    return f"Bars or bands: {BARS}." if known else "No intervals were stored."


def _entropy_and_reward(
    panels: Sequence[Axes], steps: np.ndarray, entropies: Sequence[tuple], rewards: np.ndarray
) -> None:
    """Fill the two upper panels: entropy (several lines, each (values, label, marker form)) and mean
    reward.
    """
    drawn = [_line(panels[0], steps, values, label, ENTROPY, form) for values, label, form in entropies]
    if any(drawn):
        panels[0].set_ylabel("entropy h\n(nats per token)")
        highest = max(float(np.nanmax(values)) for values, _, _ in entropies if np.isfinite(values).any())
        panels[0].set_ylim(0, 1.15 * highest if highest > 0 else 1)
        if sum(drawn) > 1:
            panels[0].legend(loc="best")
    else:
        no_data(panels[0], "no data: no entropy")
    if _line(panels[1], steps, rewards, "reward", REWARD, "D-"):
        panels[1].set_ylabel("mean reward")
    else:
        no_data(panels[1], "no data: no reward")


@in_house_style
def plot_training_history(history: Sequence[Mapping[str, Any]], *, analysed_step: float | None = None) -> Figure:
    """Entropy, reward, and predicted beside measured Δh over training steps.

    Parameters
    ----------
    history: one mapping a step with "step" and any of "entropy", "reward", "probe/entropy",
        "probe/predicted", "probe/measured", "probe/momentum", and of these with errors "…_se" and "…_df" (degrees of freedom);
        nats per token.
    analysed_step: the step whose checkpoint the analysis looked at, marked by a vertical line.
    """
    rows = _with_steps(history)
    if not rows:
        return no_data_figure(_HISTORY_TITLE, "the training history is empty.")
    steps = series(rows, "step")
    predicted, measured = series(rows, "probe/predicted"), series(rows, "probe/measured")
    figure = new_figure(8.6, 6.2)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 0.8, 1.3))
    entropies = [
        (series(rows, "entropy"), "training buffer", "o-"),
        (series(rows, "probe/entropy"), "sequences that the probe watched", "^--"),
    ]
    _entropy_and_reward(panels, steps, entropies, series(rows, "reward"))
    errors = [bars_of_columns(rows, f"probe/{name}_se", f"probe/{name}_df") for name in ("predicted", "measured")]
    extras = [(series(rows, "probe/momentum"), "momentum's part of predicted", ".:")]
    _changes(panels[2], steps, (predicted, errors[0]), (measured, errors[1]), extras)
    step_axis(panels[2], steps.min(), steps.max())
    panels[2].set_xlabel("training step")
    if analysed_step is not None and steps.min() <= analysed_step <= steps.max():
        for panel in panels:
            panel.axvline(analysed_step, color=NEUTRAL, linewidth=1.0, linestyle="-.", zorder=1)
        panels[0].annotate(
            "analysed here",
            (analysed_step, 1),
            (4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=NEUTRAL,
        )
    _band(panels[0], rows, steps, "probe/entropy", "probe/measured_df", ENTROPY)
    _band(panels[1], rows, steps, "reward", "reward_df", REWARD)
    caption = " ".join([_courses(rows), _agreement(rows), _bars_are_described(errors)])
    return finish(figure, _HISTORY_TITLE, caption)


def _band(
    axes: Axes, rows: Sequence[Mapping[str, Any]], steps: np.ndarray, key: str, freedom: str, colour: str
) -> None:
    """The 95% intervals around a line of the upper panels, where its errors are known."""
    values, bars = series(rows, key), bars_of_columns(rows, f"{key}_se", freedom)
    known = np.isfinite(values) & np.isfinite(bars).all(0)
    if known.sum() > 1:
        low, high = (values - bars[0])[known], (values + bars[1])[known]
        axes.fill_between(steps[known], low, high, color=colour, alpha=0.15, linewidth=0)
        top = max(axes.get_ylim()[1], 1.05 * float(high.max()))
        axes.set_ylim(min(axes.get_ylim()[0], float(low.min())), top)


def _shared(predicted: np.ndarray, measured: np.ndarray) -> str:
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() < 2:
        return (
            "At the one step with both: see the bars."
            if both.any()
            else "No step has both a predicted and a measured change."
        )
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


@in_house_style
def plot_fisher_evolution(evolution: Sequence[Mapping[str, Any]]) -> Figure:
    """Entropy, reward, predicted and measured Δh, and kernel size over the analysed checkpoints of one run.

    Parameters
    ----------
    evolution: one mapping a checkpoint with "step" and any of "entropy", "reward", "predicted", "actual"
        (numbers, with "predicted_se" and "actual_se" beside them, or {"value", "standard_error"}; nats per
        token), "kernel_norm", "same_prompt_mean", "cross_prompt_mean" (of |K₁|).
    """
    rows = _with_steps(evolution)
    if not rows:
        return no_data_figure(_EVOLUTION_TITLE, "no checkpoint was analysed.")
    steps = series(rows, "step")
    entropy, bars = values_and_bars(_entries(rows, "entropy"))
    predicted, measured = (values_and_bars(_entries(rows, key)) for key in ("predicted", "actual"))
    figure = new_figure(8.6, 6.4)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    _entropy_and_reward(panels[:2], steps, [(entropy, "evaluation buffer", "o-")], series(rows, "reward"))
    if np.isfinite(bars).any():
        panels[0].errorbar(steps, entropy, yerr=bars, fmt="none", ecolor=ENTROPY, elinewidth=1.2, capsize=3)
        panels[0].set_ylim(0, max(panels[0].get_ylim()[1], 1.05 * float(np.nanmax(entropy + bars[1]))))
    _changes(panels[2], steps, predicted, measured)
    kernel = [
        _line(panels[3], steps, series(rows, key), label, colour, form)
        for key, label, colour, form in (
            ("kernel_norm", "norm of the kernel", "#222222", "o-"),
            ("same_prompt_mean", "mean, same prompt", PREDICTED, "s--"),
            ("cross_prompt_mean", "mean, other prompts", MEASURED, "^:"),
        )
    ]
    if any(kernel):
        panels[3].set_ylabel("Fisher kernel K₁\n(nats² × P)")
        panels[3].legend(loc="best")
        positive = np.concatenate([line.get_ydata() for line in panels[3].lines])
        positive = positive[np.isfinite(positive)]
        if positive.min() > 0 and positive.max() > 30 * positive.min():
            panels[3].set_yscale("log")
        panels[3].margins(y=0.3)
    else:
        no_data(panels[3], "no data: no kernel")
    for panel in panels[2:]:
        step_axis(panel, steps.min(), steps.max())
        panel.set_xlabel("training step")
    caption = " ".join(
        [
            f"{len(rows)} analysed checkpoint{'' if len(rows) == 1 else 's'}.",
            _shared(predicted[0], measured[0]),
            _bars_are_described((bars, predicted[1], measured[1])),
        ]
    )
    return finish(figure, _EVOLUTION_TITLE, caption)
