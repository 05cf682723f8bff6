"""Which evaluation sequences does a training sequence move? The kernel as a picture, ordered by prompt.

    K₁(t, i)  = ∇S(t)ᵀ diag(P) ∇S(i)        "fisher"
    K_H(t, i) = E(t)ᵀ diag(P) ∇S(i)         "entropy_fisher"

t an evaluation sequence (row), i a training sequence (column), S the log-probability of a completion, E(t)
sequence t's term of the entropy gradient, P Adam's preconditioner. See docs/theory, "Fisher kernel".
"""

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from entropy_experiments.report.figures import style
from entropy_experiments.text.numbers import plain

Quantity = Literal["fisher", "entropy_fisher"]
_TITLES = {
    "fisher": "Fisher kernel: which completions become likelier together",
    "entropy_fisher": "Entropy–Fisher kernel: whose entropy a training sequence moves",
}
_SYMBOLS = {"fisher": "$K_1$", "entropy_fisher": "$K_H$"}
_MEANING = {
    "fisher": "Red: making the column's completion likelier makes the row's likelier too; blue: less likely.",
    "entropy_fisher": "Red: making the column's completion likelier raises the row's entropy; blue: lowers it.",
}
_UNITS = "nats² × P"
_MOST_TICK_LABELS = {"x": 20, "y": 12}
# More boundaries than this would cover the cells between them.
_MOST_BOUNDARIES = 100


def _prompt_axis(axes: Axes, ordered_prompts: np.ndarray, side: Literal["x", "y"]) -> None:
    """Prompt numbers at the middle of their groups; between groups ticks, and lines if they average two."""
    cuts = np.flatnonzero(np.diff(ordered_prompts)) + 1
    edges = np.concatenate([[0], cuts, [len(ordered_prompts)]])
    middles, labels = (edges[:-1] + edges[1:]) / 2 - 0.5, ordered_prompts[edges[:-1]]
    every = -(-len(labels) // _MOST_TICK_LABELS[side])
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks(middles[::every], [str(label) for label in labels[::every]])
    few = len(cuts) <= _MOST_BOUNDARIES
    axis.set_ticks(cuts - 0.5 if few else [], minor=True)
    axes.tick_params(axis=side, which="major", length=0 if few else 4)
    axes.tick_params(axis=side, which="minor", length=4)
    if few and len(ordered_prompts) >= 2 * len(labels):
        draw = axes.axvline if side == "x" else axes.axhline
        for cut in cuts:
            draw(cut - 0.5, color="black", linewidth=0.8 if len(cuts) < 20 else 0.4)


def _prompts_are_described(n_sequences: int, n_prompts: int, kind: str) -> str:
    return f"{n_sequences} {kind} sequences of {n_prompts} prompt" + ("" if n_prompts == 1 else "s")


def color_limit(kernel: ArrayLike, percentile: float = 99.0) -> float:
    """Where the symmetric colour scale of a kernel ends: that percentile of its finite |entries|, of which there must be one."""
    magnitudes = np.abs(np.asarray(kernel, dtype=np.float64))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    return float(np.percentile(magnitudes, percentile)) or float(magnitudes.max()) or 1.0


@style.in_house_style
def plot_kernel_heatmap(
    kernel: ArrayLike,
    eval_prompt_index: ArrayLike,
    train_prompt_index: ArrayLike,
    *,
    quantity: Quantity = "fisher",
    percentile: float = 99.0,
    order: tuple[str, ArrayLike, ArrayLike] | None = None,
    row_buffer: str = "evaluation",
) -> Figure:
    """Heat map of a kernel, rows and columns ordered by prompt, or as `order` says.

    Args:
        kernel: (n_eval, n_train), signed; entries that are not finite are drawn grey and counted in the caption.
        eval_prompt_index, train_prompt_index: (n_eval,) and (n_train,), the prompt of every row and column.
        quantity: which kernel this is ("fisher" for K₁, "entropy_fisher" for K_H); sets names and units.
        percentile: the symmetric colour scale ends at this percentile of |kernel|; the colour bar says so.
        order: (what by, rows in order, columns in order), in place of groups by prompt.
        row_buffer: the buffer that rows are of: "training" for a kernel with the training sequences on both sides.

    Raises:
        ValueError: a prompt index whose length is not the kernel's, or a percentile outside (0, 100].
    """
    values = np.asarray(kernel, dtype=np.float64)
    rows, columns = np.asarray(eval_prompt_index), np.asarray(train_prompt_index)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"a kernel {values.shape} with {len(rows)} evaluation and {len(columns)} training prompts")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile} is outside (0, 100]")
    finite = values[np.isfinite(values)]
    if not len(finite):
        return style.no_data_figure(_TITLES[quantity], "the kernel has no finite entry.")
    limit, (n_eval, n_train) = color_limit(values, percentile), values.shape
    beyond = int((np.abs(finite) > limit).sum())
    figure = style.new_figure(8.6, float(np.clip(7.0 * n_eval / n_train, 3.2, 6.5)))
    axes = figure.add_subplot()
    if order is None:
        row_order, column_order = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
        labels = "training sequence i, grouped by prompt (number: prompt index)", f"{row_buffer} sequence t, by prompt"
    else:
        row_order, column_order = np.asarray(order[1]), np.asarray(order[2])
        labels = f"place of training sequence i, ordered {order[0]}", f"place of {row_buffer} sequence t"
    picture = _heat(axes, values[row_order][:, column_order], limit)
    if order is None:
        _prompt_axis(axes, columns[column_order], "x")
        _prompt_axis(axes, rows[row_order], "y")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    _colour_bar(figure, axes, picture, quantity, f"scale ends at ±{plain(limit)}, percentile {percentile:g}", beyond)
    sides = (n_eval, len(np.unique(rows)), row_buffer), (n_train, len(np.unique(columns)), "training")
    return style.finish(figure, _TITLES[quantity], _caption(values, sides, quantity, beyond, grouped=order is None))


