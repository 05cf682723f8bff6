"""Over the checkpoints of a run: what moved entropy and whether it was predicted, and what its kernel did meanwhile.

All numbers are those of evolution.json (records.evolution); docs/analyses/evolution.md says how to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.records.evolution import CheckpointRow, Evolution, ReasonedMean
from entropy_experiments.report.evolution_words import comparable_sentence
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.drawing import dodge_of, draw_panel, log_where_wide
from entropy_experiments.report.figures.history import ENTROPY_LABEL, MEASURED_LOOK, PREDICTED_LOOK, from_zero
from entropy_experiments.report.figures.lines import DELTA_H_LABEL, Line, Look, Panel, bars_described, line_of
from entropy_experiments.statistics.confidence import Known, correlation_words
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.text.numbers import counted, plain

_OVERVIEW_TITLE = "The Fisher analysis over the checkpoints of a run"
_CHANGES_TITLE = "What moved entropy over the run, and was it predicted?"
_KERNEL_TITLE = "The kernel over the run"
_PARTS = {
    "batch": ("this step's batch", Look("fixed-measured", "square-open", "dash")),
    "momentum": ("momentum (earlier batches)", Look("fixed", "triangle-up-open", "dashdot")),
    "weight_decay": ("weight decay", Look("neutral", "triangle-down-open", "dot")),
}


def course_panels(evolution: Evolution) -> list[Panel]:
    """Entropy, and mean reward."""
    rows, steps = evolution.checkpoints, _steps(evolution)
    entropies = [row.entropy.known() for row in rows]
    rewards = [None if row.reward is None else row.reward.known() for row in rows]
    return [
        Panel(ENTROPY_LABEL, [line_of("entropy", Look("entropy"), steps, entropies, plus=False)]),
        Panel("mean reward", [line_of("mean reward", Look("reward", "diamond"), steps, rewards, plus=False)]),
    ]


def change_panels(evolution: Evolution) -> list[Panel]:
    """The parts of every checkpoint's next step, predicted, beside what was measured; and both added up over the run."""
    rows, path, steps = evolution.checkpoints, evolution.path, _steps(evolution)

    def predicted(name: str, look: Look, part: str) -> Line:
        numbers = [None if row.predicted is None else getattr(row.predicted, part).known() for row in rows]
        return line_of(name, look, steps, numbers, plus=False)

    measured = [row.measured for row in rows]
    each = [
        *(predicted(name, look, part) for part, (name, look) in _PARTS.items()),
        predicted("predicted, all parts", PREDICTED_LOOK, "total"),
        line_of("measured", Look("measured", "square-open", "none"), steps, measured, plus=False),
    ]
    expected, observed = ([one.known() for one in sums] for sums in (path.expected, path.observed))
    summed = [
        line_of("predicted steps added up", Look("predicted", "circle", "dash"), steps, expected, plus=False),
        line_of("what entropy did", MEASURED_LOOK, steps, observed, plus=False),
    ]
    since, missing = f"since step {plain(steps[0])}", "no data: a path needs two checkpoints"
    return [
        Panel(
            DELTA_H_LABEL, each, "the next step from each checkpoint", zero=True, empty="no data: no step was analysed"
        ),
        Panel(DELTA_H_LABEL, summed if len(rows) > 1 else [], since, zero=True, empty=missing),
    ]


def kernel_panels(evolution: Evolution) -> list[Panel]:
    """Size of an entry, effective ranks, share within prompts, and the alignment of successive kernels."""
    rows, changes, steps = evolution.checkpoints, evolution.changes, _steps(evolution)
    later, dashed = [change.to_step for change in changes], Look("measured", "square-open", "dash")

    def line(name: str, look: Look, numbers: Sequence[ReasonedMean | None]) -> Line:
        return line_of(name, look, steps, [None if one is None else one.known() for one in numbers], plus=False)

    norms = line("size of an entry of K₁", Look("ink"), [row.kernel_norm for row in rows])
    ranks = [
        line("rank of evaluation rows", Look("predicted"), [row.effective_rank for row in rows]),
        line("rank of training gradients", dashed, [row.training_rank for row in rows]),
    ]
    pairs = [_without_interval(row.same_prompt_pairs) for row in rows]
    within = [
        line(
            "share of squared cosines within prompts",
            Look("predicted", "diamond"),
            [row.same_prompt_share for row in rows],
        ),
        line_of("share of pairs within prompts", Look("neutral", "none", "dot"), steps, pairs, plus=False),
    ]
    aligned, cosines = (
        [change.alignment.known() for change in changes],
        [_without_interval(change.cosine.value) for change in changes],
    )
    alignment = [
        line_of(
            "alignment on evaluation prompts (debiased CKA)",
            Look("predicted", "triangle-up"),
            later,
            aligned,
            plus=False,
        ),
        line_of("cosine of kernels, shared training prompts", dashed, later, cosines, plus=False),
    ]
    return [
        Panel("size of an entry of K₁\n(nats² × P)", [norms]),
        Panel("effective rank\n(directions)", ranks),
        Panel("share within prompts\n(training gradients)", within),
        Panel("alignment with the\ncheckpoint before", alignment, zero=True),
    ]


