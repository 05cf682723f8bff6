"""How far does the first order carry, and how much does the second add? The measured curve along the step, both ways.

    h(θ + sδθ) − h(θ) = D s + Q s² + …        s* = |D / Q|: where the second order is as large as the first

See docs/analyses/higher-order.md.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.step_results import HigherOrderResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS
from entropy_experiments.report.figures.lines import DELTA_H_LABEL
from entropy_experiments.text.numbers import plain
from rl_training.intervals import t_quantile

_TITLE = "How far the first order carries, and what the second adds"
_SECOND = "#117733"


@style.in_house_style
def plot_higher_order(result: HigherOrderResult) -> Figure:
    """The measured change along the step with its first- and second-order approximations; the even part by itself."""
    points = result.points
    if not points:
        return style.no_data_figure(_TITLE, "no change was measured along the step.")
    second = result.second_order.value
    scales, changes = (np.array([getattr(point, name) for point in points]) for name in ("scale", "change"))
    freedom = result.first_order.degrees_of_freedom
    reach = t_quantile(math.inf if freedom is None else freedom)
    errors = reach * np.array([point.standard_error or 0.0 for point in points])
    used = np.array([point.used for point in points])
    figure = style.new_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    _curve(left, scales, changes, errors, used, result)
    _even_part(right, scales, changes, used, second, result.fourth)
    return style.finish(figure, _TITLE, _caption(result, errors))


def _curve(
    axes: Axes,
    scales: np.ndarray,
    changes: np.ndarray,
    errors: np.ndarray,
    used: np.ndarray,
    result: HigherOrderResult,
) -> None:
    first, second, equal_at = result.first_order.value, result.second_order.value, result.equal_at.value
    style.zero_line(axes)
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    s = np.linspace(scales.min(), scales.max(), 201)
    if first is not None:
        axes.plot(s, first * s, "-", color=style.PREDICTED, label="first order")
        if second is not None:
            axes.plot(s, first * s + second * s * s, "--", color=_SECOND, label="first and second order")
    for mask, face, label in (
        (used, "white", "measured (reweighted)"),
        (~used, style.MEASURED, "measured, not used in the fit"),
    ):
        if mask.any():
            axes.errorbar(
                scales[mask], changes[mask], yerr=errors[mask], fmt="s", color=style.MEASURED, markerfacecolor=face,
                markeredgewidth=1.5, capsize=3, elinewidth=1.1, label=label,
            )  # fmt: skip
    span = scales.max() - scales.min()
    if equal_at is not None and first is not None:
        # On the side where the second order works against the first, the curve is back at 0 there.
        side = -equal_at if second is not None and first * second > 0 else equal_at
        if scales.min() <= side <= scales.max():
            axes.axvline(side, color=style.NEUTRAL, linestyle=":", linewidth=1.6)
            axes.annotate(
                f"{'−' if side < 0 else ''}s* = {'−' if side < 0 else ''}{plain(equal_at, 2)}",
                (side, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                color=style.NEUTRAL, fontsize=8.8,
            )  # fmt: skip
    axes.set_xlim(scales.min() - 0.04 * span - 0.01, scales.max() + 0.04 * span + 0.01)
    axes.set_xlabel("step scale s  (1: the step as it was taken; below 0: backwards)")
    axes.set_ylabel(DELTA_H_LABEL)
    axes.legend(loc="best", fontsize=8)


def _even_part(
    axes: Axes, scales: np.ndarray, changes: np.ndarray, used: np.ndarray, second: float | None, fourth: float | None
) -> None:
    place = {float(s): k for k, s in enumerate(scales)}
    pairs = sorted((s, k, place[-s]) for s, k in place.items() if s > 0 and -s in place)
    if second is None or not pairs:
        style.no_data(axes, "no pair of scales ±s\nto tell orders apart")
        return
    style.zero_line(axes)
    s = np.array([pair[0] for pair in pairs])
    even = np.array([0.5 * (changes[k] + changes[m]) for _, k, m in pairs])
    in_fit = np.array([used[k] and used[m] for _, k, m in pairs])
    fine = np.linspace(0.0, s.max(), 101)
    axes.plot(fine, second * fine**2, "--", color=_SECOND, label="second order Q s²")
    if fourth is not None:
        axes.plot(fine, second * fine**2 + fourth * fine**4, ":", color=style.NEUTRAL, label="and fourth")
    for mask, face in ((in_fit, "white"), (~in_fit, style.MEASURED)):
        axes.plot(
            s[mask], even[mask], "s", color=style.MEASURED, markerfacecolor=face, markeredgewidth=1.5, linestyle="none"
        )
    axes.set_xlabel("step scale s")
    axes.set_ylabel("even part [Δh(s) + Δh(−s)] / 2\n(nats per token)")
    axes.legend(loc="best", fontsize=8)


def _caption(result: HigherOrderResult, errors: np.ndarray) -> str:
    second, equal = result.second_order, result.equal_at
    if second.value is None:
        return f"Left: the measured change along the step. The second order is not known: {result.reason}."
    text = (
        f"Left: the change measured on the same tokens along the step, forwards and backwards. At s = 1 the first order makes "
        f"{result.first_order.shown()} and the second {second.shown()} nats per token"
    )
    if equal.value is not None:
        text += f"; they are equal in size at s* = {plain(equal.value, 2)}"
        if equal.low is not None and second.total_error is not None:
            text += f" (from {plain(equal.low, 2)} to {'unbounded' if equal.high is None else plain(equal.high, 2)})"
    text += ". Right: the part of the change that does not turn around with the step, in which the first order cancels."
    if errors.any():
        text += f" Bars: {BARS} over prompts, common to all points of the curve for the most part."
    return text
