"""Was the step's change of entropy predicted, and which part of the update made it?

Predicted: δh(s) = s·⟨∇h, δθ⟩, a straight line in the step scale s. Measured: h(θ + s·δθ) − h(θ), reweighted
on the same tokens (SNIS). They must touch as s → 0; the gap at s = 1 is curvature and noise. δθ = batch +
momentum + weight decay, exactly. See docs/theory, "The step that was taken" and "Actual change".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.summary import StepParts
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS, bars_of_rows, reaches
from entropy_experiments.report.figures.drawing import colour_of, draw_line, draw_panel
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Line, Look, Panel, in_words
from entropy_experiments.statistics.confidence import Known, shown
from entropy_experiments.text.numbers import plain, series, signed
from rl_training.intervals import t_quantile

_SCALING_TITLE = "Predicted and measured change of entropy along the step"
_SPLIT_TITLE = "Which part of the update moved entropy"
RATIO_RANGE = (-1.0, 3.0)
"""Ratios beyond it are of a prediction that is wrong many times over: named at the edge, not drawn to scale."""
_CHANGES = (
    ("predicted", "predicted (first order)", Look("predicted")),
    ("actual_snis", "measured (reweighted)", Look("measured", "square-open", "none")),
    ("predicted_fixed_prefix", "predicted, given tokens only", Look("fixed", "none", "dash")),
    ("actual_fixed_prefix", "measured, given tokens only", Look("fixed-measured", "x", "none")),
)
_RATIOS = (
    ("actual_snis", "predicted", "measured / predicted", Look("measured", "circle-open")),
    ("actual_snis", "predicted_split", "same sample on both sides", Look("neutral", "triangle-up", "dash")),
    ("actual_fixed_prefix", "predicted_fixed_prefix", "ratio, given tokens only", Look("fixed-measured", "x", "dot")),
)
_PARTS = (("batch", "this batch"), ("momentum", "momentum (earlier batches)"), ("weight_decay", "weight decay"))


@dataclass(frozen=True)
class StepScaling:
    """Changes and ratios over the scale of the step; ess: (S,) effective sample sizes."""

    scales: np.ndarray
    changes: Panel
    ratios: Panel
    ess: np.ndarray


def step_scaling(
    rows: Sequence[Mapping[str, Any]],
    *,
    predicted_standard_error: float | None = None,
    actual_standard_error: float | None = None,
    degrees_of_freedom: float | None = None,
) -> StepScaling | None:
    """Predicted and measured Δh over the step scale, and their ratio; None where no number is known.

    Args:
        rows: one mapping a scale with "scale", "predicted", "actual_snis" and, where known, "predicted_split",
            "predicted_fixed_prefix", "actual_fixed_prefix", "actual_snis_standard_error", "ess"; nats per token. The ends of
            95% intervals, "predicted_low", "predicted_high", "actual_snis_low" and "actual_snis_high", go before errors.
        predicted_standard_error: of the prediction at s = 1; it scales with s, as the prediction does.
        actual_standard_error: of the measurement at s = 1, used there (and nowhere else unless rows carry their own).
        degrees_of_freedom: behind these errors, one less than there are evaluation prompts; None: as many as it takes.
    """
    rows = sorted((row for row in rows if (series([row], "scale") > 0).all()), key=lambda row: row["scale"])
    columns = {key: series(rows, key) for key in {*(c[0] for c in _CHANGES), *(r[1] for r in _RATIOS)}}
    if not any(np.isfinite(column).any() for column in columns.values()):
        return None
    scales, measured_error = series(rows, "scale"), series(rows, "actual_snis_standard_error")
    if actual_standard_error is not None:
        measured_error = np.where((scales == 1) & np.isnan(measured_error), actual_standard_error, measured_error)
    t = t_quantile(math.inf if degrees_of_freedom is None else degrees_of_freedom)
    half_widths = {
        "predicted": t * scales * (np.nan if predicted_standard_error is None else predicted_standard_error),
        "actual_snis": t * np.where(measured_error >= 0, measured_error, np.nan),
    }
    changes = []
    for key, name, look in _CHANGES:
        bars = bars_of_rows(rows, key, half_widths[key]) if key in half_widths else None
        texts = in_words(columns[key], bars)
        bars = bars if bars is not None and np.isfinite(bars).any() else None
        changes.append(Line(name, look, scales, columns[key], bars, texts, band=key == "predicted"))
    ratios = [Line(name, look, scales, _ratio(columns[above], columns[below])) for above, below, name, look in _RATIOS]
    return StepScaling(
        scales,
        Panel(DELTA_H_LABEL, changes, zero=True),
        Panel("measured / predicted", ratios, empty="no ratio:\nthe predicted change is zero"),
        series(rows, "ess"),
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Signed ratio; NaN where the denominator is zero (a ratio to nothing is left out, not clamped)."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


@style.in_house_style
def plot_predicted_vs_actual(rows: Sequence[Mapping[str, Any]], **errors: float | None) -> Figure:
    """`step_scaling` as a picture, with its arguments."""
    scaling = step_scaling(rows, **errors)
    if scaling is None:
        return style.no_data_figure(_SCALING_TITLE, "no measurement along the step was stored.")
    figure = style.new_figure(8.6, 4.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    draw_panel(left, scaling.changes)
    left.set_xlim(-0.02 * scaling.scales.max(), 1.06 * scaling.scales.max())
    left.set_xlabel("step scale s  (1: the step as it was taken)")
    _draw_ratios(right, scaling)
    return style.finish(figure, _SCALING_TITLE, _scaling_caption(scaling))


def _draw_ratios(axes: Axes, scaling: StepScaling) -> None:
    (low, high), lines = RATIO_RANGE, scaling.ratios.shown
    axes.axhline(1.0, color="#444444", linewidth=0.9)
    if not lines:
        style.no_data(axes, scaling.ratios.empty)
        return
    reached = [1.0]
    for line in lines:
        inside = np.where((line.y >= low) & (line.y <= high), line.y, np.nan)
        draw_line(axes, Line(line.name, line.look, line.x, inside))
        reached += np.clip(line.y[np.isfinite(line.y)], low, high).tolist()
        for scale, value in zip(line.x, line.y, strict=True):
            if np.isfinite(value) and not low <= value <= high:
                edge, anchor = (high, "top") if value > high else (low, "bottom")
                axes.annotate(
                    f"{value:.1f}", (scale, edge), color=colour_of(line.look.colour), fontsize=8, ha="center", va=anchor,
                    annotation_clip=False,
                )  # fmt: skip
    margin = max(0.1, 0.15 * float(np.ptp(reached)))
    axes.set_ylim(min(reached) - margin, max(reached) + 2.2 * margin)
    axes.set_xscale("log", base=2)
    axes.set_xticks(scaling.scales, scale_names(scaling.scales))
    axes.minorticks_off()
    axes.set_xlabel("step scale s")
    axes.set_ylabel(scaling.ratios.label)
    axes.legend(loc="upper left")


def scale_names(scales: np.ndarray) -> list[str]:
    """``1/16``, ``1``, ``2``."""
    return [f"1/{1 / scale:g}" if scale < 1 else f"{scale:g}" for scale in scales]


def _scaling_caption(scaling: StepScaling) -> str:
    lines, scales = scaling.changes.lines, scaling.scales
    last, first = int(np.argmax(scales)), int(np.argmin(scales))
    drawn = lines[0].known or lines[1].known
    (predicted, measured), where = (lines[:2], "") if drawn else (lines[2:], " on given tokens")
    parts = [
        f"Left: at s = {plain(scales[last])} the predicted change{where} is {signed(predicted.y[last])} "
        f"and the measured one {signed(measured.y[last])} nats per token. The prediction is a straight line by "
        f"construction; where the {'squares' if drawn else 'crosses'} leave it, the step is too long for the first order (or "
        "the measurement is noisy)."
    ]
    if any(line.bars is not None for line in lines):
        parts.append(f"Band and bars: {BARS}.")
    ratio = scaling.ratios.lines[1].y[first]
    if np.isfinite(ratio):
        parts.append(
            f"Right: with the same sample on both sides the ratio at s = {scales[first]:g} is {ratio:.2f}; it must reach 1 as "
            "s → 0."
        )
    if np.isfinite(scaling.ess).any():
        parts.append(f"Smallest effective sample size: {plain(np.nanmin(scaling.ess))}.")
    return " ".join(parts)


@dataclass(frozen=True)
class SplitBar:
    """One bar of the split: a part of the predicted change, its total, or the measured one."""

    label: str
    number: Known | None
    colour: str
    opacity: float = 1.0
    hatched: bool = False


def split_bars(predicted: StepParts | None, actual: Estimate | None) -> list[SplitBar]:
    """Bars of the predicted Δh of batch, momentum, weight decay and their total, and of the measured Δh.

    Args:
        predicted: in nats per token; None where nothing was predicted.
        actual: the measured change; None where nothing was measured.
    """

    def number(key: str) -> Known | None:
        return None if predicted is None else getattr(predicted, key).known()

    return [
        *(SplitBar(label, number(key), "predicted", opacity=0.55) for key, label in _PARTS),
        SplitBar("total predicted", number("total"), "predicted"),
        SplitBar("measured", None if actual is None else actual.known(), "measured", hatched=True),
    ]


@style.in_house_style
def plot_entropy_split(predicted: StepParts | None, actual: Estimate | None = None) -> Figure:
    """`split_bars` as a picture, with its arguments."""
    bars = split_bars(predicted, actual)
    if all(bar.number is None for bar in bars):
        return style.no_data_figure(_SPLIT_TITLE, "no predicted or measured change of entropy was stored.")
    figure = style.new_figure(8.6, 3.7)
    axes = figure.add_subplot()
    style.zero_line(axes)
    axes.grid(False, axis="x")
    for place, bar in enumerate(bars):
        if bar.number is None:
            axes.text(place, 0, "no data", ha="center", va="bottom", color=style.NEUTRAL)
            continue
        value, (below, above) = bar.number.value, reaches(bar.number)
        axes.bar(
            place, value, width=0.62, color=colour_of(bar.colour), alpha=bar.opacity, hatch="///" if bar.hatched else "",
            edgecolor="white", linewidth=0 if bar.opacity < 1 else 1,
            yerr=[[below], [above]] if below or above else None, capsize=5, ecolor=style.INK,
        )  # fmt: skip
        tip = min(value, 0.0) - below if value < 0 else max(value, 0.0) + above
        axes.annotate(
            bar.number.text().replace(" [", "\n["), (place, tip), (0, -4 if value < 0 else 4),
            textcoords="offset points", ha="center", va="top" if value < 0 else "bottom", fontsize=8.8,
        )  # fmt: skip
    axes.axvline(2.5, color="#AAAAAA", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(bars)), [bar.label.replace(" (", "\n(").replace("total ", "total\n") for bar in bars])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.margins(y=0.18)
    axes.set_ylabel(DELTA_H_LABEL)
    total, measured = (shown(bar.number) for bar in bars[3:])
    caption = (
        "The optimizer's step is exactly the sum of three parts, so the three predicted changes on the left add up to "
        f"the total. Below zero: entropy falls. Bars and brackets: {BARS}. "
        f"Total predicted {total}, measured {measured} nats per token."
    )
    return style.finish(figure, _SPLIT_TITLE, caption)
