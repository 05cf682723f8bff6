"""What did a unit of reward cost in entropy?

    price = -(h_b - h_a) / (R_b - R_a)       nats per token for one more of mean reward; positive: reward was paid in entropy

between two checkpoints, on the evaluation prompts that both have; the standard error is a jackknife over these prompts, of the
ratio as a whole. A ratio whose denominator is not significantly different from 0 says nothing: where the 95% interval of
R_b - R_a holds 0 the price is None. docs/analyses/evolution.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from entropy_experiments.statistics.confidence import NOT_FROM_ZERO, known
from entropy_experiments.sweep.evolution.left_out_prompts import entropy_at, jackknifed, reward_at


def price_between(sums: np.ndarray, a: int, b: int) -> dict[str, Any]:
    """{"entropy_change", "reward_change", "price": each {"value", "standard_error", "degrees_of_freedom"}, "reason"}.

    sums: (K, len(SUMS), B).
    """
    entropy = jackknifed(lambda totals: entropy_at(b)(totals) - entropy_at(a)(totals), sums)
    reward = jackknifed(lambda totals: reward_at(b)(totals) - reward_at(a)(totals), sums)
    result: dict[str, Any] = {"entropy_change": entropy, "reward_change": reward}
    nothing = {"value": None, "standard_error": None, "degrees_of_freedom": None}
    if reward["value"] is None or entropy["value"] is None:
        return result | {"price": nothing, "reason": "entropy or reward is not known at both checkpoints"}
    changed = known(reward)
    if changed is None or changed.holds_zero is not False:
        reason = f"the change of mean reward, {changed.text()}, {NOT_FROM_ZERO}"
        return result | {"price": nothing, "reason": reason}

    def price(totals: np.ndarray) -> float:
        change = reward_at(b)(totals) - reward_at(a)(totals)
        return -(entropy_at(b)(totals) - entropy_at(a)(totals)) / change

    return result | {"price": jackknifed(price, sums), "reason": None}
