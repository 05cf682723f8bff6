"""The PNG figures of a sweep, by file name: a set for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.figures.plots import (
    plot_checkpoint_kernels,
    plot_cluster_flow,
    plot_entropy_changes,
    plot_entropy_law,
    plot_fisher_evolution,
    plot_kernel_evolution,
)

CHARTS = ("evolution", "changes", "law", "kernel", "kernels", "clusters")
"""Of every run, in the order of the report."""


def draw_sweep_figures(
    evolutions: Mapping[str, tuple[Mapping[str, Any], Sequence[ResultsFolder]]],
) -> dict[str, Figure]:
    """`<run>_<chart>` -> figure, of run name -> (`describe_evolution`, its checkpoints by step)."""
    figures: dict[str, Figure] = {}
    for run, (evolution, folders) in evolutions.items():
        drawn = (
            plot_fisher_evolution(evolution_rows(evolution)),
            plot_entropy_changes(evolution),
            plot_entropy_law(evolution["law"]["training"]),
            plot_kernel_evolution(evolution),
            plot_checkpoint_kernels(_kernels(folders)),
            plot_cluster_flow(evolution),
        )
        figures |= {f"{run}_{chart}": figure for chart, figure in zip(CHARTS, drawn, strict=True)}
    return figures


def _kernels(folders: Sequence[ResultsFolder]) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    found = []
    for results in folders:
        if "fisher" in results.kernels:
            rows, columns = (
                np.array([row["prompt_index"] for row in side]) for side in (results.evaluation, results.training)
            )
            found.append((results.summary.checkpoint.step, results.kernels["fisher"], rows, columns))
    return found


def evolution_rows(evolution: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `plot_fisher_evolution` draws: a row a checkpoint."""
    return [
        {
            "step": row["step"],
            "entropy": row["entropy"],
            "reward": row["reward"] and row["reward"]["value"],
            "predicted": row["predicted"]["total"],
            "actual": row["actual"],
            "kernel_norm": row["kernel_norm"] and row["kernel_norm"]["value"],
        }
        for row in evolution["checkpoints"]
    ]
