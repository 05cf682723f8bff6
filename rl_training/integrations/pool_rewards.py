"""Rewards of sequences that the probe drew, by the trainer's own reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.sampling import Rollouts, score
from rl_training.sequences import RolloutSequence


def rewards_of(trainer: Any, sequences: Sequence[RolloutSequence], rows: Sequence[dict[str, Any]]) -> Tensor | None:
    """(N,) float64, weighted and summed as the trainer does; None where a reward is a model, or a completion is not judged.

    Args:
        rows: of each sequence, the prompt's.
    """
    functions = list(getattr(trainer, "reward_funcs", []))
    if not functions or any(isinstance(function, nn.Module) for function in functions):
        return None
    coder = text_tokenizer(trainer.processing_class)
    texts = coder.batch_decode([list(s.completion_ids) for s in sequences], skip_special_tokens=True)
    known = [replace(s, completion=t, prompt_row=row) for s, t, row in zip(sequences, texts, rows, strict=True)]
    found = [score(Rollouts(tuple(known)), [function], trainer.state).reward for function in functions]
    values = torch.tensor([[torch.nan if r is None else r for r in each] for each in found], dtype=torch.float64)
    judged = ~values.isnan()
    weights = trainer.reward_weights.detach().cpu().double()[:, None]
    return (values.nan_to_num() * weights).sum(0) if bool(judged.any(0).all()) else None
