"""Do the shares say what happens when sequences are really left out? Real steps with random halves, and without the extremes.

    predicted(A) = rest + (c_A / c) Σ_{i in A} δh(i)          measured(A): a real AdamW step with the sequences in A alone

See docs/analyses/intervention.md.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entropy_experiments.records.step_results import InterventionResult, ShareScore
from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import counted, plain, signed

_TITLE = "Do the shares say what happens when sequences are left out?"
_NAMES = {
    "split": "accounting shares of the measurement (split)",
    "rao_blackwell": "accounting shares (Rao–Blackwell)",
    "response": "mean effects, following second moments",
}
_SUBSETS_AT_LEAST = 3


@style.in_house_style
def plot_intervention(result: InterventionResult) -> Figure:
    """Predicted against measured change over half-subsets, and the change without the extreme sequences."""
    score, measured = result.scores[result.headline], result.measured
    if len(measured) < _SUBSETS_AT_LEAST:
        return style.no_data_figure(_TITLE, "no steps with part of the training sequences were taken.")
    largest = float(np.abs([*measured, *score.predicted, result.full_step.measured]).max())
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    unit, label = 10.0**power, "nats per token" if power == 0 else f"10$^{{{power}}}$ nats per token"
    figure = style.new_figure(8.6, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _scatter(left, np.asarray(score.predicted) / unit, np.asarray(measured) / unit, score, label)
    _removals(right, result, unit, label)
    return style.finish(figure, _TITLE, _caption(result, score))


def _scatter(axes: Axes, predicted: np.ndarray, measured: np.ndarray, score: ShareScore, label: str) -> None:
    low = min(predicted.min(), measured.min())
    high = max(predicted.max(), measured.max())
    margin = 0.08 * (high - low or 1.0)
    ends = np.array([low - margin, high + margin])
    axes.plot(ends, ends, color="#444444", linewidth=0.9, label="measured = predicted")
    if score.slope is not None:
        line = score.slope * ends + (measured.mean() - score.slope * predicted.mean())
        axes.plot(
            ends,
            line,
            "--",
            color=style.NEUTRAL,
            linewidth=1.3,
            label=f"least squares, slope {plain(score.slope, 3)}",
        )
    axes.plot(
        predicted,
        measured,
        "o",
        color=style.PREDICTED,
        markerfacecolor="white",
        markeredgewidth=1.4,
        linestyle="none",
        label=f"{len(measured)} random halves",
    )
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel(f"predicted change of entropy\n({label})")
    axes.set_ylabel(f"measured change of entropy\n({label})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6))
    axes.legend(loc="best", fontsize=8)
    if score.spearman is None or score.interval is None:
        axes.set_title(score.reason, fontsize=9)
    else:
        bounds = score.interval
        axes.set_title(f"rank correlation {score.spearman:.2f}  [{bounds[0]:.2f}, {bounds[1]:.2f}]", fontsize=9)


def _removals(axes: Axes, result: InterventionResult, unit: float, label: str) -> None:
    removals, headline, step = result.removals, result.headline, result.full_step
    full = step.measured / unit
    rows: list[tuple[str, float, float | None, str]] = [("all sequences", full, step.predicted[headline] / unit, "")]
    for removal, words in ((removals.lowering, "said to lower it most"), (removals.raising, "said to raise it most")):
        if removal is not None:
            predicted = (step.predicted[headline] + removal.predicted_difference[headline]) / unit
            rows.append((f"without the {len(removal.sequences)}\n{words}", removal.measured / unit, predicted, "////"))
    if len(rows) == 1 and removals.random is None:
        style.no_data(axes, "nothing to remove:\nno sequence has a share")
        return
    axes.axvline(0.0, color="#444444", linewidth=0.9)
    axes.grid(False, axis="y")
    for place, (_, value, predicted, hatch) in enumerate(rows):
        axes.barh(
            place, value, height=0.6, color=style.MEASURED, hatch=hatch, edgecolor="white", linewidth=0,
            label="measured" if place == 0 else None,
        )  # fmt: skip
        axes.plot(
            [predicted], [place], "D", color=style.PREDICTED, markeredgecolor="white", markersize=7, zorder=3,
            linestyle="none", label="predicted" if place == 0 else None,
        )  # fmt: skip
    names = [name for name, *_ in rows]
    if removals.random is not None:
        place = len(rows)
        values = full + np.asarray(removals.random.differences) / unit
        axes.plot(
            values, np.full(len(values), place), "|", color=style.MEASURED, markersize=15, markeredgewidth=1.8,
            label=f"measured, {len(values)} random removals",
        )  # fmt: skip
        names.append(f"without {removals.random.sequences}\nat random")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.set_ylim(len(names) + 0.6, -0.6)
    axes.set_xlabel(f"change of entropy ({label})")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: ("random" in labels[place], labels[place]))
    axes.legend([handles[k] for k in order], [labels[k] for k in order], loc="lower left", ncols=2, fontsize=7.5)


def _caption(result: InterventionResult, score: ShareScore) -> str:
    size = plain(round(result.size or 0.0, 1))
    text = (
        f"Left: each circle is a real optimizer step with a random half of the training {result.by}s ({size} sequences); "
        "across, what their shares predict; up, what entropy did on the evaluation tokens. "
    )
    if score.spearman is None or score.interval is None:
        text += f"No rank correlation: {score.reason}. "
    else:
        low, high = score.interval
        text += (
            f"The rank correlation (linear datamodelling score) is {score.spearman:.2f}, 95% bootstrap interval {low:.2f} to "
            f"{high:.2f}"
        )
        others = [
            f"{other.spearman:.2f} with {_NAMES.get(name, name)}"
            for name, other in result.scores.items()
            if name != result.headline and other.spearman is not None
        ]
        text += f"; {', '.join(others)}. " if others else ". "
    removed = [
        f"{signed(removal.measured)} without the {counted(len(removal.sequences), 'sequence')} said to {word} entropy most"
        for removal, word in ((result.removals.lowering, "lower"), (result.removals.raising, "raise"))
        if removal is not None
    ]
    full = signed(result.full_step.measured)
    return text + f"Right: the whole step makes {full} nats per token" + "".join(f", {r}" for r in removed) + "."
