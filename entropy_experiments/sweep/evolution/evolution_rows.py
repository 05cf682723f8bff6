"""What one finished analysis says about its checkpoint, in the form that a table over checkpoints needs.

All numbers are {"value", "standard_error", "low", "high", "degrees_of_freedom"}, low to high the 95% interval;
entropies and their changes in nats per token.
What an analysis did not compute is None. docs/analyses/evolution.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from entropy_experiments.records.estimate_entries import ratio_estimate
from entropy_experiments.records.estimates import entry_of
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.record import json_of
from entropy_experiments.sweep.evolution.training_kernel import kernel_size, training_structure
from entropy_experiments.text.numbers import as_number

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
    summary, measured, parts = results.summary, results.summary.measured, results.summary.prediction
    estimator = summary.estimator
    compared = None if estimator is None else summary.agreement.get(estimator)
    row: dict[str, Any] = {
        "step": summary.checkpoint.step,
        "folder": results.path.name,
        "entropy": entry_of(summary.entropy.per_token),
        "reward": _mean_reward(results.evaluation),
        "estimator": estimator,
        "predicted": {part: None if parts is None else entry_of(getattr(parts, part)) for part in PARTS},
        "actual": entry_of(measured),
        "agreement": None if compared is None else json_of(compared),
        "effective_sample_size": None if measured is None else measured.effective_sample_size,
        "trustworthy": None if measured is None else measured.trustworthy,
        "by_advantage": _by_advantage(results.training),
        "sequences": {"evaluation": len(results.evaluation), "training": len(results.training)},
        "failed_checks": [check.name for check in results.run.self_checks if not check.passed],
        "failed_analyses": sorted(results.run.failed_analyses),
    }
    return row | _kernel(results)


def _mean_reward(rows: list[dict[str, Any]]) -> dict[str, float | None] | None:
    scored = [row for row in rows if as_number(row.get("reward")) is not None]
    if not scored:
        return None
    rewards = torch.tensor([float(row["reward"]) for row in scored], dtype=torch.float64)
    return entry_of(ratio_estimate(rewards, torch.tensor([row["prompt_index"] for row in scored])))


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
