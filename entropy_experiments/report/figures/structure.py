"""Do sequences of one prompt move each other more than others, and what does one batch in both roles cost?

    plot_prompt_structure     cosines by kind of pair; permutation tests; where a single batch's δh comes from

Reads the dict of ``entropy_experiments.analyses.prompt_structure``, as ``summary.json`` stores it. See
docs/analyses/prompt-structure.md.
"""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS
from entropy_experiments.text.numbers import as_number, counted, lookup, plain, plus_minus, signed, value_and_error
from rl_training.intervals import t_quantile

_TITLE = "Do sequences of one prompt move each other more than others?"
_BOX_COLOURS = {"prompt": style.PREDICTED, "correctness": style.MEASURED}
# (path to the block, label, which comparison it belongs to)
_BLOCKS = (
    (("train", "cosine", "same_prompt"), "same prompt", "prompt"),
    (("train", "cosine", "cross_prompt"), "different prompts", "prompt"),
    (("within_group", "cosine", "correct_correct"), "same prompt, both correct", "correctness"),
    (("within_group", "cosine", "correct_wrong"), "same prompt, one correct", "correctness"),
    (("within_group", "cosine", "wrong_wrong"), "same prompt, both wrong", "correctness"),
)
_TESTS = (
    (("train", "cosine", "test"), "same − different prompt\n(cosine)"),
    (("train", "raw", "test"), "same − different prompt\n(kernel)"),
    (("evaluation", "raw", "test"), "evaluation × training\n(kernel)"),
    (("within_group", "cosine", "test"), "equally correct − mixed\n(cosine)"),
    (("within_group", "raw", "test"), "equally correct − mixed\n(kernel)"),
)
_TERMS = (
    ("self", "each with itself"),
    ("same_prompt", "same prompt"),
    ("cross_prompt", "different prompts"),
)
_U_LABEL = "U-statistic over prompts"
_UNIT = 1e-3
# A difference of so many standard deviations is plain on any scale; beyond it the axis is logarithmic.
_LINEAR_UP_TO = 4


@style.in_house_style
def plot_prompt_structure(structure: Mapping[str, Any]) -> Figure:
    """Three panels of the analysis "prompt_structure": blocks of the cosine kernel, permutation tests, and the single batch.

    structure: the dict that ``prompt_structure`` returns; parts that are missing or None are drawn as "no data".
    """
    if not structure:
        return style.no_data_figure(_TITLE, "the prompt structure was not analysed.")
    figure = style.new_figure(8.6, 5.6)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1.0))
    top = grid[0].subgridspec(1, 2)
    _draw_blocks(figure.add_subplot(top[0]), structure)
    _draw_tests(figure.add_subplot(top[1]), structure)
    _draw_single_batch(figure.add_subplot(grid[1]), structure)
    return style.finish(figure, _TITLE, _caption(structure))


def _draw_blocks(axes: Axes, structure: Mapping[str, Any]) -> None:
    axes.set_title("cosines between training sequences")
    rows = []
    for path, label, kind in _BLOCKS:
        mean, quantiles = as_number(lookup(structure, *path, "mean")), lookup(structure, *path, "quantiles")
        if mean is not None and quantiles:
            pairs = counted(int(lookup(structure, *path, "pairs") or 0), "pair")
            rows.append((mean, quantiles, f"{label}\n({pairs})", _BOX_COLOURS[kind]))
    if not rows:
        style.no_data(axes, "no pair of training\nsequences has a cosine")
        return
    for place, (mean, (low, first, median, third, high), _, colour) in enumerate(rows):
        axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
        axes.barh(place, third - first, left=first, height=0.5, color=colour, alpha=0.35, linewidth=0)
        axes.plot([median, median], [place - 0.25, place + 0.25], color=colour, linewidth=2.0)
        axes.plot(mean, place, marker="D", color="black", markersize=4.5, linestyle="none")
    axes.axvline(0.0, color="#444444", linewidth=0.9, zorder=0.5)
    axes.set_yticks(range(len(rows)), [label for _, _, label, _ in rows])
    axes.tick_params(axis="y", length=0, labelsize=8.3)
    axes.grid(False, axis="y")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("cosine of two gradients, metric of P")


