"""Reward against entropy over training, the curve R = −a·e^H + b with its band, and what its first third foretold.

Numbers of `analyses.entropy_law.law_over_training`; docs/analyses/evolution.md.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.report.figures.style import (
    MEASURED,
    NEUTRAL,
    PREDICTED,
    REWARD,
    finish,
    in_house_style,
    new_figure,
    no_data,
    no_data_figure,
)
from entropy_experiments.text.numbers import lookup, plain

_TITLE = "Does reward follow entropy by R = −a·e^H + b?"


@in_house_style
def plot_entropy_law(law: Mapping[str, Any]) -> Figure:
    """Left: all steps and the curve fitted to them. Right: the first third's curve, and the later steps against it."""
    points = lookup(law, "points")
    if not points or not points["step"]:
        return no_data_figure(_TITLE, "no step has both entropy and reward.")
    entropy, reward = (np.asarray(points[key], dtype=float) for key in ("entropy", "reward"))
    figure = new_figure(9.2, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    _curve(left, law["fit"], PREDICTED, "fit, 95% band of the curve")
    left.plot(
        entropy, reward, "o", color=REWARD, markersize=5, markerfacecolor="white", markeredgewidth=1.3, label="steps"
    )
    left.set_title("all steps")
    held = lookup(law, "forecast", "held_out")
    if held:
        first = law["forecast"]["n"]
        order = np.argsort(entropy[first:])
        low, high = (np.asarray(held[key], dtype=float)[order] for key in ("low", "high"))
        right.fill_between(
            entropy[first:][order], low, high, color=MEASURED, alpha=0.16, linewidth=0, label="95% band of a step"
        )
        _curve(right, law["forecast"], MEASURED, "forecast of the first third")
        right.plot(entropy[:first], reward[:first], "s", color=NEUTRAL, markersize=5, label=f"first {first} steps")
        right.plot(
            entropy[first:], reward[first:], "o", color=REWARD, markersize=5, markerfacecolor="white", markeredgewidth=1.3,
            label=f"the {held['n']} steps that came",
        )  # fmt: skip
        right.set_title(f"{held['inside']:.0%} of what came lies in the band")
        right.set_xlabel("entropy H (nats per token)")
        right.legend(loc="best", fontsize=7.5)
    else:
        no_data(right, "no forecast: too few steps")
    left.set_xlabel("entropy H (nats per token)")
    left.set_ylabel("mean reward R")
    left.legend(loc="best", fontsize=7.5)
    span = float(np.ptp(reward)) or 1.0
    left.set_ylim(reward.min() - 0.6 * span, reward.max() + 0.6 * span)
    return finish(
        figure,
        _TITLE,
        f"{law['sentence']} Bands: {law['band']}. Range of H: {plain(entropy.min())} to {plain(entropy.max())}.",
    )


def _curve(axes: Axes, fit: Mapping[str, Any], colour: str, label: str) -> None:
    curve = lookup(fit, "curve")
    if not curve:
        axes.set_xlabel("entropy H (nats per token)")
        return
    at = curve["entropy"]
    axes.fill_between(at, curve["low"], curve["high"], color=colour, alpha=0.25, linewidth=0)
    axes.plot(at, curve["reward"], color=colour, label=label)
