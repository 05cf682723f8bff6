"""Buffers out of what a run recorded of its own steps, nothing drawn anew:
`train_prompts=from_run`, `eval_prompts=from_run`.

    training      what the checkpoint's step s trained on, with the run's own weights
    evaluation    what step s + 1 drew before any group was rejected: those sequences come from the checkpoint's own policy

The only buffers there are for a run whose completions were written by more than the policy (tools,
an environment): an analysis cannot run these. Evaluation prompts are those of the run, which draws
them by difficulty; see docs/guides/analysis.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import BuffersConfig, FisherAnalysisConfig
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts, rollouts_path
from rl_training.sampling import Rollouts, prompt_text
from rl_training.sequences import RolloutSequence
from rl_training.tasks.task import Task

_REMEDY = (
    "take what it recorded (sampling.train_prompts=from_run, sampling.eval_prompts=from_run), or sequences of your own "
    "(train_sequences_path, eval_sequences_path)"
)


def refuse_drawing(checkpoint: Checkpoint, sampling: BuffersConfig) -> None:
    """Raises UserError where a buffer is to be drawn and the run's completions were not the
    policy's alone.
    """
    sidecar = checkpoint.record.sidecar
    if sidecar is None or sidecar.sampling.environment is None:
        return
    drawn = []
    if sampling.analysis_draws_rows and sampling.eval_prompts != "from_run":
        drawn.append("evaluation")
    train_given = sampling.train_sequences_path is not None or sampling.train_completions == "reference"
    if not train_given and sampling.train_prompts != "from_run":
        drawn.append("training")
    if drawn:
        raise UserError(
            f"the run's completions were written with {sidecar.sampling.environment}, which an analysis cannot run: no "
            f"{' or '.join(drawn)} buffer like the run's can be drawn; {_REMEDY}"
        )


def refuse_foreign(training: Rollouts, sampling: BuffersConfig) -> None:
    """The same for runs that did not record an environment but foreign tokens."""
    if any(training.drawn) and sampling.analysis_draws_rows and sampling.eval_prompts != "from_run":
        raise UserError(
            "the training buffer holds tokens that the policy did not draw (tools, an environment), and an evaluation buffer "
            f"that is drawn anew would have none: {_REMEDY}"
        )


def recorded_training(run_dir: Path, step: int, plan: SamplingPlan) -> tuple[Rollouts, list[RolloutSequence]]:
    """(the sequences that step trained on, fillers included, with their weights; all that it
    recorded).

    Raises:
        UserError: it recorded none.
    """
    recorded = read_rollouts(run_dir, step)
    kept = [s for s in recorded if s.status != "rejected" and s.length]
    return with_prompts(kept, plan.task), recorded


def recorded_evaluation(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, keep_out: Collection[int]
) -> Rollouts:
    """Up to eval_batch_size sequences of the next step's first round: of prompts at random, none of
    `keep_out`.

    Raises:
        UserError: the next step was not recorded, or has other prompts' sequences alone.
    """
    record, settings = checkpoint.record, config.entropy_analysis
    step = record.step + 1
    path = rollouts_path(record.run_dir, step)
    if not path.exists():
        raise UserError(
            f"eval_prompts=from_run needs what the step after the checkpoint drew, and {path} does not exist: analyse an earlier "
            "checkpoint of this run, or give sequences of your own (eval_sequences_path)"
        )
    recorded = [s for s in read_rollouts(record.run_dir, step) if s.round == 0 and s.length]
    prompts = sorted({s.prompt_index for s in recorded if s.prompt_index is not None} - set(keep_out))
    if not prompts:
        raise UserError(
            f"every prompt of {path} is in the training buffer as well: analyse another checkpoint, or give sequences of your "
            "own (eval_sequences_path)"
        )
    order = prompts
    if settings.eval_batch_size < sum(s.prompt_index in set(prompts) for s in recorded):
        rng = np.random.default_rng(config.seed + 2_000_003)
        order = [prompts[i] for i in rng.permutation(len(prompts))]
    members = {p: [s for s in recorded if s.prompt_index == p] for p in order}
    # Distinct prompts first: completions of one prompt are added in turns until the buffer is full.
    turns = max(len(m) for m in members.values())
    chosen = [members[p][turn] for turn in range(turns) for p in order if turn < len(members[p])]
    chosen = chosen[: settings.eval_batch_size]
    chosen = [replace(s, status="evaluation", advantage=math.nan, weight=math.nan) for s in chosen]
    return with_prompts(chosen, plan.task)


def refuse_other_vocabulary(checkpoint: Checkpoint, rollouts: Rollouts) -> None:
    """Raises UserError for sequences with tokens that the policy does not have."""
    get = getattr(checkpoint.model, "get_input_embeddings", None)
    count = None if get is None else int(get().weight.shape[0])
    largest = max((t for ids in (*rollouts.prompt_ids, *rollouts.completion_ids) for t in ids), default=0)
    if count is not None and largest >= count:
        raise UserError(
            f"sequences to be analysed with {checkpoint.record.path} have the token {largest}, the policy has {count}: what "
            "the run recorded is damaged, or of another model's run; copy its rollouts again"
        )


def with_prompts(recorded: Sequence[RolloutSequence], task: Task) -> Rollouts:
    """Recorded sequences with the task's rows, which a run does not record.

    Raises:
        UserError: a prompt that the task does not have.
    """
    known = {row["prompt_index"]: row for row in [*task.train, *task.heldout]}
    unknown = next((s for s in recorded if s.prompt_index not in known), None)
    if unknown is not None:
        raise UserError(
            f"the rollouts of step {unknown.step} name prompt {unknown.prompt_index}, which the task does not have: tasks differ"
        )
    rows = [known[s.prompt_index] for s in recorded]
    return Rollouts(tuple(recorded)).with_values(prompt_row=rows, prompt=[prompt_text(row["prompt"]) for row in rows])