def _steps(evolution: Evolution) -> list[int]:
    return [row.step for row in evolution.checkpoints]


def _without_interval(value: float | None) -> Known | None:
    return None if value is None else Known(value)


@style.in_house_style
def plot_fisher_evolution(evolution: Evolution) -> Figure:
    """Entropy, reward, predicted beside measured Δh, and the kernel's size over the analysed checkpoints, two by two."""
    rows, steps = evolution.checkpoints, _steps(evolution)
    predicted, measured = [row.change for row in rows], [row.measured for row in rows]
    changes = [
        line_of("predicted", PREDICTED_LOOK, steps, predicted),
        line_of("measured", MEASURED_LOOK, steps, measured),
    ]
    empty = "no data: no predicted or measured change of entropy"
    panels = [
        *course_panels(evolution),
        Panel(DELTA_H_LABEL, changes, zero=True, empty=empty),
        kernel_panels(evolution)[0],
    ]
    figure = style.new_figure(8.6, 6.4)
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, panel in zip(grid, panels, strict=True):
        draw_panel(axes, panel, dodge=dodge_of(np.array(steps), 2) if panel.zero else 0.0)
    from_zero(grid[0], panels[0])
    log_where_wide(grid[3], panels[3].shown)
    _step_axes(grid[2:], steps)
    shared = _shared(rows)
    caption = f"{counted(len(rows), 'analysed checkpoint')}. {shared} {bars_described(panels)}"
    return style.finish(figure, _OVERVIEW_TITLE, caption)


def _shared(rows: Sequence[CheckpointRow]) -> str:
    """How predicted and measured changes go together over the checkpoints that have both, the latter to be trusted."""
    both = [(row, pair) for row in rows if (pair := row.predicted_and_measured) is not None]
    pairs = [pair for row, pair in both if row.trustworthy is not False]
    lost = len(both) - len(pairs)
    left_out = f"; {counted(lost, 'step')} with too small an effective sample left out" if lost else ""
    if not pairs:
        return f"No step has both a predicted and a measured change{' to be trusted' if both else ''}."
    if len(pairs) < 2:
        return f"At the one step with both: see the bars{left_out}."
    words = correlation_words(correlation(*np.array(pairs).T), len(pairs))
    return f"Over the {len(pairs)} steps with both, predicted and measured: {words}{left_out}."


@style.in_house_style
def plot_entropy_changes(evolution: Evolution) -> Figure:
    """`change_panels` as a picture."""
    figure = style.new_figure(9.2, 4.6)
    left, right = figure.subplots(1, 2)
    for axes, panel in zip((left, right), change_panels(evolution), strict=True):
        draw_panel(axes, panel)
    if left.get_legend() is not None:
        low, high = left.get_ylim()
        left.set_ylim(low - 0.55 * (high - low), high)  # room for five lines of legend
        left.legend(loc="lower left", ncols=1)
    _step_axes((left, right), _steps(evolution))
    return style.finish(figure, _CHANGES_TITLE, _changes_caption(evolution))


def _step_axes(grid: Sequence[Any], steps: Sequence[int]) -> None:
    for axes in grid:
        style.step_axis(axes, min(steps), max(steps))
        axes.set_xlabel("training step")


def _changes_caption(evolution: Evolution) -> str:
    whole = evolution.whole
    sums = {part: getattr(whole.parts, part) for part in _PARTS}
    parts = [f"{_PARTS[part][0]} {number.shown()}" for part, number in sums.items() if number.value is not None]
    text = "Left: to first order, on the evaluation buffer; measured by reweighting its completions. "
    if len(evolution.checkpoints) > 1:
        text += (
            f"Right: from step {whole.from_step} to {whole.to_step} entropy changed by {whole.observed.shown()}, the "
            f"predicted steps add up to {whole.expected.shown()} nats per token"
        )
        text += f" ({', '.join(parts)}). " if parts else ". "
    return text + (
        "Predictions are of one fresh batch at each checkpoint, the run took its own. Bars: 95% intervals over evaluation "
        "prompts; what is drawn on the training side is not in them."
    )


@style.in_house_style
def plot_kernel_evolution(evolution: Evolution) -> Figure:
    """`kernel_panels` as a picture."""
    panels = kernel_panels(evolution)
    figure = style.new_figure(9.2, 6.2)
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, panel in zip(grid, panels, strict=True):
        if draw_panel(axes, panel):
            axes.margins(y=0.3)
    log_where_wide(grid[0], panels[0].shown)
    _step_axes(grid[2:], _steps(evolution))
    caption = (
        f"{comparable_sentence(evolution)} Alignment 0: the kernels couple evaluation prompts no more alike than chance; 1: "
        "in the same way. Share within prompts above the dotted line: gradients of one prompt are alike, or opposed, more than "
        "others. P is each checkpoint's own. Bars: 95% intervals over prompts."
    )
    return style.finish(figure, _KERNEL_TITLE, caption)
