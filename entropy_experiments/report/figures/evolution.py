"""Over the checkpoints of a run: what moved entropy and whether it was predicted, and what its kernel did meanwhile.

All numbers are those of `analyses.evolution.describe_evolution`; docs/analyses/evolution.md says how to read them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.report.figures.bars import values_and_bars
from entropy_experiments.report.figures.style import (
    DELTA_H_LABEL,
    MEASURED,
    NEUTRAL,
    PREDICTED,
    finish,
    in_house_style,
    new_figure,
    no_data,
    no_data_figure,
    step_axis,
    zero_line,
)
from entropy_experiments.statistics.confidence import shown
from entropy_experiments.text.numbers import as_number, lookup, plain

_CHANGES_TITLE = "What moved entropy over the run, and was it predicted?"
_KERNEL_TITLE = "The kernel over the run"
PART_STYLES = {
    "batch": ("this step's batch", "#D55E00", "s", "--"),
    "momentum": ("momentum (earlier batches)", "#009E73", "^", "-."),
    "weight_decay": ("weight decay", NEUTRAL, "v", ":"),
}


def number_series(rows: Sequence[Mapping[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """((n,) values, (2, n) bars), NaN for what is missing, of numbers that lie at `path` in each of n rows."""
    return values_and_bars([lookup(row, *path) for row in rows])


def _drawn(
    axes: Axes,
    x: np.ndarray,
    numbers: tuple[np.ndarray, np.ndarray],
    label: str,
    colour: str,
    marker: str = "o",
    line: str = "-",
) -> bool:
    values, bars = numbers
    if not np.isfinite(values).any():
        return False
    axes.errorbar(
        x, values, yerr=bars if np.isfinite(bars).any() else None, fmt=marker + line, color=colour, label=label, capsize=3,
        markersize=5, markerfacecolor="white", markeredgewidth=1.4, linewidth=1.4, elinewidth=1.0,
    )  # fmt: skip
    return True


@in_house_style
def plot_entropy_changes(evolution: Mapping[str, Any]) -> Figure:
    """Left: the parts of every checkpoint's next step, predicted, beside what was measured. Right: both added up over the run."""
    rows = lookup(evolution, "checkpoints") or []
    if not rows:
        return no_data_figure(_CHANGES_TITLE, "no checkpoint was analysed.")
    steps = np.array([row["step"] for row in rows], dtype=float)
    figure = new_figure(9.2, 4.6)
    left, right = figure.subplots(1, 2)
    zero_line(left)
    drawn = [
        _drawn(left, steps, number_series(rows, "predicted", part), label, colour, marker, line)
        for part, (label, colour, marker, line) in PART_STYLES.items()
    ]
    drawn.append(_drawn(left, steps, number_series(rows, "predicted", "total"), "predicted, all parts", PREDICTED))
    drawn.append(_drawn(left, steps, number_series(rows, "actual"), "measured", "#222222", "D", ""))
    left.set_title("the next step from each checkpoint")
    if any(drawn):
        left.set_ylabel(DELTA_H_LABEL)
        left.margins(y=0.1)
        low, high = left.get_ylim()
        left.set_ylim(low - 0.55 * (high - low), high)  # room for five lines of legend
        left.legend(loc="lower left", ncols=1)
    else:
        no_data(left, "no data: no step was analysed")
    path = evolution["path"]
    zero_line(right)
    summed = [
        _drawn(right, steps, number_series(path[key]), label, colour, marker, line)
        for key, label, colour, marker, line in (
            ("expected", "predicted steps added up", PREDICTED, "o", "--"),
            ("observed", "what entropy did", MEASURED, "s", "-"),
        )
    ]
    right.set_title(f"since step {plain(steps[0])}")
    if len(steps) > 1 and any(summed):
        right.set_ylabel(DELTA_H_LABEL)
        right.margins(y=0.15)
        right.legend(loc="best")
    else:
        no_data(right, "no data: a path needs two checkpoints")
    for axes in (left, right):
        step_axis(axes, steps.min(), steps.max())
        axes.set_xlabel("training step")
    return finish(figure, _CHANGES_TITLE, _changes_caption(evolution))


