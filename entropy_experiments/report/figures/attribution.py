"""Which training sequences moved entropy in this step? Their shares δh(i), sorted; the largest by name.

The shares add up to the batch part of the predicted change, exactly: δh_batch = Σ_i δh(i). See docs/theory,
"Fisher kernel".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import counted, signed

_TITLE = "Which training sequences moved entropy in this step"
UNIT = 1e-3
UNIT_LABEL = "accounting share of Δh (10⁻³ nats per token)"
MANY = 120
"""Bars beyond which they leave no room between them."""


@dataclass(frozen=True)
class Side:
    """Sequences on one side of their group's mean reward. words: for the legend; colour: as `lines.Look` has it."""

    sign: int
    colour: str
    hatch: str
    words: str


SIDES = (
    Side(1, "predicted", "", "better than its group (advantage > 0)"),
    Side(-1, "measured", "/", "worse than its group (advantage < 0)"),
    Side(0, "neutral", ".", "advantage 0"),
)


@dataclass(frozen=True)
class RankedShares:
    """Shares of the sequences that have one, the lowest first.

    order: (m,) their places among all n. shares: (n,) in UNIT. signs: (n,) of the advantages.
    """

    order: np.ndarray
    shares: np.ndarray
    signs: np.ndarray

    def members(self, side: Side) -> np.ndarray:
        """(k,) places in `order` of the sequences on this side."""
        return np.flatnonzero(self.signs[self.order] == side.sign)

    def total(self, side: Side) -> float:
        """Their sum, in UNIT."""
        return float(self.shares[self.order][self.members(side)].sum())