def _draw_tests(axes: Axes, structure: Mapping[str, Any]) -> None:
    axes.set_title("differences, against permuted labels")
    rows = []
    for path, label in _TESTS:
        test = lookup(structure, *path)
        deviation = as_number(lookup(test, "null_deviation"))
        keys = ("difference", "null_low", "null_high", "null_mean")
        values = [value for key in keys if (value := as_number(lookup(test, key))) is not None]
        if deviation and len(values) == len(keys):
            standardised = [(value - values[3]) / deviation for value in values[:3]]
            rows.append((*standardised, label, as_number(lookup(test, "p_value"))))
    if not rows:
        style.no_data(axes, "no comparison can be tested")
        return
    for place, (observed, low, high, label, _) in enumerate(rows):
        axes.barh(place, high - low, left=low, height=0.55, color="#CFCFCF", linewidth=0)
        colour = style.MEASURED if label.startswith("equally") else style.PREDICTED
        axes.plot(observed, place, marker="o", color=colour, linestyle="none", markersize=7)
    for place, row in enumerate(rows):
        beside = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "center", "fontsize": 8.5}
        axes.text(1.02, place, f"p = {plain(row[4], 2)}", **beside)
    scale = ""
    if max(abs(row[0]) for row in rows) > _LINEAR_UP_TO:
        axes.set_xscale("symlog", linthresh=_LINEAR_UP_TO)
        ticks = [-100, -10, -_LINEAR_UP_TO, 0, _LINEAR_UP_TO, 10, 100]
        axes.set_xticks(ticks, [plain(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        low, high = min(min(row[0], row[1]) for row in rows), max(max(row[0], row[2]) for row in rows)
        axes.set_xlim(1.5 * low, 1.5 * high)
        scale = f" (log beyond ±{_LINEAR_UP_TO})"
    axes.axvline(0.0, color="#444444", linewidth=0.9, zorder=0.5)
    axes.set_yticks(range(len(rows)), [row[3] for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=8.3)
    axes.grid(False, axis="y")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"difference, in standard deviations of\nits permutation distribution{scale}")


def _draw_single_batch(axes: Axes, structure: Mapping[str, Any]) -> None:
    axes.set_title("the step's batch part, if the training batch also played the evaluation batch")
    single = lookup(structure, "single_batch")
    total, independent = as_number(lookup(single, "value")), as_number(lookup(single, "evaluation_value"))
    u_value, u_error = value_and_error(lookup(single, "u_statistic"))
    entries = [(label, as_number(lookup(single, name, "value")), style.NEUTRAL, "....") for name, label in _TERMS]
    entries += [
        ("sum: single batch", total, style.MEASURED, "////"),
        (_U_LABEL, u_value, style.PREDICTED, ""),
        ("independent evaluation batch", independent, style.PREDICTED, ""),
    ]
    bars = [(label, value / _UNIT, colour, hatch) for label, value, colour, hatch in entries if value is not None]
    if not bars:
        style.no_data(axes, "not computed")
        return
    for place, (label, value, colour, hatch) in enumerate(bars):
        axes.barh(place, value, height=0.7, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        if label == _U_LABEL and u_error is not None:
            prompts = as_number(lookup(structure, "n_prompts"))
            reach = t_quantile(math.inf if prompts is None else prompts - 1) * u_error / _UNIT
            axes.errorbar(value, place, xerr=reach, color="black", capsize=3, linewidth=1.2)
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    axes.axhline(len(_TERMS) - 0.5, color="#BBBBBB", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [f"{label}\u2002{signed(value)}" for label, value, _, _ in bars])
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("δh of the step's batch part (10⁻³ nats per token)")
    handles = [
        Patch(facecolor=style.NEUTRAL, hatch="....", edgecolor="white", label="terms, by pair"),
        Patch(facecolor=style.MEASURED, hatch="////", edgecolor="white", label="their sum"),
        Patch(facecolor=style.PREDICTED, label="without self-pairing"),
    ]
    if u_error is not None:
        handles.append(Line2D([], [], color="black", marker="|", label=BARS))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _caption(structure: Mapping[str, Any]) -> str:
    sequences = counted(int(lookup(structure, "n_train") or 0), "training sequence")
    counts = lookup(structure, "duplicates")
    if counts and counts["distinct"] < counts["sequences"]:
        sequences += f" ({counts['distinct']} of them distinct; pairs of equal ones are not compared)"
    caption = f"{sequences} of {counted(int(lookup(structure, 'n_prompts') or 0), 'prompt')}. "
    caption += (
        "Left: line 5 to 95%, box 25 to 75%, bar the median, diamond the mean; a sequence with itself (cosine 1) is not shown. "
        "Right: a dot outside the grey 95% of its permutations is a difference that chance does not explain (p two-sided). "
    )
    bias, error = value_and_error(lookup(structure, "single_batch", "bias"))
    if bias is None:
        caption += f"Bottom: no bias of the single batch is known: {lookup(structure, 'single_batch', 'reason')}."
    else:
        scaled = plus_minus(bias / _UNIT, None if error is None else error / _UNIT)
        caption += (
            f"Bottom: pairs within a prompt bias the single batch by {scaled} ×10⁻³ nats per token (sum minus U-statistic"
            f"{'' if error is None else '; ± one standard error'})."
        )
    for path, name in (
        (("train", "cosine"), "same − different"),
        (("within_group", "cosine"), "equally correct − mixed"),
    ):
        reason = lookup(structure, *path, "test", "reason")
        if reason:
            caption += f" No test of {name}: {reason}."
    return caption
