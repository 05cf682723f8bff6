"""Over the checkpoints of a run: what moved entropy and whether it was predicted, and what its kernel did meanwhile.

All numbers are those of `sweep.evolution.describe_evolution`; docs/analyses/evolution.md says how to read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.drawing import draw_panel, log_where_wide
from entropy_experiments.report.figures.history import ENTROPY_LABEL
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Line, Look, Panel, line_of
from entropy_experiments.statistics.confidence import shown
from entropy_experiments.text.numbers import as_number, lookup, plain

_CHANGES_TITLE = "What moved entropy over the run, and was it predicted?"
_KERNEL_TITLE = "The kernel over the run"
_PARTS = {
    "batch": ("this step's batch", Look("fixed-measured", "square-open", "dash")),
    "momentum": ("momentum (earlier batches)", Look("fixed", "triangle-up-open", "dashdot")),
    "weight_decay": ("weight decay", Look("neutral", "triangle-down-open", "dot")),
}


def _line(name: str, look: Look, rows: Sequence[Mapping[str, Any]], *path: str, at: str = "step") -> Line:
    """The numbers that lie at `path` in each row, over the rows' `at`."""
    return line_of(name, look, [row[at] for row in rows], [lookup(row, *path) for row in rows], plus=False)


def course_panels(evolution: Mapping[str, Any]) -> list[Panel]:
    """Entropy, and mean reward."""
    rows = evolution["checkpoints"]
    return [
        Panel(ENTROPY_LABEL, [_line("entropy", Look("entropy"), rows, "entropy")]),
        Panel("mean reward", [_line("mean reward", Look("reward", "diamond"), rows, "reward")]),
    ]


def change_panels(evolution: Mapping[str, Any]) -> list[Panel]:
    """The parts of every checkpoint's next step, predicted, beside what was measured; and both added up over the run."""
    rows, path = evolution["checkpoints"], evolution["path"]
    steps = [row["step"] for row in rows]
    parts = [_line(name, look, rows, "predicted", part) for part, (name, look) in _PARTS.items()]
    total = _line("predicted, all parts", Look("predicted"), rows, "predicted", "total")
    measured = _line("measured", Look("measured", "square-open", "none"), rows, "actual")
    summed = [
        line_of("predicted steps added up", Look("predicted", "circle", "dash"), steps, path["expected"], plus=False),
        line_of("what entropy did", Look("measured", "square-open"), steps, path["observed"], plus=False),
    ]
    return [
        Panel(
            DELTA_H_LABEL,
            [*parts, total, measured],
            "the next step from each checkpoint",
            zero=True,
            empty="no data: no step was analysed",
        ),
        Panel(
            DELTA_H_LABEL,
            summed if len(rows) > 1 else [],
            f"since step {plain(steps[0])}",
            zero=True,
            empty="no data: a path needs two checkpoints",
        ),
    ]


def kernel_panels(evolution: Mapping[str, Any]) -> list[Panel]:
    """Size of an entry, effective ranks, share within prompts, and the alignment of successive kernels."""
    rows, changes = evolution["checkpoints"], evolution["changes"]
    dashed = Look("measured", "square-open", "dash")
    return [
        Panel("size of an entry of K₁\n(nats² × P)", [_line("size of an entry of K₁", Look("ink"), rows, "kernel_norm")]),
        Panel(
            "effective rank\n(directions)",
            [
                _line("rank of evaluation rows", Look("predicted"), rows, "effective_rank"),
                _line("rank of training gradients", dashed, rows, "training_rank"),
            ],
        ),
        Panel(
            "share within prompts\n(training gradients)",
            [
                _line("of squared cosines", Look("predicted", "diamond"), rows, "same_prompt_share"),
                _line("of pairs", Look("neutral", "none", "dot"), rows, "same_prompt_pairs"),
            ],
        ),
        Panel(
            "alignment with the\ncheckpoint before",
            [
                _line("of evaluation prompts (debiased CKA)", Look("predicted", "triangle-up"), changes, "alignment", at="to"),
                _line("cosine, shared training prompts", dashed, changes, "cosine", at="to"),
            ],
            zero=True,
        ),
    ]  # fmt: skip


@style.in_house_style
def plot_entropy_changes(evolution: Mapping[str, Any]) -> Figure:
    """`change_panels` as a picture."""
    if not (lookup(evolution, "checkpoints") or []):
        return style.no_data_figure(_CHANGES_TITLE, "no checkpoint was analysed.")
    figure = style.new_figure(9.2, 4.6)
    left, right = figure.subplots(1, 2)
    for axes, panel in zip((left, right), change_panels(evolution), strict=True):
        draw_panel(axes, panel)
    if left.get_legend() is not None:
        low, high = left.get_ylim()
        left.set_ylim(low - 0.55 * (high - low), high)  # room for five lines of legend
        left.legend(loc="lower left", ncols=1)
    _step_axes((left, right), evolution)
    return style.finish(figure, _CHANGES_TITLE, _changes_caption(evolution))


def _step_axes(grid: Sequence[Any], evolution: Mapping[str, Any]) -> None:
    steps = [row["step"] for row in evolution["checkpoints"]]
    for axes in grid:
        style.step_axis(axes, min(steps), max(steps))
        axes.set_xlabel("training step")


def _changes_caption(evolution: Mapping[str, Any]) -> str:
    whole, rows = evolution["whole"], evolution["checkpoints"]
    parts = [
        f"{_PARTS[name][0]} {shown(value)}"
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


@style.in_house_style
def plot_kernel_evolution(evolution: Mapping[str, Any]) -> Figure:
    """`kernel_panels` as a picture."""
    if not (lookup(evolution, "checkpoints") or []):
        return style.no_data_figure(_KERNEL_TITLE, "no checkpoint was analysed.")
    panels = kernel_panels(evolution)
    figure = style.new_figure(9.2, 6.2)
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, panel in zip(grid, panels, strict=True):
        if draw_panel(axes, panel):
            axes.margins(y=0.3)
    log_where_wide(grid[0], panels[0].shown)
    _step_axes(grid[2:], evolution)
    caption = (
        f"{evolution['comparable']['sentence']} Alignment 0: the kernels couple evaluation prompts no more alike than chance; 1: "
        "in the same way. Share within prompts above the dotted line: gradients of one prompt are alike, or opposed, more than "
        "others. P is each checkpoint's own. Bars: 95% intervals over prompts."
    )
    return style.finish(figure, _KERNEL_TITLE, caption)
