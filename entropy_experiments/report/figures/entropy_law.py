"""Reward against entropy over training, the curve R = −a·e^H + b with its band, and what its first third predicted.

Numbers of evolution.json (records.law_results); docs/analyses/evolution.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.law_results import FittedLaw, HeldOut, LawResult
from entropy_experiments.records.record import NotKnown
from entropy_experiments.report.evolution_words import law_sentence
from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import plain

_TITLE = "Does reward follow entropy by R = −a·e^H + b?"
H_LABEL, R_LABEL = "entropy H (nats per token)", "mean reward R"


@dataclass(frozen=True)
class Curve:
    """A fitted curve with its 95% band, (m,) each. colour: as `lines.Look` has it."""

    name: str
    colour: str
    entropy: Sequence[float]
    reward: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class LawPoints:
    """(n,) steps with their entropy (nats per token) and mean reward; the first `first` of them were fitted for the forecast.

    fit, forecast: the curve of all steps, and that of the first ones, None where there is none. later: the steps after them
    against the forecast, None without one.
    """

    step: Sequence[float]
    entropy: np.ndarray
    reward: np.ndarray
    first: int
    fit: Curve | None
    forecast: Curve | None
    later: HeldOut | None

    @property
    def reward_range(self) -> tuple[float, float]:
        """Ends of the vertical axis."""
        span = float(np.ptp(self.reward)) or 1.0
        return float(self.reward.min()) - 0.6 * span, float(self.reward.max()) + 0.6 * span


def law_points(law: LawResult) -> LawPoints | None:
    """What both drawings show of the law; None where no step has both entropy and reward."""
    points, forecast = law.points, law.forecast
    if not points.step:
        return None
    early = None if isinstance(forecast, NotKnown) else forecast
    return LawPoints(
        points.step,
        np.array(points.entropy),
        np.array(points.reward),
        len(points.step) if early is None else early.n,
        _curve(law.fit, "fit to all steps", "predicted"),
        _curve(forecast, "forecast of the first third", "measured"),
        None if early is None else early.held_out,
    )


def _curve(fit: FittedLaw | NotKnown, name: str, colour: str) -> Curve | None:
    if isinstance(fit, NotKnown):
        return None
    return Curve(name, colour, fit.curve.entropy, fit.curve.reward, fit.curve.low, fit.curve.high)


@style.in_house_style
def plot_entropy_law(law: LawResult) -> Figure:
    """Left: all steps and the curve fitted to them. Right: the first third's curve, and the later steps against it."""
    points = law_points(law)
    if points is None:
        return style.no_data_figure(_TITLE, "no step has both entropy and reward.")
    entropy, reward, first = points.entropy, points.reward, points.first
    figure = style.new_figure(9.2, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    hollow: dict[str, Any] = {
        "color": style.REWARD, "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.3
    }  # fmt: skip
    _draw_curve(left, points.fit)
    left.plot(entropy, reward, "o", label="steps", **hollow)
    left.set_title("all steps")
    if points.later is not None:
        order = np.argsort(entropy[first:])
        low, high = (np.array(ends)[order] for ends in (points.later.low, points.later.high))
        right.fill_between(
            entropy[first:][order], low, high, color=style.MEASURED, alpha=0.16, linewidth=0, label="95% band of a step"
        )
        _draw_curve(right, points.forecast)
        right.plot(
            entropy[:first], reward[:first], "s", color=style.NEUTRAL, markersize=5, label=f"first {first} steps"
        )
        right.plot(entropy[first:], reward[first:], "o", label=f"the {points.later.n} steps that came", **hollow)
        right.set_title(f"{points.later.inside:.0%} of what came lies in the band")
        right.set_xlabel(H_LABEL)
        right.legend(loc="best", fontsize=7.5)
    else:
        style.no_data(right, "no forecast: too few steps")
    left.set_xlabel(H_LABEL)
    left.set_ylabel(R_LABEL)
    left.legend(loc="best", fontsize=7.5)
    left.set_ylim(*points.reward_range)
    bands = f"Bands: {law.band}. Range of H: {plain(entropy.min())} to {plain(entropy.max())}."
    return style.finish(figure, _TITLE, f"{law_sentence(law)} {bands}")


def _draw_curve(axes: Axes, curve: Curve | None) -> None:
    if curve is not None:
        colour = style.COLOURS[curve.colour]
        axes.fill_between(curve.entropy, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(curve.entropy, curve.reward, color=colour, label=curve.name)
