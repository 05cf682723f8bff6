"""What did a unit of reward cost in entropy?

    price = -(h_b - h_a) / (R_b - R_a)       nats per token for one more of mean reward; positive: reward was paid in entropy

between two checkpoints, on the evaluation prompts that both have; the standard error is a jackknife over these prompts, of the
ratio as a whole. A ratio whose denominator is not significantly different from 0 says nothing: where the 95% interval of
R_b - R_a holds 0 the price is None. docs/analyses/evolution.md.
"""

from __future__ import annotations

import numpy as np

from entropy_experiments.records.estimates import NO_ESTIMATE
from entropy_experiments.records.evolution import RewardPrice
from entropy_experiments.records.zero_or_one import change_of_zeros_and_ones
from entropy_experiments.statistics.confidence import NOT_FROM_ZERO
from entropy_experiments.sweep.evolution.left_out_prompts import entropy_at, jackknifed, reward_at


def price_between(sums: np.ndarray, a: int, b: int, binary: bool = False) -> RewardPrice:
    """The price between checkpoints a and b of (K, len(SUMS), B) `prompt_sums`, or why there is none.

    binary: whether all rewards are 0 or 1, whose means change by no more than 1.
    """
    entropy = jackknifed(lambda totals: entropy_at(b)(totals) - entropy_at(a)(totals), sums)
    reward = jackknifed(lambda totals: reward_at(b)(totals) - reward_at(a)(totals), sums)
    if binary:
        reward = change_of_zeros_and_ones(reward)

    def no_price(reason: str) -> RewardPrice:
        return RewardPrice(entropy_change=entropy, reward_change=reward, price=NO_ESTIMATE, reason=reason)

    changed = reward.known()
    if changed is None or entropy.value is None:
        return no_price("entropy or reward is not known at both checkpoints")
    if changed.holds_zero is not False:
        return no_price(f"the change of mean reward, {changed.text()}, {NOT_FROM_ZERO}")

    def price(totals: np.ndarray) -> float:
        change = reward_at(b)(totals) - reward_at(a)(totals)
        return -(entropy_at(b)(totals) - entropy_at(a)(totals)) / change

    return RewardPrice(entropy_change=entropy, reward_change=reward, price=jackknifed(price, sums), reason=None)
