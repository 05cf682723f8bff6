"""What one finished analysis says about its checkpoint, in the form that a table over checkpoints needs.

All numbers are {"value", "standard_error", "low", "high", "degrees_of_freedom"}, low to high the 95% interval;
entropies and their changes in nats per token.
What an analysis did not compute is None. docs/analyses/evolution.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from entropy_experiments.records.estimate_entries import ratio_entry
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.report.verdict import primary_estimator
from entropy_experiments.statistics.agreement import stored_agreement
from entropy_experiments.statistics.confidence import freedom_of_analysis, number_entry
from entropy_experiments.sweep.evolution.training_kernel import kernel_size, training_structure
from entropy_experiments.text.numbers import as_number, lookup, value_and_error

PARTS = ("total", "batch", "momentum", "weight_decay")


def checkpoint_row(results: ResultsFolder) -> dict[str, Any]:
    """One checkpoint.

    step, folder; entropy, reward (evaluation buffer); estimator; predicted {part: number}; actual, with
    "effective_sample_size" and "n"; agreement of the two (entropy_experiments.statistics.agreement); trustworthy
    (effective sample at least half); kernel_norm, effective_rank (of the evaluation rows), training_rank,
    same_prompt_share, same_prompt_pairs; by_advantage
    {"above", "below"}: shares of the change by sequences with a reward above and below their prompt's mean; failed_checks,
    failed_analyses.
    """
    summary = results.raw
    given = lookup(summary, "rows_drawn") is False
    estimator = "fixed_prefix" if given else primary_estimator(summary)
    measured = lookup(summary, "actual", "fixed_prefix" if given else "snis")
    effective, n = as_number(lookup(measured, "effective_sample_size")), as_number(lookup(measured, "n"))
    compared, freedom = stored_agreement(summary, estimator), freedom_of_analysis(summary)
    row: dict[str, Any] = {
        "step": int(lookup(summary, "checkpoint", "step")),
        "folder": results.path.name,
        "entropy": _number(lookup(summary, "entropy", "per_token"), freedom),
        "reward": _mean_reward(results.evaluation),
        "estimator": estimator,
        "predicted": {
            part: _number(lookup(summary, "predicted", estimator, part), freedom) if estimator else None
            for part in PARTS
        },
        "actual": _number(measured, freedom),
        "agreement": None if compared is None else compared.as_dict(),
        "effective_sample_size": effective,
        "trustworthy": None if effective is None or not n else effective >= 0.5 * n,
        "by_advantage": _by_advantage(results.training),
        "sequences": {"evaluation": len(results.evaluation), "training": len(results.training)},
        "failed_checks": [c["name"] for c in results.raw_run["self_checks"] if c.get("passed") is not True],
        "failed_analyses": sorted(results.raw_run.get("failed_analyses") or {}),
    }
    return row | _kernel(results)


def _number(entry: Any, freedom: float | None) -> dict[str, float | None] | None:
    return None if value_and_error(entry)[0] is None else number_entry(entry, freedom)


def _mean_reward(rows: list[dict[str, Any]]) -> dict[str, float | None] | None:
    scored = [row for row in rows if as_number(row.get("reward")) is not None]
    if not scored:
        return None
    rewards = torch.tensor([float(row["reward"]) for row in scored], dtype=torch.float64)
    return ratio_entry(rewards, torch.tensor([row["prompt_index"] for row in scored]))


def _by_advantage(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    known = [(row["advantage"], row["delta_h"]) for row in rows if row.get("delta_h") is not None]
    if not known or any(advantage is None for advantage, _ in known):
        return None
    return {
        "above": float(sum(share for advantage, share in known if advantage > 0)),
        "below": float(sum(share for advantage, share in known if advantage < 0)),
    }


def _kernel(results: ResultsFolder) -> dict[str, Any]:
    names = ("kernel_norm", "effective_rank", "training_rank", "same_prompt_share", "same_prompt_pairs")
    row: dict[str, Any] = dict.fromkeys(names)
    rows, columns = (np.array([r["prompt_index"] for r in side]) for side in (results.evaluation, results.training))
    if "fisher" in results.kernels:
        size = kernel_size(results.kernels["fisher"], rows)
        row |= {"kernel_norm": size["norm"], "effective_rank": size["effective_rank"]}
    if "train_fisher" in results.kernels:
        found = training_structure(results.kernels["train_fisher"], columns)
        row |= {"training_rank": found["effective_rank"], "same_prompt_share": found["same_prompt_share"]}
        row["same_prompt_pairs"] = found["same_prompt_pairs"]
    return row