def _changes_caption(evolution: Mapping[str, Any]) -> str:
    whole, rows = evolution["whole"], evolution["checkpoints"]
    parts = [
        f"{PART_STYLES[name][0]} {shown(value)}"
        for name, value in whole["parts"].items()
        if as_number(lookup(value, "value")) is not None
    ]
    text = "Left: to first order, on the evaluation buffer; measured by reweighting its completions. "
    if len(rows) > 1:
        text += (
            f"Right: from step {whole['from']} to {whole['to']} entropy changed by "
            f"{shown(whole['observed'])}, "
            f"the predicted steps add up to {shown(whole['expected'])} nats per token"
        )
        text += f" ({', '.join(parts)}). " if parts else ". "
    return text + (
        "Predictions are of one fresh batch at each checkpoint, the run took its own. Bars: 95% intervals over evaluation "
        "prompts; what is drawn on the training side is not in them."
    )


@in_house_style
def plot_kernel_evolution(evolution: Mapping[str, Any]) -> Figure:
    """Norm, effective rank, same-prompt share, and the alignment of successive kernels."""
    rows, changes = lookup(evolution, "checkpoints") or [], lookup(evolution, "changes") or []
    if not rows:
        return no_data_figure(_KERNEL_TITLE, "no checkpoint was analysed.")
    steps = np.array([row["step"] for row in rows], dtype=float)
    figure = new_figure(9.2, 6.2)
    norm, rank, same, alignment = figure.subplots(2, 2, sharex=True).ravel()
    values = number_series(rows, "kernel_norm")
    _panel(norm, [_drawn(norm, steps, values, "", "#222222")], "size of an entry of K₁\n(nats² × P)", False)
    known = values[0][np.isfinite(values[0])]
    if len(known) and known.min() > 0 and known.max() > 30 * known.min():
        norm.set_yscale("log")
    ranks = [
        _drawn(rank, steps, number_series(rows, "effective_rank"), "evaluation rows", PREDICTED),
        _drawn(rank, steps, number_series(rows, "training_rank"), "training gradients", MEASURED, "s", "--"),
    ]
    _panel(rank, ranks, "effective rank\n(directions)")
    shares = [
        _drawn(same, steps, number_series(rows, "same_prompt_share"), "of squared cosines", PREDICTED),
        _drawn(same, steps, number_series(rows, "same_prompt_pairs"), "of pairs", NEUTRAL, "", ":"),
    ]
    _panel(same, shares, "share within prompts\n(training gradients)")
    at = np.array([change["to"] for change in changes], dtype=float)
    aligned = False
    if changes:
        aligned = _drawn(
            alignment, at, number_series(changes, "alignment"), "of evaluation prompts (debiased CKA)", PREDICTED
        )
        cosine = number_series(changes, "cosine")
        aligned |= _drawn(alignment, at, cosine, "cosine, shared training prompts", MEASURED, "s", "--")
    zero_line(alignment)
    _panel(alignment, [aligned], "alignment with the\ncheckpoint before")
    for axes in (same, alignment):
        step_axis(axes, steps.min(), steps.max())
        axes.set_xlabel("training step")
    caption = (
        f"{evolution['comparable']['sentence']} Alignment 0: the kernels couple evaluation prompts no more alike than chance; 1: "
        "in the same way. Share within prompts above the dotted line: gradients of one prompt are alike, or opposed, more than "
        "others. P is each checkpoint's own. Bars: 95% intervals over prompts."
    )
    return finish(figure, _KERNEL_TITLE, caption)


def _panel(axes: Axes, drawn: list[bool], label: str, legend: bool = True) -> None:
    if not any(drawn):
        no_data(axes, "no data")
        return
    axes.set_ylabel(label)
    axes.margins(y=0.3)
    if legend:
        axes.legend(loc="best")
