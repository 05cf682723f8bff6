"""A filtered training buffer: prompts by difficulty, groups without reward differences rejected and
refilled.

Such groups give no gradient: their advantages are all zero. See docs/theory/double-sampling.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rl_training.errors import UserError
from rl_training.sampling import Rollouts, SamplingConfig, draw, score
from rl_training.tasks.difficulty import PassRates


@dataclass
class CollectionCounts:
    """Everything a filtered collection generated, and what became of it (numbers of sequences;
    rounds are rounds).
    """

    rounds: int = 0
    generated: int = 0
    rejected: int = 0
    filler: int = 0
    kept: int = 0


@dataclass(frozen=True)
class FilterRules:
    """How groups are chosen: prompts by difficulty or evenly, groups without gradient rejected or
    kept, rounds of refilling.
    """

    difficulty_weighting: bool = True
    reject_zero_advantage: bool = True
    max_refill_rounds: int = 2


def has_reward_differences(rewards: Sequence[float]) -> bool:
    """Whether a group gives any gradient: its advantages are all zero exactly when its rewards are
    all equal.

    NaN marks completions that could not be scored; their advantage is zero, and they are left out.
    """
    known = [r for r in rewards if not math.isnan(r)]
    return bool(known) and max(known) - min(known) > 1e-9


def collect_filtered(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward_functions: Sequence[Callable[..., Any]],
    pass_rates: PassRates,
    prompts: int,
    completions_per_prompt: int,
    sampling_config: SamplingConfig,
    seed: int,
    rules: FilterRules = FilterRules(),
    trainer_state: Any = None,
) -> tuple[Rollouts, CollectionCounts]:
    """A training buffer of up to `prompts` groups that give gradient, in up to 1 +
    max_refill_rounds rounds.

    Unlike the trainer's buffer it holds no filler: where refilling ran out it is smaller.

    Args:
        rows: the task's rows that may be drawn.
        pass_rates: of these rows; updated by what is drawn.
        prompts: groups wanted.
        completions_per_prompt: sequences of a group.
        seed: of prompts and completions.
        trainer_state: as the reward functions are to see it.

    Returns:
        The buffer, and what was generated for it.

    Raises:
        UserError: no group at all has differing rewards.
    """
    buffer, counts, seen = [], CollectionCounts(), []
    while counts.rounds <= rules.max_refill_rounds and (missing := prompts - counts.kept // completions_per_prompt) > 0:
        rng = np.random.default_rng((seed, counts.rounds))
        drawn, _ = pass_rates.draw(missing, rng, exclude=seen, weighted=rules.difficulty_weighting)
        seen.extend(drawn)
        part = draw(
            model, tokenizer, [rows[i] for i in drawn], completions_per_prompt, sampling_config,
            seed + 7919 * (counts.rounds + 1), "trained",  # a stream of its own for every round
        )  # fmt: skip
        part = score(part, reward_functions, trainer_state)
        counts.rounds += 1
        counts.generated += len(part)
        for group, row in enumerate(drawn):
            members = range(group * completions_per_prompt, (group + 1) * completions_per_prompt)
            rewards = [math.nan if (reward := part.reward[i]) is None else reward for i in members]
            pass_rates.update(row, rewards)
            if rules.reject_zero_advantage and not has_reward_differences(rewards):
                counts.rejected += len(rewards)
                continue
            buffer += part.select(members)
            counts.kept += len(rewards)
    if not buffer:
        raise UserError(
            f"no prompt with mixed rewards among {counts.generated} completions in {counts.rounds} rounds: every group is all "
            "right or all wrong, so there is no gradient to analyse; choose an earlier checkpoint, an easier or harder "
            "task, more completions per prompt or more refill rounds"
        )
    return Rollouts(tuple(buffer)), counts
