"""Every chart of an analysis: labelled arrays in, a matplotlib ``Figure`` out, no global state, no files.

    plot_training_history     entropy and reward while training; each step's predicted and measured Δh
    plot_predicted_vs_actual  predicted and measured Δh along the step, and their ratio
    plot_entropy_split        batch, momentum, weight decay: which part of the update moved entropy
    plot_attribution          which training sequences moved it
    plot_kernel_heatmap       which evaluation sequences a training sequence moves

of a sweep, from a run of ``evolution.json``:

    plot_fisher_evolution  plot_entropy_changes  plot_entropy_law (its "law")  plot_kernel_evolution  plot_cluster_flow
    plot_checkpoint_kernels (of the kernels themselves)

and of the questions, each from the record that its analysis returns (``summary.json``, "analyses"):

    plot_buffers  plot_higher_order  plot_token_shares  plot_intervention  plot_prompt_structure  plot_sequence_clusters
    plot_weighting_schemes  plot_prices  plot_baselines

and of several analyses beside each other: plot_compared_changes  plot_compared_checkpoints  plot_compared_histories

Entropies are in nats per token, a negative change is a loss of entropy, and error bars are 95% intervals
throughout. What is missing is drawn as "no data". ``caption_of(figure)`` is the figure's caption,
``save_png`` writes a file.
"""

from entropy_experiments.report.figures.attribution import plot_attribution
from entropy_experiments.report.figures.baselines import plot_baselines
from entropy_experiments.report.figures.buffers import plot_buffers
from entropy_experiments.report.figures.checkpoint_kernels import plot_checkpoint_kernels
from entropy_experiments.report.figures.cluster_flow import plot_cluster_flow
from entropy_experiments.report.figures.clustering import plot_sequence_clusters
from entropy_experiments.report.figures.comparison import (
    plot_compared_changes,
    plot_compared_checkpoints,
    plot_compared_histories,
)
from entropy_experiments.report.figures.entropy_law import plot_entropy_law
from entropy_experiments.report.figures.evolution import (
    plot_entropy_changes,
    plot_fisher_evolution,
    plot_kernel_evolution,
)
from entropy_experiments.report.figures.higher_order import plot_higher_order
from entropy_experiments.report.figures.history import plot_training_history
from entropy_experiments.report.figures.intervention import plot_intervention
from entropy_experiments.report.figures.kernel import plot_kernel_heatmap
from entropy_experiments.report.figures.prices import plot_prices
from entropy_experiments.report.figures.step import plot_entropy_split, plot_predicted_vs_actual
from entropy_experiments.report.figures.structure import plot_prompt_structure
from entropy_experiments.report.figures.style import caption_of, no_data_figure, png_bytes, save_png
from entropy_experiments.report.figures.token_shares import plot_token_shares
from entropy_experiments.report.figures.weighting import plot_weighting_schemes

__all__ = [
    "caption_of",
    "no_data_figure",
    "plot_attribution",
    "plot_baselines",
    "plot_prices",
    "plot_buffers",
    "plot_compared_changes",
    "plot_compared_checkpoints",
    "plot_compared_histories",
    "plot_checkpoint_kernels",
    "plot_cluster_flow",
    "plot_entropy_changes",
    "plot_entropy_law",
    "plot_entropy_split",
    "plot_fisher_evolution",
    "plot_higher_order",
    "plot_intervention",
    "plot_kernel_evolution",
    "plot_kernel_heatmap",
    "plot_predicted_vs_actual",
    "plot_prompt_structure",
    "plot_sequence_clusters",
    "plot_token_shares",
    "plot_training_history",
    "plot_weighting_schemes",
    "png_bytes",
    "save_png",
]
