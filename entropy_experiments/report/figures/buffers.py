"""How do the sequences that the step learns from differ from those that entropy is measured on? Both distributions, side by side.

Shares of each buffer's sequences, and means with 95% intervals over prompts. See docs/analyses/buffers.md.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from entropy_experiments.records.kernel_results import BufferComparison, BufferDescription, BuffersResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.bars import reaches
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.text.numbers import counted, plain
from rl_training.intervals import interval

_TITLE = "What the step learns from, and what entropy is measured on"
_PANELS = {
    "length": "completion length (tokens)",
    "entropy": "mean token entropy of a completion\n(nats per token)",
    "reward": "reward of a completion",
    "truncated": "completions cut at the maximum length (%)",
}
_OPACITY = 0.75
# buffer -> (colour, hatch, word)
_BUFFERS = {
    "evaluation": (style.PREDICTED, "", "evaluation buffer"),
    "training": (style.MEASURED, "////", "training buffer"),
}


@style.in_house_style
def plot_buffers(result: BuffersResult) -> Figure:
    """Four panels, one a quantity."""
    figure = style.new_figure(8.6, 5.7)
    grid = figure.add_gridspec(3, 2, height_ratios=(0.12, 1, 1))
    _legend(figure.add_subplot(grid[0, :]))
    for place, (name, label) in enumerate(_PANELS.items()):
        axes = figure.add_subplot(grid[1 + place // 2, place % 2])
        quantity = result.quantities[name]
        axes.set_xlabel(label)
        if not quantity.histogram.edges:
            style.no_data(axes, f"{name}: {quantity.reason or 'not recorded'}")
            continue
        axes.set_title(_finding(quantity), fontsize=9)
        if name == "truncated":
            _share_panel(axes, quantity)
        else:
            _histogram_panel(axes, quantity)
    return style.finish(figure, _TITLE, _caption(result.quantities["length"]))


def _legend(axes: Axes) -> None:
    axes.set_axis_off()
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", alpha=_OPACITY, label=word)
        for colour, hatch, word in _BUFFERS.values()
    ]
    axes.legend(handles=patches, loc="center left", ncols=2, borderaxespad=0.0)


def _finding(quantity: BufferComparison) -> str:
    probability = quantity.probability_larger.value
    if quantity.p_value is None or probability is None:
        return quantity.reason or "not compared"
    verdict = "they differ" if quantity.differs else "may be chance"
    return f"training larger in {probability:.0%} of pairs, p = {plain(quantity.p_value, 2)}: {verdict}"


def _histogram_panel(axes: Axes, quantity: BufferComparison) -> None:
    edges = np.asarray(quantity.histogram.edges)
    centres = (edges[:-1] + edges[1:]) / 2
    if (centres == np.round(centres)).all():  # one bin a number
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    top = 0.0
    for place, (name, (colour, hatch, _)) in enumerate(_BUFFERS.items()):
        shares = 100 * np.asarray(getattr(quantity.histogram, name))
        half = 0.46 * np.diff(edges)  # the two buffers share a bin, half each
        left = centres + (place - 1) * half
        axes.bar(
            left,
            shares,
            half,
            align="edge",
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.4,
            alpha=_OPACITY,
        )
        top = max(top, float(shares.max(initial=0.0)))
    top = top or 1.0
    for place, (name, (colour, _, _)) in enumerate(_BUFFERS.items()):
        mean = _mean(getattr(quantity, name))
        if mean is not None:
            axes.errorbar(
                mean.value, top * (1.1 + 0.1 * place), xerr=[[end] for end in reaches(mean)], fmt="D", markersize=5,
                color=colour, capsize=3,
                markeredgecolor="white",
            )  # fmt: skip
    axes.set_ylim(0, 1.3 * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(100.0, 1.3 * top)])
    axes.set_ylabel("% of its sequences")
    axes.grid(False, axis="x")


def _mean(side: BufferDescription) -> Known | None:
    """The mean of a buffer with Student's interval over its prompts."""
    if side.mean is None or side.standard_error is None:
        return None if side.mean is None else Known(side.mean)
    return Known(side.mean, *interval(side.mean, side.standard_error, max(1.0, side.prompts - 1)))


def _share_panel(axes: Axes, quantity: BufferComparison) -> None:
    reach = 5.0
    for place, (name, (colour, hatch, _)) in enumerate(_BUFFERS.items()):
        found = _mean(getattr(quantity, name))
        if found is None:
            continue
        mean, (below, above) = found.value, (100 * length for length in reaches(found))
        axes.barh(
            place, 100 * mean, 0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, alpha=_OPACITY
        )  # fmt: skip
        axes.errorbar([100 * mean], [place], xerr=[[min(below, 100 * mean)], [above]], color="#222222", capsize=4)
        reach = max(reach, 1.15 * (100 * mean + above))
    means = [getattr(quantity, name).mean for name in _BUFFERS]
    axes.set_yticks(
        range(len(_BUFFERS)),
        [name if m is None else f"{name}\n{m:.0%}" for name, m in zip(_BUFFERS, means, strict=True)],
    )
    axes.set_ylim(len(_BUFFERS) - 0.5, -0.5)
    axes.set_xlim(0, min(100.0, reach))
    axes.grid(False, axis="y")


def _caption(lengths: BufferComparison) -> str:
    counts = [
        f"{counted(side.sequences, 'sequence')} of {counted(side.prompts, 'prompt')}"
        for side in (lengths.evaluation, lengths.training)
    ]
    return (
        f"Evaluation: {counts[0]}; training: {counts[1]}. Bars: share of each buffer's sequences with such a value. Diamonds "
        "and whiskers: means with 95% intervals over prompts. “Training larger in x% of pairs”: 50% is no difference; p is the "
        "chance of a departure at least as large between buffers of one kind, with prompts as the independent units; “they "
        "differ” allows for four quantities looked at. Drawn buffers differ by design: training keeps what still has a gradient."
    )
