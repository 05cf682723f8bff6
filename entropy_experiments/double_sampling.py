"""Two independent buffers at a checkpoint: a filtered training buffer and an unfiltered evaluation buffer.

One batch in both roles would add the t = t' terms (K(t, t) > 0) and bias every delta H. The evaluation buffer is drawn
without looking at any reward; rewards are filled in afterwards, for the report alone. See docs/theory/double-sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from entropy_core.weighting import advantages, sequence_weights
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.algs.rollout_record import read_rollouts
from rl_training.config import TaskConfig
from rl_training.configuration import validate_config
from rl_training.difficulty import PassRates
from rl_training.errors import UserError
from rl_training.sampling import (
    CollectionCounts,
    Rollouts,
    SamplingLaw,
    collect_filtered,
    draw,
    prompt_text,
    sampling_law,
)
from rl_training.tasks import Task, load_task

Progress = Callable[[int], None]

# Offsets that keep the random streams of the two buffers apart for one seed.
_TRAINING_STREAM, _EVALUATION_STREAM = 1_000_003, 2_000_003


@dataclass(frozen=True)
class TrainingBuffer:
    """Filtered rollouts with (N,) float64 advantages and weights w_i, and what their collection cost."""

    rollouts: Rollouts
    advantages: torch.Tensor
    weights: torch.Tensor
    counts: CollectionCounts


@dataclass(frozen=True)
class SamplingPlan:
    """The task, the law and the group size that both buffers are drawn with."""

    task: Task
    law: SamplingLaw
    completions_per_prompt: int
    length_normalizer: str


def plan_sampling(checkpoint: Checkpoint, config: FisherAnalysisConfig) -> SamplingPlan:
    """Put together the run's record and the configuration's overrides.

    Raises UserError where neither says what is needed, or where a temperature is given that the run did not train at.
    """
    sidecar, sampling = checkpoint.record.sidecar, config.entropy_analysis.sampling
    task_config = config.checkpoint.task
    if task_config is None and sidecar is not None and sidecar.task is not None:
        task_config = validate_config(TaskConfig, sidecar.task, "the checkpoint's task")
    if task_config is None:
        raise UserError(
            "the checkpoint does not say which task it was trained on: give checkpoint.task in the configuration"
        )
    temperature = sampling.temperature or (sidecar.sampling.temperature if sidecar else None)
    longest = sampling.max_completion_length or (sidecar.sampling.max_completion_length if sidecar else None)
    if temperature is None or longest is None:
        raise UserError(
            "the checkpoint does not say how completions were sampled: give entropy_analysis.sampling.temperature and "
            "max_completion_length"
        )
    if sidecar is not None:
        law = sampling_law(
            checkpoint.model, checkpoint.tokenizer, temperature, longest, sidecar.sampling.top_k, sidecar.sampling.top_p
        )
    else:
        law = sampling_law(checkpoint.model, checkpoint.tokenizer, temperature, longest)
    size = sampling.completions_per_prompt or (sidecar.sampling.completions_per_prompt if sidecar else 8)
    if config.entropy_analysis.train_batch_size % size:
        raise UserError(
            f"entropy_analysis.train_batch_size {config.entropy_analysis.train_batch_size} is not a multiple of the {size} "
            "completions of a prompt"
        )
    normalizer = sidecar.algorithm.length_normalizer if sidecar else "constant"
    return SamplingPlan(load_task(task_config), law, size, normalizer)


def sample_training_batch(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, progress: Progress | None = None
) -> TrainingBuffer:
    """The filtered buffer, by the run's own pass rates and rules, with Dr. GRPO's weights."""
    sampling, record = config.entropy_analysis.sampling, checkpoint.record
    prompts = config.entropy_analysis.train_batch_size // plan.completions_per_prompt
    if sampling.train_prompts == "from_run":
        rollouts, counts = _buffer_of_run(record.run_dir, record.step, plan)
    else:
        rates = PassRates(len(plan.task.train))
        if record.sidecar is not None and len(record.sidecar.pass_rates["passes"]) == rates.size:
            rates.load_state_dict(record.sidecar.pass_rates)
        rows = plan.task.train
        if sampling.train_prompts == "fixed_set":
            rows, rates = rows[:prompts], PassRates(min(prompts, len(rows)))
        rollouts, counts = collect_filtered(
            checkpoint.model,
            checkpoint.tokenizer,
            rows,
            plan.task.reward_functions,
            rates,
            prompts=min(prompts, len(rows)),
            completions_per_prompt=plan.completions_per_prompt,
            law=plan.law,
            seed=config.seed + _TRAINING_STREAM,
            max_refill_rounds=0 if sampling.train_prompts == "fixed_set" else sampling.max_refill_rounds,
            difficulty_weighting=sampling.train_prompts == "random",
            progress=progress,
        )
    rewards = torch.tensor([float(r if r is not None else 0.0) for r in rollouts.reward], dtype=torch.float64)
    index = torch.tensor(rollouts.prompt_index)
    lengths = torch.tensor([len(c) for c in rollouts.completion_ids])
    weights = sequence_weights(
        rewards, index, lengths, "dr_grpo", plan.law.max_completion_length, plan.length_normalizer
    )
    return TrainingBuffer(rollouts, advantages(rewards, index, "dr_grpo"), weights, counts)


def sample_evaluation_batch(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    training: Rollouts,
    progress: Progress | None = None,
) -> Rollouts:
    """The unfiltered buffer. Of `training` only the prompts are looked at, to keep them out (or in, for same_prompts).

    Raises UserError when no prompt is left to draw from.
    """
    sampling, each = config.entropy_analysis.sampling, config.entropy_analysis.sampling.eval_completions_per_prompt
    used = set(training.prompt_index)
    everything = [*plan.task.train, *plan.task.heldout]
    pool = plan.task.heldout if sampling.eval_split == "heldout" else plan.task.train
    if sampling.same_prompts:
        pool = [row for row in everything if row["prompt_index"] in used]
    else:
        pool = [row for row in pool if row["prompt_index"] not in used]
    if not pool:
        raise UserError(
            f"no prompt left for the evaluation buffer (eval_split={sampling.eval_split}, same_prompts={sampling.same_prompts}): "
            "give the task a larger heldout_size or size"
        )
    rng = np.random.default_rng(config.seed + _EVALUATION_STREAM)
    count = -(-config.entropy_analysis.eval_batch_size // each)
    if sampling.eval_prompts == "fixed_set":
        order = np.arange(len(pool))
    else:
        order = rng.permutation(len(pool))
    chosen = np.resize(order, count)  # distinct prompts first, then the same order again
    rows = [pool[i] for i in chosen]
    rollouts = draw(
        checkpoint.model,
        checkpoint.tokenizer,
        rows,
        each,
        plan.law,
        int(rng.integers(2**31)),
        "evaluation",
        progress=progress,
    )
    return rollouts.select(range(config.entropy_analysis.eval_batch_size))


def _buffer_of_run(run_dir: Any, step: int, plan: SamplingPlan) -> tuple[Rollouts, CollectionCounts]:
    rows = read_rollouts(run_dir, step)
    known = {row["prompt_index"]: row for row in [*plan.task.train, *plan.task.heldout]}
    kept = [row for row in rows if row["status"] != "rejected"]
    unknown = [row["prompt_index"] for row in kept if row["prompt_index"] not in known]
    if unknown:
        raise UserError(
            f"the rollouts of step {step} name prompt {unknown[0]}, which the task does not have: tasks differ"
        )
    rollouts = Rollouts(
        prompt_ids=[row["prompt_ids"] for row in kept],
        completion_ids=[row["completion_ids"] for row in kept],
        prompt_index=[row["prompt_index"] for row in kept],
        prompt=[prompt_text(known[row["prompt_index"]]["prompt"]) for row in kept],
        completion=[row["completion"] for row in kept],
        prompt_row=[known[row["prompt_index"]] for row in kept],
        reward=[row["reward"] for row in kept],
        status=[row["status"] for row in kept],
    )
    counts = CollectionCounts(
        rounds=1 + max(row["round"] for row in rows),
        generated=len(rows),
        rejected=sum(row["status"] == "rejected" for row in rows),
        filler=sum(row["status"] == "filler" for row in rows),
        kept=sum(row["status"] == "trained" for row in rows),
    )
    return rollouts, counts
