"""Do the gradients of the training sequences fall into groups? Their cosines along the leaves of the tree; the spectrum.

Heat map and tree; silhouettes against rotated clouds; eigenvalues. See docs/analyses/clustering.md.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from entropy_experiments.analyses.kernel_geometry import cosine_kernel
from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.report.figures import style
from entropy_experiments.report.kernel_findings import duplicates_in_words
from entropy_experiments.text.numbers import counted, plain

_TITLE = "Do the gradients of the training sequences fall into groups?"
_MOST_NUMBERS = 16


@style.in_house_style
def plot_sequence_clusters(clustering: ClusteringResult, train_fisher: ArrayLike | None = None) -> Figure:
    """Cosine kernel in leaf order with its tree, silhouettes over the number of clusters, and eigenvalues.

    Args:
        train_fisher: (n_train, n_train) K₁ between training sequences, the matrix that was clustered; without it the heat map
            is left out.

    Raises:
        ValueError: a train_fisher of another size than was clustered.
    """
    if not clustering.sequences:
        return style.no_data_figure(_TITLE, "no training sequence has a gradient, or clusters were not analysed.")
    figure = style.new_figure(8.6, 5.6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1.0))
    left = grid[:, 0].subgridspec(2, 1, height_ratios=(0.16, 1.0), hspace=0.0)
    tree, picture = figure.add_subplot(left[0]), figure.add_subplot(left[1])
    _draw_tree(tree, clustering)
    limit = _draw_cosines(figure, picture, clustering, train_fisher)
    _draw_silhouettes(figure.add_subplot(grid[0, 1]), clustering)
    _draw_spectrum(figure.add_subplot(grid[1, 1]), clustering)
    return style.finish(figure, _TITLE, _caption(clustering, limit))


def _draw_tree(axes: Axes, clustering: ClusteringResult) -> None:
    """Brackets of the tree over the leaves; heights are mean distances 1 − cosine."""
    count = len(clustering.sequences)
    place = {sequence: at for at, sequence in enumerate(clustering.sequences)}
    across = np.empty(2 * count - 1)
    height = np.zeros(2 * count - 1)
    across[[place[sequence] for sequence in clustering.leaf_order]] = np.arange(count)
    brackets = []
    for merge, (first, second, distance, _) in enumerate(clustering.linkage):
        a, b, node = int(first), int(second), count + merge
        brackets.append([(across[a], height[a]), (across[a], distance), (across[b], distance), (across[b], height[b])])
        across[node], height[node] = (across[a] + across[b]) / 2, distance
    axes.add_collection(LineCollection(brackets, colors="#444444", linewidths=0.8 if count <= 100 else 0.5))
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0.0, 1.05 * max(float(height.max()), 0.02))
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.yaxis.get_major_locator().set_params(nbins=2)
    axes.set_ylabel("1 − cos", fontsize=8)


def _draw_cosines(
    figure: Figure, axes: Axes, clustering: ClusteringResult, train_fisher: ArrayLike | None
) -> float | None:
    """The cosine kernel in leaf order, clusters framed; returns where the colour scale ends."""
    if train_fisher is None:
        style.no_data(axes, "the kernel between training sequences\nwas not stored")
        return None
    kernel = np.asarray(train_fisher, dtype=np.float64)
    if kernel.shape != (clustering.n_train,) * 2:
        raise ValueError(f"train_fisher has shape {kernel.shape}, but {clustering.n_train} sequences were clustered")
    cosine, rows = cosine_kernel((kernel + kernel.T) / 2)
    place = {sequence: at for at, sequence in enumerate(rows.tolist())}
    order = [place[sequence] for sequence in clustering.leaf_order]
    different = np.abs(cosine[~np.eye(len(cosine), dtype=bool)])
    limit = float(np.percentile(different, 99)) if different.size and different.max() > 0 else 1.0
    axes.grid(False)
    image = axes.imshow(
        cosine[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    labels = [clustering.labels[sequence] for sequence in clustering.leaf_order]
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    if len(edges) > 2:
        for start, stop in zip(edges, edges[1:], strict=False):
            frame = Rectangle((start - 0.5, start - 0.5), stop - start, stop - start, fill=False, linewidth=1.2)
            axes.add_patch(frame)
        every = -(-(len(edges) - 1) // _MOST_NUMBERS)
        middles = [(start + stop - 1) / 2 for start, stop in zip(edges, edges[1:], strict=False)]
        axes.set_yticks(middles[::every], [str(labels[start]) for start in edges[:-1:every]])
        axes.set_ylabel("cluster")
    else:
        axes.set_yticks([])
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training sequences, in the order of the tree's leaves")
    bar = figure.colorbar(
        image, ax=axes, location="bottom", extend="both" if limit < 1 else "neither", aspect=40, pad=0.02
    )
    bar.set_label("cosine of two gradients, metric of P", fontsize=8.5)
    bar.ax.grid(False)
    return limit


def _draw_silhouettes(axes: Axes, clustering: ClusteringResult) -> None:
    axes.set_title("how well separated")
    silhouette = clustering.silhouette
    if silhouette is None:
        style.no_data(axes, "too few sequences\nfor clusters")
        return
    ks = silhouette.k
    axes.plot(ks, silhouette.hierarchical, color=style.PREDICTED, marker="o", markersize=4, label="tree")
    axes.plot(ks, silhouette.spectral, color=style.MEASURED, marker="s", markersize=4, linestyle="--", label="spectral")
    axes.axhline(silhouette.null_95, color="#444444", linestyle=":", linewidth=1.5, label="best of one cloud, 95%")
    axes.plot(
        silhouette.best_k, silhouette.best, marker="o", markersize=11, fillstyle="none", color="black", linestyle="none"
    )
    axes.set_xlabel("number of clusters")
    axes.set_ylabel("mean silhouette")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(loc="upper right", fontsize=8)


def _draw_spectrum(axes: Axes, clustering: ClusteringResult) -> None:
    axes.set_title("how many directions")
    for name, words, colour, dash in (
        ("cosine", "cosines", style.PREDICTED, "-"),
        ("fisher", "$K_1$ itself", style.MEASURED, "--"),
    ):
        spectrum = clustering.spectrum[name]
        rank = spectrum.effective_rank
        if rank is None:
            continue
        shares = np.asarray(spectrum.eigenvalues) / np.sum(spectrum.eigenvalues)
        axes.plot(
            np.arange(1, len(shares) + 1),
            np.cumsum(shares),
            color=colour,
            linestyle=dash,
            marker="." if len(shares) < 40 else None,
            label=f"{words}: effective rank {plain(rank, 2)}",
        )
    axes.set_ylim(0, 1.04)
    axes.set_xlim(left=0)
    axes.set_xlabel("eigenvalues, largest first")
    axes.set_ylabel("share of the trace")
    axes.legend(loc="lower right", fontsize=8)


def _caption(clustering: ClusteringResult, limit: float | None) -> str:
    missing, sequences = len(clustering.without_gradient), duplicates_in_words(clustering.duplicates)
    caption = ""
    if limit is not None:
        caption += (
            f"Left: red pairs change the policy in the same direction, blue ones in opposite directions "
            f"(scale ends at ±{plain(limit, 2)}; the diagonal is 1). "
        )
    silhouette = clustering.silhouette
    if clustering.shared is None or silhouette is None:
        caption += f"{sequences}, no clusters: {clustering.reason}. "
    else:
        caption += (
            f"{sequences} in {clustering.n_clusters} clusters (frames); rotated clouds without groups "
            f"are as well separated with p = {plain(silhouette.p_value, 2)}. "
        )
    caption += "Top right: the ring marks the best cut of the tree" if silhouette else ""
    caption += (
        ", the dotted line the 95th percentile of the tree's best cut in clouds without groups, of the same spectrum. "
        if silhouette
        else ""
    )
    caption += "Bottom right: eigenvalues added up; a curve that rises late says many independent directions."
    if missing:
        caption += f" Without a gradient, and left out: {counted(missing, 'sequence')}."
    return caption
