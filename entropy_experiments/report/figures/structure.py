"""Do sequences of one prompt move each other more than others, and what does one batch in both roles cost?

Cosines by kind of pair; permutation tests; where a single batch's δh comes from. See docs/analyses/prompt-structure.md.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from entropy_experiments.records.kernel_results import PermutationTest, PromptStructureResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import BARS
from entropy_experiments.text.numbers import counted, plain, plus_minus, signed
from rl_training.intervals import t_quantile

_TITLE = "Do sequences of one prompt move each other more than others?"
_U_LABEL = "U-statistic over prompts"
_UNIT = 1e-3
# A difference of so many standard deviations is plain on any scale; beyond it the axis is logarithmic.
_LINEAR_UP_TO = 4


@style.in_house_style
def plot_prompt_structure(structure: PromptStructureResult) -> Figure:
    """Three panels: blocks of the cosine kernel, permutation tests, and the single batch."""
    figure = style.new_figure(8.6, 5.6)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1.0))
    top = grid[0].subgridspec(1, 2)
    _draw_blocks(figure.add_subplot(top[0]), structure)
    _draw_tests(figure.add_subplot(top[1]), structure)
    _draw_single_batch(figure.add_subplot(grid[1]), structure)
    return style.finish(figure, _TITLE, _caption(structure))


def _draw_blocks(axes: Axes, structure: PromptStructureResult) -> None:
    axes.set_title("cosines between training sequences")
    pairs, groups = structure.train.cosine, structure.within_group.cosine
    blocks = (
        (pairs.same_prompt, "same prompt", style.PREDICTED),
        (pairs.cross_prompt, "different prompts", style.PREDICTED),
        (groups.correct_correct, "same prompt, both correct", style.MEASURED),
        (groups.correct_wrong, "same prompt, one correct", style.MEASURED),
        (groups.wrong_wrong, "same prompt, both wrong", style.MEASURED),
    )
    rows = [
        (block.mean, block.quantiles, f"{label}\n({counted(block.pairs, 'pair')})", colour)
        for block, label, colour in blocks
        if block.mean is not None and block.quantiles is not None
    ]
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


def _draw_tests(axes: Axes, structure: PromptStructureResult) -> None:
    axes.set_title("differences, against permuted labels")
    train, groups = structure.train, structure.within_group
    tests = (
        (train.cosine.test, "same − different prompt\n(cosine)"),
        (train.raw.test, "same − different prompt\n(kernel)"),
        (structure.evaluation.raw.test, "evaluation × training\n(kernel)"),
        (groups.cosine.test, "equally correct − mixed\n(cosine)"),
        (groups.raw.test, "equally correct − mixed\n(kernel)"),
    )
    rows = [
        (*standardised, label, test.p_value)
        for test, label in tests
        if (standardised := _standardised(test)) is not None
    ]
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


def _standardised(test: PermutationTest) -> tuple[float, float, float] | None:
    """The difference and the ends of the permuted ones, in their standard deviations; None without a test."""
    numbers = test.difference, test.null_low, test.null_high
    if test.null_mean is None or not test.null_deviation or None in numbers:
        return None
    difference, low, high = (
        (number - test.null_mean) / test.null_deviation for number in numbers if number is not None
    )
    return difference, low, high


def _draw_single_batch(axes: Axes, structure: PromptStructureResult) -> None:
    axes.set_title("the step's batch part, if the training batch also played the evaluation batch")
    single = structure.single_batch
    u_statistic = single.u_statistic
    terms = (
        ("each with itself", single.self.value, style.NEUTRAL, "...."),
        ("same prompt", single.same_prompt.value, style.NEUTRAL, "...."),
        ("different prompts", single.cross_prompt.value, style.NEUTRAL, "...."),
    )
    entries = (
        *terms,
        ("sum: single batch", single.value, style.MEASURED, "////"),
        (_U_LABEL, u_statistic.value, style.PREDICTED, ""),
        ("independent evaluation batch", single.evaluation_value, style.PREDICTED, ""),
    )
    bars = [(label, value / _UNIT, colour, hatch) for label, value, colour, hatch in entries if value is not None]
    if not bars:
        style.no_data(axes, "not computed")
        return
    for place, (label, value, colour, hatch) in enumerate(bars):
        axes.barh(place, value, height=0.7, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        if label == _U_LABEL and u_statistic.standard_error is not None:
            reach = t_quantile(max(structure.n_prompts - 1, 1)) * u_statistic.standard_error / _UNIT
            axes.errorbar(value, place, xerr=reach, color="black", capsize=3, linewidth=1.2)
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    axes.axhline(len(terms) - 0.5, color="#BBBBBB", linewidth=0.8)
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
    if u_statistic.standard_error is not None:
        handles.append(Line2D([], [], color="black", marker="|", label=BARS))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _caption(structure: PromptStructureResult) -> str:
    sequences, counts = counted(structure.n_train, "training sequence"), structure.duplicates
    if counts.distinct < counts.sequences:
        sequences += f" ({counts.distinct} of them distinct; pairs of equal ones are not compared)"
    caption = (
        f"{sequences} of {counted(structure.n_prompts, 'prompt')}. "
        "Left: line 5 to 95%, box 25 to 75%, bar the median, diamond the mean; a sequence with itself (cosine 1) is not shown. "
        "Right: a dot outside the grey 95% of its permutations is a difference that chance does not explain (p two-sided). "
    )
    bias = structure.single_batch.bias
    if bias.value is None:
        caption += f"Bottom: no bias of the single batch is known: {structure.single_batch.reason}."
    else:
        error = bias.standard_error
        scaled = plus_minus(bias.value / _UNIT, None if error is None else error / _UNIT)
        caption += (
            f"Bottom: pairs within a prompt bias the single batch by {scaled} ×10⁻³ nats per token (sum minus U-statistic"
            f"{'' if error is None else '; ± one standard error'})."
        )
    for test, name in (
        (structure.train.cosine.test, "same − different"),
        (structure.within_group.cosine.test, "equally correct − mixed"),
    ):
        if test.reason:
            caption += f" No test of {name}: {test.reason}."
    return caption
