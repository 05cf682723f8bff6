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

from rl_training.errors import UserError
from rl_training.sampling import Policy, Rollouts, draw
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


@dataclass(frozen=True)
class GroupsWanted:
    """How many groups that give gradient, and how many completions of one prompt each is."""

    prompts: int
    completions_per_prompt: int


def has_reward_differences(rewards: Sequence[float]) -> bool:
    """Whether a group gives any gradient: its advantages are all zero exactly when its rewards are
    all equal.

    NaN marks completions that could not be scored; their advantage is zero, and they are left out.
    """
    known = [r for r in rewards if not math.isnan(r)]
    return bool(known) and max(known) - min(known) > 1e-9


def collect_filtered(
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    judge: Callable[[Rollouts], Rollouts],
    pass_rates: PassRates,
    wanted: GroupsWanted,
    seed: int,
    rules: FilterRules = FilterRules(),
) -> tuple[Rollouts, CollectionCounts]:
    """A training buffer of up to as many groups as are wanted, in up to 1 + max_refill_rounds rounds.

    Unlike the trainer's buffer it holds no filler: where refilling ran out it is smaller.

    Args:
        policy: Draws the completions.
        rows: The task's rows that may be drawn.
        judge: Rollouts with their rewards.
        pass_rates: Of these rows; updated by what is drawn.
        wanted: Number and size of groups.
        seed: Of prompts and completions.
        rules: Which prompts are drawn, and which groups are kept.

    Returns:
        The buffer, and what was generated for it.

    Raises:
        UserError: No group at all has differing rewards.
    """
    buffer, counts, seen, each = [], CollectionCounts(), [], wanted.completions_per_prompt
    while counts.rounds <= rules.max_refill_rounds and (missing := wanted.prompts - counts.kept // each) > 0:
        rng = np.random.default_rng((seed, counts.rounds))
        drawn, _ = pass_rates.draw(missing, rng, exclude=seen, weighted=rules.difficulty_weighting)
        seen.extend(drawn)
        stream = seed + 7919 * (counts.rounds + 1)  # one of its own for every round
        chosen = [rows[i] for i in drawn]
        part = judge(draw(policy.model, policy.tokenizer, chosen, each, policy.sampling_config, stream, "trained"))
        counts.rounds += 1
        counts.generated += len(part)
        for group, row in enumerate(drawn):
            members = range(group * each, (group + 1) * each)
            rewards = [math.nan if (reward := part.reward[i]) is None else reward for i in members]
            pass_rates.update(row, rewards)
            if rules.reject_zero_advantage and not has_reward_differences(rewards):
                counts.rejected += each
                continue
            buffer += part.select(members)
            counts.kept += each
    if not buffer:
        raise UserError(
            f"no prompt with mixed rewards among {counts.generated} completions in {counts.rounds} rounds: every group is all "
            "right or all wrong, so there is no gradient to analyse; choose an earlier checkpoint, an easier or harder "
            "task, more completions per prompt or more refill rounds"
        )
    return Rollouts(tuple(buffer)), counts