def rank_shares(
    delta_h: ArrayLike, rewards: ArrayLike, prompt_index: ArrayLike, advantages: ArrayLike | None = None
) -> RankedShares:
    """The shares in order, with the sign of the advantage of each.

    Args:
        delta_h: (n,) shares of this step's change, nats per token; entries that are not finite are left out.
        rewards, prompt_index: (n,) reward and prompt of every sequence.
        advantages: (n,); default, and where none is finite: reward minus the prompt's mean reward.

    Raises:
        ValueError: arrays of different lengths.
    """
    shares, reward = np.asarray(delta_h, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    given = None if advantages is None else np.asarray(advantages, dtype=np.float64)
    for name, array in {"rewards": reward, "prompt_index": np.asarray(prompt_index), "advantages": given}.items():
        if array is not None and len(array) != len(shares):
            raise ValueError(f"{name} has {len(array)} entries, delta_h {len(shares)}: one a sequence")
    gains = given if given is not None and np.isfinite(given).any() else group_advantages(reward, prompt_index)
    kept = np.flatnonzero(np.isfinite(shares))
    order = kept[np.argsort(shares[kept], kind="stable")]
    return RankedShares(order, shares / UNIT, np.sign(np.nan_to_num(gains)).astype(int))


def group_advantages(rewards: ArrayLike, prompt_index: ArrayLike) -> np.ndarray:
    """Reward minus the mean reward of the sequence's prompt: (n,) float64."""
    values, prompts = np.asarray(rewards, dtype=np.float64), np.asarray(prompt_index)
    centred = values.copy()
    for prompt in np.unique(prompts):
        members = prompts == prompt
        centred[members] -= values[members].mean()
    return centred


@style.in_house_style
def plot_attribution(
    delta_h: ArrayLike,
    rewards: ArrayLike,
    prompt_index: ArrayLike,
    *,
    advantages: ArrayLike | None = None,
    sequence_index: ArrayLike | None = None,
    ends: tuple[ArrayLike, ArrayLike] | None = None,
    top: int = 6,
) -> Figure:
    """Shares of Δh of all training sequences, sorted, and the ``top`` largest losses and gains by name.

    Args:
        delta_h, rewards, prompt_index, advantages: as `rank_shares` takes them.
        sequence_index: (n,) the numbers the sequences are labelled with; default: 0 … n − 1.
        ends: (n,) lower and upper ends of the shares' 95% intervals, drawn where they are known.

    Raises:
        ValueError: arrays of different lengths.
    """
    ranked = rank_shares(delta_h, rewards, prompt_index, advantages)
    order, scaled = ranked.order, ranked.shares
    if not len(order):
        return style.no_data_figure(_TITLE, "no share of the change was stored for any training sequence.")
    figure = style.new_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _all_shares(left, ranked)
    lowering = [i for i in order[:top] if scaled[i] < 0]
    chosen = lowering + [i for i in order[::-1][:top] if scaled[i] > 0][::-1]
    reward, prompts = np.asarray(rewards, dtype=np.float64), np.asarray(prompt_index)
    names = np.arange(len(scaled)) if sequence_index is None else np.asarray(sequence_index)
    labels = [f"sequence {names[i]} · prompt {prompts[i]} · reward {reward[i]:g}" for i in chosen]
    with_whiskers = _largest_shares(right, ranked, chosen, labels, ends)
    caption = (
        f"{counted(int((scaled[order] < 0).sum()), 'sequence')} lowered entropy (below zero) and "
        f"{counted(int((scaled[order] > 0).sum()), 'sequence')} raised it; all shares together make "
        f"{signed(scaled[order].sum())} ×10⁻³ nats per token, the batch part of the predicted change. Colour: whether "
        "the sequence was rewarded above or below the mean of its prompt."
    )
    if with_whiskers:
        caption += " Lines across bars: 95% intervals over evaluation prompts."
    if len(order) < len(scaled):
        caption += f" {counted(len(scaled) - len(order), 'sequence')} without a finite share left out."
    return style.finish(figure, _TITLE, caption)


def _all_shares(axes: Axes, ranked: RankedShares) -> None:
    """Every sequence's share, sorted."""
    order, scaled, sides = ranked.order, ranked.shares, {side.sign: side for side in SIDES}
    style.zero_line(axes)
    axes.grid(False, axis="x")
    colours = [style.COLOURS[sides[sign].colour] for sign in ranked.signs[order]]
    width = 1.0 if len(order) > MANY else 0.85
    hatches = ["" if len(order) > MANY else 4 * sides[sign].hatch for sign in ranked.signs[order]]
    axes.bar(
        np.arange(len(order)), scaled[order], width=width, color=colours, hatch=hatches, edgecolor="white", linewidth=0
    )
    axes.set_xlabel(f"{len(order)} training sequences, sorted")
    axes.set_ylabel(UNIT_LABEL.replace(" of Δh ", "\n"))
    axes.set_xticks([])
    axes.set_xlim(-0.03 * len(order) - 1, 1.03 * len(order))
    legend = [
        Patch(
            facecolor=style.COLOURS[side.colour],
            hatch=4 * side.hatch,
            edgecolor="white",
            linewidth=0,
            label=f"{side.words}:\n{counted(len(members), 'sequence')}, sum {signed(ranked.total(side))}",
        )
        for side in SIDES
        if len(members := ranked.members(side))
    ]
    axes.legend(handles=legend, loc="upper left")
    low, high = min(scaled[order[0]], 0.0), max(scaled[order[-1]], 0.0)
    axes.set_ylim(low - 0.05 * (high - low or 1.0), high + 0.45 * (high - low or 1.0))


def _largest_shares(
    axes: Axes,
    ranked: RankedShares,
    chosen: Sequence[int],
    labels: Sequence[str],
    ends: tuple[ArrayLike, ArrayLike] | None,
) -> bool:
    """A bar each; whether an interval is drawn across any."""
    scaled, sides, drawn = ranked.shares, {side.sign: side for side in SIDES}, False
    for place, i in enumerate(chosen):
        side = sides[ranked.signs[i]]
        axes.barh(
            place, scaled[i], height=0.72, color=style.COLOURS[side.colour], hatch=4 * side.hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
    for place, i in enumerate(chosen if ends is not None else ()):
        reach = np.array([np.asarray(end, float)[i] for end in ends or ()]) / UNIT
        if np.isfinite(reach).all():
            axes.plot(reach, [place, place], color="#222222", linewidth=1.1, solid_capstyle="butt")
            drawn = True
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(chosen)), labels)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel(UNIT_LABEL.replace(" of Δh", ""))
    axes.set_title("the ones that moved it most", loc="right")
    return drawn
