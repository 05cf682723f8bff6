"""Which tokens of a sequence moved entropy? The sequences with the largest shares, token by token.

A token's bar is its own part of the share: the bars of a sequence add up to its share. See docs/analyses/attribution.md.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from entropy_experiments.records.attribution_results import AttributionResult, TokenShares
from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import counted, plain, signed

_TITLE = "Which tokens of the sequences with the largest shares moved entropy"
_MOST_TOKENS = 60
# More names than this would overlap.
_MOST_NAMES = 40
FOREIGN = "#9a9a9a"
_LOWERING, _RAISING = (style.MEASURED, "////"), (style.PREDICTED, "")


@style.in_house_style
def plot_token_shares(result: AttributionResult, *, sequences: int = 4) -> Figure:
    """Bars of token shares for the ``sequences`` of largest absolute share.

    Of completions longer than 60 tokens, the 60 in a row that
    hold the largest absolute share are shown, and the caption says so.
    """
    rows = [row for row in result.tokens.sequences if row.tokens] if result.tokens is not None else []
    if not rows:
        return style.no_data_figure(_TITLE, "no shares of tokens were stored.")
    rows = sorted(rows, key=lambda row: -abs(row.share))[:sequences]
    largest = max(float(np.abs(row.tokens).max()) for row in rows)
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    figure = style.new_figure(8.6, 1.0 + 1.45 * len(rows))
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    cut = sum(_panel(axes, row, 10.0**power) for axes, row in zip(grid, rows, strict=True))
    unit = "nats per token" if power == 0 else f"10$^{{{power}}}$ nats per token"
    figure.supylabel(f"share of Δh ({unit})", fontsize=9)
    grid[-1].set_xlabel("completion tokens in order")
    grid[0].legend(
        handles=[
            Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=words)
            for (colour, hatch), words in ((_LOWERING, "lowered entropy"), (_RAISING, "raised it"))
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        fontsize=8,
        borderaxespad=0.1,
    )
    return style.finish(figure, _TITLE, _caption(rows, cut))


def _panel(axes: Axes, row: TokenShares, unit: float) -> bool:
    """Draw one sequence; whether tokens were left out."""
    values = np.asarray(row.tokens, dtype=np.float64)
    start = 0
    if len(values) > _MOST_TOKENS:
        window = np.convolve(np.abs(values), np.ones(_MOST_TOKENS), "valid")
        start = int(window.argmax())
    shown = values[start : start + _MOST_TOKENS] / unit
    for place, value in enumerate(shown):
        colour, hatch = _LOWERING if value < 0 else _RAISING
        axes.bar(place, value, width=0.85, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    style.zero_line(axes)
    axes.grid(False, axis="x")
    texts = row.texts
    names = [str(start + k + 1) for k in range(len(shown))]
    if texts is not None:
        names = [_visible(text) for text in texts[start : start + _MOST_TOKENS]]
    every = -(-len(names) // _MOST_NAMES) if texts is None else 1
    shown_names = names[::every]
    upright = len(shown_names) > 25 or max(map(len, shown_names)) > 4
    axes.set_xticks(range(0, len(names), every), shown_names, rotation=90 if upright else 0, fontsize=7.5)
    axes.tick_params(axis="x", length=0)
    drawn = row.drawn
    if drawn is not None:  # tokens that the policy did not draw have names in grey, no bars
        for label, own in zip(axes.get_xticklabels(), drawn[start : start + _MOST_TOKENS : every], strict=True):
            label.set_color("black" if own else FOREIGN)
    axes.set_xlim(-0.8, max(len(shown) - 0.2, 9.8))
    low, high = min(shown.min(), 0.0), max(shown.max(), 0.0)
    axes.set_ylim(low - 0.1 * (high - low or 1.0), high + 0.1 * (high - low or 1.0))
    reward = "" if row.reward is None else f" · reward {plain(row.reward)}"
    part = f" · tokens {start + 1}–{start + len(shown)} of {len(values)}" if len(shown) < len(values) else ""
    axes.set_title(
        f"sequence {row.sequence} · prompt {row.prompt_index}{reward} · share {signed(row.share)}{part}",
        fontsize=8.8,
    )
    return len(shown) < len(values)


def _visible(text: str) -> str:
    """A token's text with white space made visible and long ones cut; a dollar sign starts no formula."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
    return (shown if len(shown) <= 8 else shown[:7] + "…").replace("$", r"\$")


def _caption(rows: Sequence[TokenShares], cut: int) -> str:
    parts = []
    for row in rows[:2]:
        values = np.abs(np.asarray(row.tokens, dtype=np.float64))
        if values.sum() > 0:
            count = int(np.searchsorted(np.cumsum(np.sort(values)[::-1]), 0.5 * values.sum()) + 1)
            verb = "holds" if count == 1 else "hold"
            parts.append(
                f"in sequence {row.sequence}, {counted(count, 'token')} of {len(values)} {verb} half of the mass"
            )
    which = "training sequence with the largest share"
    if len(rows) > 1:
        which = f"{len(rows)} training sequences with the largest shares"
    text = (
        f"The {which} of this step's change, each on a scale of its own; the bars of a sequence add up to its share, "
        "which is in its title. A bar below zero: making this token as much likelier or less likely as the step does lowers "
        "entropy on the evaluation tokens."
    )
    if parts:
        found = "; ".join(parts)
        text += f" {found[0].upper()}{found[1:]}."
    if any(row.drawn for row in rows):
        text += " Names in grey: tokens that the policy did not draw, which are not scored."
    if cut:
        text += f" Of completions of more than {_MOST_TOKENS} tokens, the stretch with the largest shares is shown."
    return text
