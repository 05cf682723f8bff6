"""What did a unit of reward cost in entropy?

    price = -(h_b - h_a) / (R_b - R_a)       nats per token for one more of mean reward; positive: reward was paid in entropy

between two checkpoints, on the evaluation prompts that both have; the standard error is a jackknife over these prompts, of the
ratio as a whole. A ratio whose denominator cannot be told from 0 says nothing: where the 95% interval of R_b - R_a holds 0 the
price is None. docs/analyses/evolution.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from entropy_experiments.statistics.agreement import told_from_zero
from entropy_experiments.sweep.evolution.left_out_prompts import entropy_at, jackknifed, reward_at
from entropy_experiments.text.numbers import plus_minus


def price_between(sums: np.ndarray, a: int, b: int) -> dict[str, Any]:
    """{"entropy_change", "reward_change", "price": each {"value", "standard_error"}, "reason"}; sums: (K, len(SUMS), B)."""
    entropy = jackknifed(lambda totals: entropy_at(b)(totals) - entropy_at(a)(totals), sums)
    reward = jackknifed(lambda totals: reward_at(b)(totals) - reward_at(a)(totals), sums)
    result: dict[str, Any] = {"entropy_change": entropy, "reward_change": reward}
    nothing = {"value": None, "standard_error": None}
    value, error = reward["value"], reward["standard_error"]
    if value is None or entropy["value"] is None:
        return result | {"price": nothing, "reason": "entropy or reward is not known at both checkpoints"}
    if not told_from_zero(value, error, max(1, sums.shape[-1] - 1)):
        reason = f"the change of mean reward, {plus_minus(value, error)}, cannot be told from 0"
        return result | {"price": nothing, "reason": reason}

    def price(totals: np.ndarray) -> float:
        change = reward_at(b)(totals) - reward_at(a)(totals)
        return -(entropy_at(b)(totals) - entropy_at(a)(totals)) / change

    return result | {"price": jackknifed(price, sums), "reason": None}
