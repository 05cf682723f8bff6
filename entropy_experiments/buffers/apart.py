"""Whether the two sides of an analysis are apart: no prompt in both unasked, and no sequence that
stands for the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from entropy_experiments.config import BuffersConfig
from rl_training.errors import UserError
from rl_training.sampling import Rollouts


def require_other_prompts(rows: Sequence[dict[str, Any]], training: Rollouts, sampling: BuffersConfig) -> None:
    """Raises UserError where task rows of the evaluation buffer are prompts of the training buffer."""
    shared = {int(row["prompt_index"]) for row in rows} & set(training.prompt_index)
    if not shared:
        return
    source = sampling.train_sequences_path or (
        "the run's own buffer" if sampling.train_prompts == "from_run" else "the training buffer"
    )
    remedy = "draw that from held-out prompts (eval_split=heldout)"
    if sampling.eval_sequences_path is not None:
        remedy = f"take {'them' if len(shared) > 1 else 'it'} out of {sampling.eval_sequences_path}"
    more = f" ({len(shared)} such prompts)" if len(shared) > 1 else ""
    raise UserError(
        f"{source} holds prompt {min(shared)}, which the evaluation buffer has too{more}: {remedy}, or say that they are to be "
        "shared (same_prompts=true)"
    )


def require_other_sequences(evaluation: Rollouts, training: Rollouts, sampling: BuffersConfig) -> None:
    """Raises UserError where given rows have the columns' prompts unasked, or are the columns and
    stand for the policy.
    """
    if sampling.eval_sequences_path is None:
        return
    if not sampling.same_prompts and (
        shared := {*map(tuple, evaluation.prompt_ids)} & {*map(tuple, training.prompt_ids)}
    ):
        raise UserError(
            f"{len(shared)} prompts of {sampling.eval_sequences_path} are in the training buffer too, token by token: take them "
            "out of one side, or say that they are to be shared (same_prompts=true)"
        )
    columns = {(*p, -1, *c) for p, c in zip(training.prompt_ids, training.completion_ids, strict=True)}
    rows = [(*p, -1, *c) for p, c in zip(evaluation.prompt_ids, evaluation.completion_ids, strict=True)]
    same = sum(row in columns for row in rows)
    if sampling.eval_sequences_drawn and same > len(rows) * 0.9:
        raise UserError(
            f"{same} of {len(rows)} sequences of {sampling.eval_sequences_path} are in the training buffer too: a step looks "
            "better on its own sequences than on any others (docs/theory/double-sampling.md); give others, such as another "
            "step's (eval_sequences_step)"
        )