def _colour_bar(figure: Figure, axes: Axes, picture: AxesImage, quantity: Quantity, ends: str, beyond: int) -> None:
    bar = figure.colorbar(picture, ax=axes, extend="both" if beyond else "neither", pad=0.015)
    symbol = _SYMBOLS[quantity]
    bar.set_label(f"{symbol}(t, i)  in {_UNITS}\n{ends} of |{symbol}|", fontsize=8.5)
    bar.ax.grid(False)


def _heat(axes: Axes, values: np.ndarray, limit: float) -> AxesImage:
    """Red above 0, blue below, grey where not finite."""
    axes.grid(False)
    axes.set_facecolor("#9A9A9A")
    return axes.imshow(
        np.ma.masked_invalid(values),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        # With fewer pixels than cells, averaging shows what nearest-neighbour sampling would drop.
        interpolation="nearest" if max(values.shape) <= 400 else "antialiased",
    )


def _caption(
    values: np.ndarray,
    sides: tuple[tuple[int, int, str], tuple[int, int, str]],
    quantity: Quantity,
    beyond: int,
    grouped: bool,
) -> str:
    """sides: (sequences, prompts, buffer) of rows and of columns. beyond: entries beyond the colour scale."""
    finite = np.isfinite(values)
    (n_eval, n_eval_prompts, _), (_, n_train_prompts, _) = sides
    caption = (
        f"{_prompts_are_described(*sides[0])} (rows) against {_prompts_are_described(*sides[1])} (columns). "
        f"{_MEANING[quantity]} "
        f"{(values[finite] > 0).mean():.0%} of the entries are positive; their mean is "
        f"{plain(values[finite].mean())}. "
        f"{beyond} of {values.size} entries lie beyond the colour scale."
    )
    if missing := int((~finite).sum()):
        caption += f" Not finite, and drawn grey: {missing}."
    if grouped and n_eval_prompts * 2 > n_eval > 1:
        caption += " Nearly every row is a prompt of its own, so no lines are drawn between rows."
    if grouped and max(n_eval_prompts, n_train_prompts) > _MOST_BOUNDARIES + 1:
        caption += f" An axis of more than {_MOST_BOUNDARIES + 1} prompts has no lines between them."
    return caption
