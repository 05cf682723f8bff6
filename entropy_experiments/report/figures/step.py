"""Was the step's change of entropy predicted, and which part of the update made it?

Predicted: δh(s) = s·⟨∇h, δθ⟩, a straight line in the step scale s. Measured: h(θ + s·δθ) − h(θ), reweighted
on the same tokens (SNIS). They must touch as s → 0; the gap at s = 1 is curvature and noise. δθ = batch +
momentum + weight decay, exactly. See docs/theory, "The step that was taken" and "Actual change".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.report.figures.bars import BARS, bars_of_rows, reaches
from entropy_experiments.report.figures.style import (
    DELTA_H_LABEL,
    FIXED_PREFIX,
    FIXED_PREFIX_MEASURED,
    MEASURED,
    NEUTRAL,
    PREDICTED,
    finish,
    in_house_style,
    new_figure,
    no_data,
    no_data_figure,
    zero_line,
)
from entropy_experiments.statistics.confidence import known, shown
from entropy_experiments.text.numbers import lookup, plain, series, signed
from rl_training.intervals import t_quantile

_SCALING_TITLE = "Predicted and measured change of entropy along the step"
_SPLIT_TITLE = "Which part of the update moved entropy"
_RATIO_RANGE = (-1.0, 3.0)
_PARTS = (
    ("batch", "this batch"),
    ("momentum", "momentum\n(earlier batches)"),
    ("weight_decay", "weight decay"),
)


def _change_panel(
    axes: Axes, scales: np.ndarray, columns: dict[str, np.ndarray], errors: dict[str, np.ndarray]
) -> None:
    zero_line(axes)
    predicted, spread = columns["predicted"], errors["predicted"]
    if np.isfinite(predicted).any():
        axes.fill_between(
            scales, predicted - spread[0], predicted + spread[1], color=PREDICTED, alpha=0.16, linewidth=0
        )
        axes.plot(scales, predicted, "-", marker="o", color=PREDICTED, label="predicted (first order)")
    if np.isfinite(columns["actual_snis"]).any():
        axes.errorbar(
            scales,
            columns["actual_snis"],
            yerr=errors["actual_snis"],
            fmt="s",
            color=MEASURED,
            markerfacecolor="white",
            markeredgewidth=1.6,
            capsize=4,
            label="measured (reweighted)",
        )
    if np.isfinite(columns["predicted_fixed_prefix"]).any():
        axes.plot(
            scales,
            columns["predicted_fixed_prefix"],
            "--",
            color=FIXED_PREFIX,
            linewidth=1.4,
            label="predicted, given tokens only",
        )
    if np.isfinite(columns["actual_fixed_prefix"]).any():
        axes.plot(
            scales,
            columns["actual_fixed_prefix"],
            "x",
            color=FIXED_PREFIX_MEASURED,
            markeredgewidth=1.8,
            label="measured, given tokens only",
        )
    axes.set_xlim(-0.02 * scales.max(), 1.06 * scales.max())
    axes.set_xlabel("step scale s  (1: the step as it was taken)")
    axes.set_ylabel(DELTA_H_LABEL)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: ("given tokens" in labels[place], "measured" in labels[place]))
    axes.legend([handles[place] for place in order], [labels[place] for place in order], loc="best")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Signed ratio; NaN where the denominator is zero (a ratio to nothing is left out, not clamped)."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def _ratio_panel(axes: Axes, scales: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    low, high = _RATIO_RANGE
    lines = (
        ("actual_snis", "predicted", "measured / predicted", "o-", MEASURED),
        (
            "actual_snis",
            "predicted_split",
            "same sample on both sides\n(must reach 1 as s → 0)",
            "^--",
            NEUTRAL,
        ),
        ("actual_fixed_prefix", "predicted_fixed_prefix", "given tokens only", "x:", FIXED_PREFIX_MEASURED),
    )
    axes.axhline(1.0, color="#444444", linewidth=0.9)
    shown = []
    for above, below, label, form, colour in lines:
        ratio = _ratio(columns[above], columns[below])
        if not np.isfinite(ratio).any():
            continue
        inside = np.where((ratio >= low) & (ratio <= high), ratio, np.nan)
        axes.plot(scales, inside, form, color=colour, label=label, markerfacecolor="white", markeredgewidth=1.5)
        shown.append(inside[np.isfinite(inside)])
        for scale, value in zip(scales, ratio, strict=True):
            if np.isfinite(value) and not low <= value <= high:
                axes.annotate(
                    f"{value:.1f}",
                    (scale, high if value > high else low),
                    color=colour,
                    fontsize=8,
                    ha="center",
                    va="top" if value > high else "bottom",
                    annotation_clip=False,
                )
                shown.append(np.array([high if value > high else low]))
    if not shown:
        no_data(axes, "no ratio:\nthe predicted change is zero")
        return
    everything = np.concatenate([*shown, [1.0]])
    margin = max(0.1, 0.15 * float(np.ptp(everything)))
    axes.set_ylim(everything.min() - margin, everything.max() + 2.2 * margin)
    axes.set_xscale("log", base=2)
    axes.set_xticks(scales, [f"1/{1 / scale:g}" if scale < 1 else f"{scale:g}" for scale in scales])
    axes.minorticks_off()
    axes.set_xlabel("step scale s")
    axes.set_ylabel("measured / predicted")
    axes.legend(loc="upper left")


@in_house_style
def plot_predicted_vs_actual(
    rows: Sequence[Mapping[str, Any]],
    *,
    predicted_standard_error: float | None = None,
    actual_standard_error: float | None = None,
    degrees_of_freedom: float | None = None,
) -> Figure:
    """Predicted and measured Δh over the step scale, and their ratio.

    Parameters
    ----------
    rows: one mapping a scale with "scale", "predicted", "actual_snis" and, where known, "predicted_split",
        "predicted_fixed_prefix", "actual_fixed_prefix", "actual_snis_standard_error", "ess"; nats per token. The ends of
        95% intervals, "predicted_low", "predicted_high", "actual_snis_low" and "actual_snis_high", go before errors.
    predicted_standard_error: of the prediction at s = 1; it scales with s, as the prediction does.
    actual_standard_error: of the measurement at s = 1, drawn there (and nowhere else unless rows carry
        their own).
    degrees_of_freedom: behind these errors, one less than there are evaluation prompts; None: as many as it takes.
    """
    rows = sorted((row for row in rows if (series([row], "scale") > 0).all()), key=lambda row: row["scale"])
    keys = ("predicted", "predicted_split", "actual_snis", "predicted_fixed_prefix", "actual_fixed_prefix")
    columns = {key: series(rows, key) for key in keys}
    if not any(np.isfinite(column).any() for column in columns.values()):
        return no_data_figure(_SCALING_TITLE, "no measurement along the step was stored.")
    scales = series(rows, "scale")
    measured_error = series(rows, "actual_snis_standard_error")
    if actual_standard_error is not None:
        measured_error = np.where((scales == 1) & np.isnan(measured_error), actual_standard_error, measured_error)
    t = t_quantile(math.inf if degrees_of_freedom is None else degrees_of_freedom)
    reach = {
        "predicted": t * scales * (np.nan if predicted_standard_error is None else predicted_standard_error),
        "actual_snis": t * np.where(measured_error >= 0, measured_error, np.nan),
    }
    errors = {key: bars_of_rows(rows, key, half) for key, half in reach.items()}
    figure = new_figure(8.6, 4.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    _change_panel(left, scales, columns, errors)
    _ratio_panel(right, scales, columns)
    return finish(figure, _SCALING_TITLE, _scaling_caption(scales, columns, errors, series(rows, "ess")))


def _scaling_caption(
    scales: np.ndarray, columns: dict[str, np.ndarray], errors: dict[str, np.ndarray], ess: np.ndarray
) -> str:
    last, first = int(np.argmax(scales)), int(np.argmin(scales))
    known = any(np.isfinite(columns[key]).any() for key in ("predicted", "actual_snis"))
    predicted, measured, where = ("predicted", "actual_snis", "") if known else (
        "predicted_fixed_prefix", "actual_fixed_prefix", " on given tokens"
    )  # fmt: skip
    parts = [
        f"Left: at s = {plain(scales[last])} the predicted change{where} is {signed(columns[predicted][last])} "
        f"and the measured one {signed(columns[measured][last])} nats per token. The prediction is a straight line by "
        f"construction; where the {'squares' if known else 'crosses'} leave it, the step is too long for the first order (or "
        "the measurement is noisy)."
    ]
    if any(np.isfinite(error).any() for error in errors.values()):
        parts.append(f"Band and bars: {BARS}.")
    ratio = _ratio(columns["actual_snis"], columns["predicted_split"])[first]
    if np.isfinite(ratio):
        parts.append(f"Right: with the same sample on both sides the ratio at s = {scales[first]:g} is {ratio:.2f}.")
    if np.isfinite(ess).any():
        parts.append(f"Smallest effective sample size: {plain(np.nanmin(ess))}.")
    return " ".join(parts)


@in_house_style
def plot_entropy_split(
    predicted: Mapping[str, Any] | None,
    actual: Mapping[str, Any] | None = None,
    *,
    degrees_of_freedom: float | None = None,
) -> Figure:
    """Bars of the predicted Δh of batch, momentum, weight decay and their total, beside the measured Δh.

    Parameters
    ----------
    predicted: "batch", "momentum", "weight_decay", "total" -> {"value", "standard_error"}, nats per token.
    actual: {"value", "standard_error"} of the measured change, or None. Either may hold "low" and "high", its 95% interval.
    degrees_of_freedom: of errors that do not say.
    """
    entries = [(label, lookup(predicted, key), "#7FB2D6", "") for key, label in _PARTS]
    entries.append(("total\npredicted", lookup(predicted, "total"), PREDICTED, ""))
    entries.append(("measured", actual, MEASURED, "///"))
    numbers = [known(entry, degrees_of_freedom) for _, entry, _, _ in entries]
    if all(number is None for number in numbers):
        return no_data_figure(_SPLIT_TITLE, "no predicted or measured change of entropy was stored.")
    figure = new_figure(8.6, 3.7)
    axes = figure.add_subplot()
    zero_line(axes)
    axes.grid(False, axis="x")
    for place, ((_, _, colour, hatch), number) in enumerate(zip(entries, numbers, strict=True)):
        if number is None:
            axes.text(place, 0, "no data", ha="center", va="bottom", color=NEUTRAL)
            continue
        value, (below, above) = number.value, reaches(number)
        axes.bar(
            place,
            value,
            width=0.62,
            color=colour,
            hatch=hatch,
            edgecolor="white" if hatch else colour,
            yerr=[[below], [above]] if below or above else None,
            capsize=5,
            ecolor="#222222",
        )
        tip = min(value, 0.0) - below if value < 0 else max(value, 0.0) + above
        axes.annotate(
            number.text().replace(" [", "\n["),
            (place, tip),
            (0, -4 if value < 0 else 4),
            textcoords="offset points",
            ha="center",
            va="top" if value < 0 else "bottom",
            fontsize=8.8,
        )
    axes.axvline(2.5, color="#AAAAAA", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(entries)), [label for label, *_ in entries])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(entries) - 0.4)
    axes.margins(y=0.18)
    axes.set_ylabel(DELTA_H_LABEL)
    caption = (
        "The optimizer's step is exactly the sum of three parts, so the three predicted changes on the "
        "left add up to "
        f"the total. Below zero: entropy falls. Bars and brackets: {BARS}. "
        f"Total predicted {shown(entries[3][1], True, degrees_of_freedom)}, "
        f"measured {shown(entries[4][1], True, degrees_of_freedom)} nats per token."
    )
    return finish(figure, _SPLIT_TITLE, caption)
