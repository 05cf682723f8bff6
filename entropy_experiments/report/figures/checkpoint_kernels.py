"""The Fisher kernels of a run's checkpoints side by side, as small pictures: what the report's slider shows one by one."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.report.figures import style
from entropy_experiments.report.figures.kernel import color_limit

_TITLE = "Fisher kernels of the checkpoints"
_MOST_PANELS = 16
_ACROSS = 4


@style.in_house_style
def plot_checkpoint_kernels(kernels: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """kernels: (step, (n_eval, n_train) K1, (n_eval,) and (n_train,) prompts) of each checkpoint; at most 16 are shown."""
    if not kernels:
        return style.no_data_figure(_TITLE, "no checkpoint has a kernel.")
    chosen = np.unique(np.linspace(0, len(kernels) - 1, min(len(kernels), _MOST_PANELS)).round().astype(int))
    across = min(_ACROSS, len(chosen))
    down = -(-len(chosen) // across)
    figure = style.new_figure(max(4.6, 2.2 * across + 0.6), 2.1 * down + 0.3)
    panels = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    image = None
    for axes, place in zip(panels, chosen, strict=False):
        step, kernel, rows, columns = kernels[place]
        ordered = np.asarray(kernel, float)[np.ix_(np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable"))]
        image = axes.imshow(
            ordered / color_limit(ordered), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"step {step}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    for axes in panels[: len(chosen) : across]:
        axes.set_ylabel("evaluation\nsequences", fontsize=8)
    for axes in panels[max(0, len(chosen) - across) : len(chosen)]:
        axes.set_xlabel("training sequences", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="K₁ / its 99th percentile")
    left_out = f" {len(chosen)} of {len(kernels)} checkpoints." if len(chosen) < len(kernels) else ""
    caption = (
        "Both axes in the order of prompts; rows are the same prompts throughout, training sequences are drawn anew. "
        "Red: making the training completion likelier makes the evaluation completion likelier too; blue: less likely. Each "
        f"picture has its own scale: compare patterns, not sizes.{left_out}"
    )
    return style.finish(figure, _TITLE, caption)
