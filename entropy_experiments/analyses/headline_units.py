"""Who moved entropy most in an analysed step, for summary.json: by the effect of leaving out or by the accounting share, with how
often another draw of evaluation prompts would have named the same one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from entropy_core.gradients import trainable_parameters
from entropy_experiments.analyses.distinct_sequences import DistinctSequences, distinct_sequences
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.analyses.left_out_evaluation_prompts import interval_columns
from entropy_experiments.analyses.who_was_first import (
    bootstrap_counts,
    numbers_of_draws,
    who_was_first,
    why_not_these,
)
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.step.effects_of_leaving_out import EARLY, Contributions, decided_by_effect
from entropy_experiments.step.training_noise import step_change, training_noise


def with_training_noise(inputs: AnalysisInputs, reporter: Reporter = SILENT) -> AnalysisInputs:
    """With what another draw of the training buffer would change, where there is a step and its sequences were drawn."""
    side, config = inputs.side, inputs.config.entropy_analysis
    if side.weights is None or config.sampling.train_sequences_path is not None:
        return inputs
    reporter.stage("noise of the training side")
    step = side.adam_step
    change = step_change(
        inputs.gradients[inputs.numbers.estimand.gradient],
        None if step is None else step.state,
        trainable_parameters(inputs.model),
        side.max_grad_norm,
        side.learning_rate,
    )
    weights = side.weights
    prompts = torch.from_numpy(prompt_units(inputs))
    noise = training_noise(change, side.gradient, lambda rows: side.rows.gradient_of(rows, weights), prompts)
    return replace(inputs, training_noise=noise)


def leaving_out_summary(inputs: AnalysisInputs) -> dict[str, Any] | None:
    """summary.json's "leaving_out"; None without a step.

    sum_of_effects; own_part_of_second_moment and early_above, by which "headline" is "effect" or "share"; by_prompt: rows
    {"prompt_index", "share", "effect", "real"}, real being what a step without the whole prompt does at first order (None where
    prompts were left out in groups, or there is one); slope_of_real: of real on effect through 0; first: `who_was_first`, or
    {"reason"}.
    """
    if inputs.numbers.step is None:
        return None
    attribution, noise = inputs.numbers.step.attribution, inputs.training_noise
    effects, shares = attribution.effects.numpy(), attribution.shares.numpy()
    early = decided_by_effect(attribution.own_part_of_second_moment)
    real = None if noise is None or noise.prompt_effects is None else noise.prompt_effects.numpy()
    prompts = prompt_units(inputs)
    order = np.array(list(dict.fromkeys(prompts.tolist())))
    rows = []
    for place, prompt in enumerate(order):
        own = prompts == prompt
        row = {"prompt_index": int(prompt), "share": float(shares[own].sum()), "effect": float(effects[own].sum())}
        rows.append(row | {"real": None if real is None else float(real[place])})
    return {
        "unit": "nats per token",
        "sum_of_effects": float(effects.sum()),
        "own_part_of_second_moment": attribution.own_part_of_second_moment,
        "early_above": EARLY,
        "headline": "effect" if early else "share",
        "by_prompt": rows,
        "slope_of_real": _slope(np.array([row["effect"] for row in rows]), real),
        "first": _first(inputs, inputs.decisive, effects if early else shares),
    }


def sequence_intervals(inputs: AnalysisInputs) -> dict[str, np.ndarray]:
    """Columns of sequences.parquet: the 95% intervals of shares and effects, (n_train,) each; {} where not known."""
    step, left_out = inputs.numbers.step, inputs.left_out
    if step is None or left_out is None:
        return {}
    found = {}
    for name, values, series in (
        ("delta_h", step.attribution.shares, left_out_shares(inputs)),
        ("effect", step.attribution.effects, left_out.effects),
    ):
        found[f"{name}_low"], found[f"{name}_high"] = interval_columns(values.numpy(), series)
    return found


def shares_of_prompts(inputs: AnalysisInputs) -> dict[int, torch.Tensor]:
    """Training prompt -> (B,) accounting share of its sequences with each evaluation prompt left out; {} where not known."""
    if inputs.left_out is None:
        return {}
    prompts, shares = np.array(inputs.training.rollouts.prompt_index), left_out_shares(inputs)
    return {int(p): torch.from_numpy(shares[:, prompts == p].sum(1)) for p in np.unique(prompts)}


def left_out_shares(inputs: AnalysisInputs) -> np.ndarray:
    """(B, n_train) accounting shares with each evaluation prompt left out, which must be known."""
    step, weights = inputs.numbers.step, inputs.side.weights
    assert step is not None and weights is not None and inputs.left_out is not None
    return step.attribution.step_factor * weights.double().cpu().numpy() * inputs.left_out.products


def prompt_units(inputs: AnalysisInputs) -> np.ndarray:
    """(n_train,) prompt numbers, the first of them where one text was drawn under several."""
    labels, number = inputs.training_labels(), {}
    return np.array(
        [
            number.setdefault(text or f"\0{index}", int(index))
            for text, index in zip(labels.prompt, labels.prompt_index, strict=True)
        ]
    )


def _slope(effects: np.ndarray, real: np.ndarray | None) -> float | None:
    """Least squares through 0; None where nothing is to be compared."""
    if real is None or not np.square(effects).sum() > 0:
        return None
    return float(effects @ real / np.square(effects).sum())


def _first(inputs: AnalysisInputs, decisive: Contributions | None, values: np.ndarray) -> dict[str, Any]:
    kernels = inputs.numbers.kernels
    if decisive is None or kernels is None:
        return {"reason": "the training rows were not kept in memory, or the kernel was not computed"}
    evaluation, training = inputs.evaluation_labels(), inputs.training_labels()
    _, prompts = np.unique(
        [text or f"\0{i}" for text, i in zip(evaluation.prompt, evaluation.prompt_index, strict=True)],
        return_inverse=True,
    )
    count = int(prompts.max()) + 1
    if count < 2:
        return {"reason": "there is one evaluation prompt"}
    arrays = (decisive, prompts, evaluation.entropy_sum, evaluation.length)
    why = why_not_these(values, numbers_of_draws(np.ones((1, count)), *arrays)[0])
    if why is not None:
        return {"reason": why}
    equal: DistinctSequences = distinct_sequences(training, kernels.train_fisher.double().cpu().numpy())
    draw = numbers_of_draws(bootstrap_counts(count, seed=inputs.config.seed), *arrays)
    units = {"sequences": equal.first[equal.of], "prompts": equal.prompts}
    left_out = numbers_of_draws(np.ones((count, count)) - np.eye(count), *arrays)
    return who_was_first(values, draw, units, left_out) | {"distinct": len(equal.first)}
