"""How clusters of training gradients pass into one another from checkpoint to checkpoint.

One panel a pair of successive checkpoints: the flow by common prompts where there are any, and the likeness of what the
clusters do to the evaluation prompts. Numbers of evolution.json (records.evolution); docs/analyses/evolution.md.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entropy_experiments.records.evolution import CheckpointChange, Evolution
from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import signed

_TITLE = "Clusters of training gradients from checkpoint to checkpoint"
_MOST_PANELS = 12
_ACROSS = 4


@style.in_house_style
def plot_cluster_flow(evolution: Evolution) -> Figure:
    """Colour: likeness of two clusters' columns over the evaluation prompts; number: share of common prompts' sequences."""
    changes = [change for change in evolution.changes if change.likeness]
    if not changes:
        reasons = [change.flow.reason for change in evolution.changes if change.flow.reason]
        return style.no_data_figure(_TITLE, f"{next(iter(reasons), 'clusters need two checkpoints')}.")
    shown = changes if len(changes) <= _MOST_PANELS else changes[-_MOST_PANELS:]
    across = min(_ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure = style.new_figure(max(4.8, 2.3 * across + 0.9), 2.3 * down + 0.4)
    panels = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    image = None
    for axes, change in zip(panels, shown, strict=False):
        image = _panel(axes, change)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    assert image is not None
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="correlation over evaluation prompts")
    left_out = f" The last {len(shown)} of {len(changes)} pairs." if len(shown) < len(changes) else ""
    caption = (
        "Colour: do two clusters move the same evaluation prompts (1), or opposite ones (−1)? Percentages: of the prompts that "
        "both training buffers hold, where their sequences lie at one checkpoint and at the next; no percentage where no "
        f"prompt is in both. Sequences are drawn anew and cannot be followed. Numbers are each checkpoint's own.{left_out}"
    )
    return style.finish(figure, _TITLE, caption)


def _panel(axes: Axes, change: CheckpointChange) -> Any:
    values = np.array([[np.nan if v is None else v for v in row] for row in change.likeness or ()])
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="PuOr_r", aspect="auto")
    axes.set_facecolor("#DDDDDD")
    flow = change.flow
    for i, j in np.ndindex(values.shape):
        words = [] if np.isnan(values[i, j]) else [signed(values[i, j], 2)]
        if flow.flow is not None:
            words.append(f"{flow.flow[i][j]:.0%}")
        if values.size <= 16:
            dark = not np.isnan(values[i, j]) and abs(values[i, j]) > 0.6
            axes.text(
                j, i, "\n".join(words), ha="center", va="center", fontsize=7, color="white" if dark else "#222222"
            )
    axes.set_xticks(range(values.shape[1]), flow.later)
    axes.set_yticks(range(values.shape[0]), flow.earlier)
    axes.set_xlabel(f"cluster at step {change.to_step}", fontsize=8)
    axes.set_ylabel(f"at step {change.from_step}", fontsize=8)
    axes.set_title(f"{flow.prompts} prompt{'' if flow.prompts == 1 else 's'} in both", fontsize=8, color=style.NEUTRAL)
    axes.grid(False)
    return image
