"""The 95% interval of a mean of zeros and ones: it stays within 0 and 1, and is not a point where all of them are alike.

    n = p (1 - p) / se^2                          independent draws that the jackknife error is worth, between 1 and N
    (p + t^2/2n -+ t sqrt(p (1 - p)/n + t^2/4n^2)) / (1 + t^2/n)

With p = 0 or 1, or an error of 0, n is the number of prompts. Source: Wilson 1927; Korn & Graubard 1998 for n and t.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from entropy_experiments.records.estimates import Estimate
from rl_training.intervals import t_quantile


def zeros_and_ones(numbers: Iterable[float]) -> bool:
    """Whether there are numbers, and all of them are 0 or 1."""
    found = set(numbers)
    return bool(found) and found <= {0.0, 1.0}


def of_zeros_and_ones(mean: Estimate, sequences: int, prompts: int) -> Estimate:
    """A mean of zeros and ones with Wilson's interval in place of the jackknife's; without an error as it is.

    Args:
        mean: with its jackknife over prompts.
        sequences: how many numbers it is the mean of.
        prompts: how many prompts they are of.
    """
    p, error = mean.value, mean.standard_error
    if p is None or error is None or prompts < 2:
        return mean
    spread = p * (1 - p)
    draws = min(max(spread / error**2, 1.0), float(sequences)) if spread > 0 and error > 0 else float(prompts)
    freedom = prompts - 1 if mean.degrees_of_freedom is None or error == 0 else mean.degrees_of_freedom
    share = t_quantile(freedom) ** 2 / draws
    middle = (p + share / 2) / (1 + share)
    reach = np.sqrt(share * spread + share**2 / 4) / (1 + share)
    low, high = min(max(0.0, middle - reach), p), max(min(1.0, middle + reach), p)
    return mean.model_copy(update={"low": float(low), "high": float(high), "degrees_of_freedom": float(freedom)})


def change_of_zeros_and_ones(change: Estimate) -> Estimate:
    """The change of such a mean: no end beyond -1 and 1, and no interval where no prompt differs from another."""
    if change.standard_error == 0.0:
        return change.model_copy(update={"low": None, "high": None})
    if change.low is None or change.high is None:
        return change
    return change.model_copy(update={"low": max(change.low, -1.0), "high": min(change.high, 1.0)})
