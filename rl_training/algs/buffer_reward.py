"""Mean reward of all prompts, from a step's first round of generation, before any group was left
out, with its error.

    R = sum_g r_g / p_g  /  sum_g 1 / p_g          r_g: mean reward of group g, p_g: how likely its prompt was to be in the draw
    se: jackknife over groups

Under difficulty weighting prompts are drawn that are solved half the time, whatever the policy can
do: their plain mean stays near one half, and says nothing of training. The weights undo that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NAME = "reward_all_prompts"


def reward_of_all_prompts(rewards: Sequence[float], draw_probabilities: Sequence[float]) -> dict[str, float]:
    """ "reward_all_prompts" with "_se" and "_df" (degrees of freedom); empty without a reward, no
    error for a single group.

    Args:
        rewards: mean of each group, NaN where none of its completions could be scored; such groups
            count nowhere.
    """
    known = [(r, p) for r, p in zip(rewards, draw_probabilities, strict=True) if not math.isnan(r)]
    if not known:
        return {}
    values, weights = np.array([r for r, _ in known]), 1.0 / np.array([p for _, p in known])
    sums, total = values * weights, float(weights.sum())
    found = {NAME: float(sums.sum() / total)}
    count = len(known)
    if count > 1:
        left_out = (sums.sum() - sums) / (total - weights)
        spread = float(np.square(left_out - left_out.mean()).sum())
        found |= {f"{NAME}_se": math.sqrt((count - 1) / count * spread), f"{NAME}_df": float(count - 1)}
    return found
