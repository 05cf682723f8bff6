"""What a policy is at a step: entropy, reward and diversity on fresh completions of held-out prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.study.tasks import Task, right
from entropy_core.scores import token_statistics
from rl_training.generation.rollout_sequences import to_batch
from rl_training.probe.observation import Observation
from rl_training.sampling import draw, make_sampling_config

PASS_AT = (1, 4, 16)


@dataclass(frozen=True)
class HeldOut:
    """What `look` asks of a task that is none of the study's."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    longest: int

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self.train, self.heldout


def look(model: Any, tokenizer: Any, task: Task | HeldOut, prompts: int, each: int, seed: int) -> dict[str, float]:
    """`each` completions of every one of the first `prompts` held-out prompts.

    Returns:
        entropy and its standard error (nats per token), reward, tokens a completion; with several completions of a prompt pass@k
        and the part of a prompt's completions that are distinct.
    """
    rows = [{**row, "prompt_index": i} for i, row in enumerate(task.rows()[1][:prompts])]
    config = make_sampling_config(model, tokenizer, 1.0, task.longest)
    drawn = draw(model, tokenizer, rows, each, config, seed, "evaluation")
    batch = to_batch(list(drawn), config)
    with torch.no_grad():
        entropy = Observation(batch, token_statistics(model, batch), None).entropy()
    rewards = right(drawn.completion, [row["answer"] for row in rows for _ in range(each)])
    found = {
        "entropy": entropy.value,
        "entropy_se": entropy.standard_error,
        "reward": float(np.mean(rewards)),
        "tokens": float(batch.completion_lengths.double().mean()),
    }
    if each > 1:
        texts = np.array(drawn.completion, dtype=object).reshape(prompts, each)
        correct = np.array(rewards).reshape(prompts, each).sum(1)
        found["distinct"] = float(np.mean([len(set(some)) / each for some in texts]))
        found |= {f"pass_at_{k}": _pass_at(correct, each, k) for k in PASS_AT if k <= each}
    return found


def _pass_at(correct: np.ndarray, each: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), the mean over prompts (Chen et al. 2021)."""
    none = [math.comb(int(each - c), k) / math.comb(each, k) for c in correct]
    return float(1 - np.mean(none))
