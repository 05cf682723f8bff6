"""Which training sequences moved entropy in this step? Their shares δh(i), sorted; the largest by name.

The shares add up to the batch part of the predicted change, exactly: δh_batch = Σ_i δh(i). See docs/theory,
"Fisher kernel".
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from entropy_experiments.report.figures.style import (
    MEASURED,
    NEUTRAL,
    PREDICTED,
    finish,
    in_house_style,
    new_figure,
    no_data_figure,
    zero_line,
)
from entropy_experiments.text.numbers import counted, signed

_TITLE = "Which training sequences moved entropy in this step"
_UNIT = 1e-3
_UNIT_LABEL = "accounting share\n(10⁻³ nats per token)"
# sign of the advantage -> (colour, hatch, words)
_SIGNS = {
    1: (PREDICTED, "", "better than its group (advantage > 0)"),
    -1: (MEASURED, "////", "worse than its group (advantage < 0)"),
    0: (NEUTRAL, "....", "advantage 0"),
}


def group_advantages(rewards: ArrayLike, prompt_index: ArrayLike) -> np.ndarray:
    """Reward minus the mean reward of the sequence's prompt: (n,) float64."""
    values, prompts = np.asarray(rewards, dtype=np.float64), np.asarray(prompt_index)
    centred = values.copy()
    for prompt in np.unique(prompts):
        members = prompts == prompt
        centred[members] -= values[members].mean()
    return centred


@in_house_style
def plot_attribution(
    delta_h: ArrayLike,
    rewards: ArrayLike,
    prompt_index: ArrayLike,
    *,
    advantages: ArrayLike | None = None,
    sequence_index: ArrayLike | None = None,
    top: int = 6,
) -> Figure:
    """Shares of Δh of all training sequences, sorted, and the ``top`` largest losses and gains by name.

    Parameters
    ----------
    delta_h: (n,) shares of this step's change, nats per token; entries that are not finite are left out and
        counted.
    rewards, prompt_index: (n,) reward and prompt of every sequence.
    advantages: (n,) advantages whose sign colours the bars; default: reward minus the prompt's mean reward.
    sequence_index: (n,) the numbers the sequences are labelled with; default: 0 … n − 1.

    Raises
    ------
    ValueError: arrays of different lengths.
    """
    shares, reward, prompts = (np.asarray(array) for array in (delta_h, rewards, prompt_index))
    shares, reward = shares.astype(np.float64), reward.astype(np.float64)
    arrays = {"rewards": reward, "prompt_index": prompts}
    arrays |= {"advantages": advantages, "sequence_index": sequence_index}
    for name, array in arrays.items():
        if array is not None and len(np.asarray(array)) != len(shares):
            raise ValueError(f"{name} has {len(np.asarray(array))} entries, delta_h {len(shares)}: one a sequence")
    gains = group_advantages(reward, prompts) if advantages is None else np.asarray(advantages, np.float64)
    names = np.arange(len(shares)) if sequence_index is None else np.asarray(sequence_index)
    kept = np.flatnonzero(np.isfinite(shares))
    if not len(kept):
        return no_data_figure(_TITLE, "no share of the change was stored for any training sequence.")
    order = kept[np.argsort(shares[kept], kind="stable")]
    scaled, signs = shares / _UNIT, np.sign(np.nan_to_num(gains)).astype(int)

    figure = new_figure(8.6, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    zero_line(left)
    left.grid(False, axis="x")
    left.bar(
        np.arange(len(order)),
        scaled[order],
        width=1.0 if len(order) > 120 else 0.85,
        color=[_SIGNS[signs[i]][0] for i in order],
        linewidth=0,
    )
    left.set_xlabel(f"{len(order)} training sequences, sorted")
    left.set_ylabel(_UNIT_LABEL)
    left.set_xticks([])
    left.set_xlim(-0.03 * len(order) - 1, 1.03 * len(order))
    present = [sign for sign in _SIGNS if (signs[order] == sign).any()]
    left.legend(
        handles=[
            Patch(
                color=_SIGNS[sign][0],
                label=f"{_SIGNS[sign][2]}:\n{(signs[order] == sign).sum()} sequences, "
                f"sum {signed(scaled[order][signs[order] == sign].sum())}",
            )
            for sign in present
        ],
        loc="upper left",
    )
    low, high = min(scaled[order[0]], 0.0), max(scaled[order[-1]], 0.0)
    left.set_ylim(low - 0.05 * (high - low or 1.0), high + 0.45 * (high - low or 1.0))

    lowering = [i for i in order[:top] if shares[i] < 0]
    raising = [i for i in order[::-1][:top] if shares[i] > 0][::-1]
    chosen = lowering + raising
    for place, i in enumerate(chosen):
        colour, hatch, _ = _SIGNS[signs[i]]
        right.barh(place, scaled[i], height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    right.axvline(0.0, color="#444444", linewidth=0.9)
    right.grid(False, axis="y")
    right.set_yticks(
        range(len(chosen)),
        [f"sequence {names[i]} · prompt {prompts[i]} · reward {reward[i]:g}" for i in chosen],
    )
    right.tick_params(axis="y", length=0, labelsize=8.5)
    right.invert_yaxis()
    right.set_xlabel(_UNIT_LABEL.replace("\n", " "))
    right.set_title("the ones that moved it most", loc="right")

    total = scaled[order].sum()
    caption = (
        f"{counted(int((shares[order] < 0).sum()), 'sequence')} lowered entropy (below zero) and "
        f"{counted(int((shares[order] > 0).sum()), 'sequence')} raised it; all shares together make "
        f"{signed(total)} ×10⁻³ nats per token, the batch part of the predicted change. Colour: whether "
        f"the sequence was "
        "rewarded above or below the mean of its prompt."
    )
    if len(kept) < len(shares):
        caption += f" {counted(len(shares) - len(kept), 'sequence')} without a finite share left out."
    return finish(figure, _TITLE, caption)
