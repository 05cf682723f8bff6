"""What one finished analysis says about its checkpoint, as a row of evolution.json. docs/analyses/evolution.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.distinct_sequences import distinct_sequences
from entropy_experiments.records.estimate_entries import finite_number, ratio_estimate
from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.evolution import BufferSizes, ByAdvantage, CheckpointRow
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.zero_or_one import of_zeros_and_ones, zeros_and_ones
from entropy_experiments.sweep.evolution.training_kernel import kernel_size, training_structure
from entropy_experiments.text.numbers import series


def checkpoint_row(results: ResultsFolder) -> CheckpointRow:
    """The row of one checkpoint; what its analysis did not compute is None."""
    summary, measured, estimator = results.summary, results.summary.measured, results.summary.estimator
    norm, rank, structure = None, None, None
    if "fisher" in results.kernels:
        norm, rank = kernel_size(results.kernels["fisher"], prompts_of(results.evaluation))
    if "train_fisher" in results.kernels:
        gram = results.kernels["train_fisher"]
        equal = distinct_sequences(labels_of(results.training), np.asarray(gram, np.float64))
        structure = training_structure(gram, equal.prompts, equal.of)
    return CheckpointRow(
        step=summary.checkpoint.step,
        folder=results.path.name,
        entropy=summary.entropy.per_token,
        reward=_mean_reward(results.evaluation),
        estimator=estimator,
        predicted=summary.prediction,
        actual=None if measured is None or measured.value is None else measured,
        agreement=None if estimator is None else summary.agreement_of(estimator),
        by_advantage=_by_advantage(results.training),
        sequences=BufferSizes(evaluation=len(results.evaluation), training=len(results.training)),
        failed_checks=tuple(check.name for check in results.run.self_checks if not check.passed),
        failed_analyses=tuple(sorted(results.run.failed_analyses)),
        kernel_norm=norm,
        effective_rank=rank,
        training_rank=None if structure is None else structure.effective_rank,
        same_prompt_share=None if structure is None else structure.same_prompt_share,
        same_prompt_pairs=None if structure is None else structure.same_prompt_pairs,
    )


def labels_of(sequences: list[dict[str, Any]]) -> SequenceLabels:
    """The rows of a buffer as analyses know them; NaN for a number that is missing."""
    numbers = (series(sequences, name) for name in ("reward", "length", "entropy_sum", "score"))
    texts = ([row[name] for row in sequences] for name in ("prompt", "completion"))
    return SequenceLabels(prompts_of(sequences), *numbers, *texts)


def prompts_of(sequences: list[dict[str, Any]]) -> np.ndarray:
    """(n,) the prompt of each sequence."""
    return np.array([row["prompt_index"] for row in sequences])


def _mean_reward(sequences: list[dict[str, Any]]) -> Estimate | None:
    scored = [
        (float(row["reward"]), row["prompt_index"]) for row in sequences if finite_number(row["reward"]) is not None
    ]
    if not scored:
        return None
    rewards, prompts = zip(*scored, strict=True)
    mean = ratio_estimate(torch.tensor(rewards, dtype=torch.float64), torch.tensor(prompts))
    return of_zeros_and_ones(mean, len(rewards), len(set(prompts))) if zeros_and_ones(rewards) else mean


def _by_advantage(sequences: list[dict[str, Any]]) -> ByAdvantage | None:
    known = [(row["advantage"], row["delta_h"]) for row in sequences if row["delta_h"] is not None]
    if not known or any(advantage is None for advantage, _ in known):
        return None
    return ByAdvantage(
        above=float(sum(share for advantage, share in known if advantage > 0)),
        below=float(sum(share for advantage, share in known if advantage < 0)),
    )
