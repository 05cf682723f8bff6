"""Two independent buffers at a checkpoint: a filtered training buffer and an unfiltered evaluation buffer.

One batch in both roles would add the t = t' terms (K(t, t) > 0) and bias every delta H. The evaluation buffer is drawn
without looking at any reward; rewards are filled in afterwards, for the report alone. See docs/theory/double-sampling.md.
"""

from __future__ import annotations

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
        recorded = sidecar.sampling
        for name, found, wanted in (
            ("temperature", temperature, recorded.temperature),
            ("max_completion_length", longest, recorded.max_completion_length),
        ):
            if found != wanted:
                raise UserError(
                    f"entropy_analysis.sampling.{name}={found}, but the run was sampled with {wanted}: under another law it is "
                    "another policy; leave it out"
                )
        law = SamplingLaw(
            temperature, longest, tuple(recorded.eos_token_ids), recorded.pad_token_id, recorded.top_k, recorded.top_p
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


def choose_evaluation_rows(plan: SamplingPlan, config: FisherAnalysisConfig) -> list[dict[str, Any]]:
    """Task rows of the evaluation buffer, chosen before the training buffer is drawn, so that no reward has a say in it.

    Empty under same_prompts, where they are the training buffer's own. Raises UserError when the split has no prompts.
    """
    sampling = config.entropy_analysis.sampling
    if sampling.same_prompts:
        return []
    pool = plan.task.heldout if sampling.eval_split == "heldout" else plan.task.train
    if not pool:
        raise UserError(
            f"the task has no {sampling.eval_split} prompts for the evaluation buffer: give it a larger heldout_size, or set "
            "entropy_analysis.sampling.eval_split=train"
        )
    return _arranged(pool, config)


def rows_of(training: Rollouts, config: FisherAnalysisConfig) -> list[dict[str, Any]]:
    """The training buffer's own prompts, for an evaluation buffer of fresh completions of them."""
    return _arranged(list({row["prompt_index"]: row for row in training.prompt_row}.values()), config)


def _arranged(pool: list[dict[str, Any]], config: FisherAnalysisConfig) -> list[dict[str, Any]]:
    """As many rows as the buffer needs: distinct prompts first, then the same again."""
    settings = config.entropy_analysis
    count = -(-settings.eval_batch_size // settings.sampling.eval_completions_per_prompt)
    order = np.arange(len(pool))
    if settings.sampling.eval_prompts == "random":
        order = np.random.default_rng(config.seed + _EVALUATION_STREAM).permutation(len(pool))
    return [pool[i] for i in np.resize(order, count)]


def sample_evaluation_batch(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    rows: list[dict[str, Any]],
) -> Rollouts:
    """The unfiltered buffer: completions of `rows`, no reward looked at."""
    each = config.entropy_analysis.sampling.eval_completions_per_prompt
    seed = config.seed + _EVALUATION_STREAM + 1
    rollouts = draw(checkpoint.model, checkpoint.tokenizer, rows, each, plan.law, seed, "evaluation")
    return rollouts.select(range(config.entropy_analysis.eval_batch_size))


def sample_training_batch(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    keep_out: list[dict[str, Any]],
) -> TrainingBuffer:
    """The filtered buffer, by the run's own pass rates and rules, with Dr. GRPO's weights; `keep_out` are not drawn.

    N in the weights is the buffer's size as asked for, as in training: groups that could not be had carry no gradient.

    Raises UserError when no training prompt is left, none gives gradient, or a recorded buffer holds one of `keep_out`.
    """
    settings, record = config.entropy_analysis, checkpoint.record
    excluded = {row["prompt_index"] for row in keep_out}
    if settings.sampling.train_prompts == "from_run":
        buffer = _buffer_of_run(record.run_dir, record.step, plan)
        if shared := excluded & set(buffer.rollouts.prompt_index):
            raise UserError(
                f"the run's own buffer holds prompt {min(shared)}, which the evaluation buffer has too: draw that from held-out "
                "prompts (eval_split=heldout), or say that they are to be shared (same_prompts=true)"
            )
        return buffer
    prompts = settings.train_batch_size // plan.completions_per_prompt
    places = [i for i, row in enumerate(plan.task.train) if row["prompt_index"] not in excluded]
    if not places:
        raise UserError("no training prompt is left beside the evaluation buffer: give the task a larger size")
    rates, rules = PassRates(len(plan.task.train)), record.sidecar.algorithm if record.sidecar else None
    if record.sidecar is not None and len(record.sidecar.pass_rates["passes"]) == rates.size:
        rates.load_state_dict(record.sidecar.pass_rates)
    fixed = settings.sampling.train_prompts == "fixed_set"
    places = places[:prompts] if fixed else places
    rollouts, counts = collect_filtered(
        checkpoint.model,
        checkpoint.tokenizer,
        [plan.task.train[i] for i in places],
        plan.task.reward_functions,
        rates.subset(places),
        prompts=min(prompts, len(places)),
        completions_per_prompt=plan.completions_per_prompt,
        law=plan.law,
        seed=config.seed + _TRAINING_STREAM,
        max_refill_rounds=0 if fixed else settings.sampling.max_refill_rounds,
        difficulty_weighting=not fixed and (rules is None or rules.difficulty_weighting),
        reject_zero_advantage=rules is None or rules.reject_zero_advantage,
    )
    rewards = torch.tensor([float(r if r is not None else 0.0) for r in rollouts.reward], dtype=torch.float64)
    index = torch.tensor(rollouts.prompt_index)
    lengths = torch.tensor([len(c) for c in rollouts.completion_ids])
    weights = sequence_weights(
        rewards, index, lengths, "dr_grpo", plan.law.max_completion_length, plan.length_normalizer
    )
    weights = weights * (len(rollouts) / settings.train_batch_size)
    return TrainingBuffer(rollouts, advantages(rewards, index, "dr_grpo"), weights, counts)


def _buffer_of_run(run_dir: Any, step: int, plan: SamplingPlan) -> TrainingBuffer:
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
    recorded = (torch.tensor([row[name] for row in kept], dtype=torch.float64) for name in ("advantage", "weight"))
    return TrainingBuffer(rollouts, *recorded, counts)
