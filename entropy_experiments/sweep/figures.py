"""The PNG figures of a sweep, by file name: a set for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.figures.plots import (
    plot_checkpoint_kernels,
    plot_cluster_flow,
    plot_entropy_changes,
    plot_entropy_law,
    plot_fisher_evolution,
    plot_kernel_evolution,
)
from entropy_experiments.sweep.evolution.evolution_rows import prompts_of

CHARTS = ("evolution", "changes", "law", "kernel", "kernels", "clusters")
"""Of every run, in the order of the report."""


Runs = Mapping[str, tuple[Evolution, Sequence[ResultsFolder]]]
"""Run's name -> its evolution, and its checkpoints by step."""


def draw_sweep_figures(evolutions: Runs) -> dict[str, Figure]:
    """`<run>_<chart>` -> figure."""
    figures: dict[str, Figure] = {}
    for run, (evolution, folders) in evolutions.items():
        drawn = (
            plot_fisher_evolution(evolution),
            plot_entropy_changes(evolution),
            plot_entropy_law(evolution.law.training),
            plot_kernel_evolution(evolution),
            plot_checkpoint_kernels(_kernels(folders)),
            plot_cluster_flow(evolution),
        )
        figures |= {f"{run}_{chart}": figure for chart, figure in zip(CHARTS, drawn, strict=True)}
    return figures


def _kernels(folders: Sequence[ResultsFolder]) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    return [
        (
            results.summary.checkpoint.step,
            results.kernels["fisher"],
            prompts_of(results.evaluation),
            prompts_of(results.training),
        )
        for results in folders
        if "fisher" in results.kernels
    ]
