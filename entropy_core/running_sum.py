"""The error of a sum of estimates that share some of their sampling units from one step to the
next.

    Var sum_s x_s = sum_i ( sum_s d_si )^2        d_si = sqrt((B - 1)/B) (x_s without unit i - their mean)

i runs over units (prompts, or sequences that are watched for several steps); a unit that is in no
further step has said all that it will. For one step this is the jackknife over its B units; where
no unit is shared it is the sum of the steps' variances.
Source: docs/theory/entropy-critic.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from entropy_core.uncertainty import Estimate


class RunningSum:
    """Give it one step's estimate after the other."""

    def __init__(self) -> None:
        self._value = self._variance = self._fourth = 0.0
        self._live: dict[str, float] = {}
        self._known = True

    def add(self, value: float, left_out: Tensor, units: Sequence[str]) -> Estimate:
        """Take in a step.

        Args:
            value: its estimate.
            left_out: (B,) the estimate without each unit.
            units: (B,) a name for each unit, the same in every step in which it is.

        Returns:
            The sum so far; without an error where a step had fewer than two units.
        """
        count = len(left_out)
        if count != len(units):
            raise ValueError(f"{count} left-out values, but {len(units)} units")
        self._value += value
        self._known = self._known and count > 1
        deviations = (left_out.double() - left_out.double().mean()) * math.sqrt((count - 1) / count)
        here = {unit: self._live.get(unit, 0.0) for unit in units}
        for unit, deviation in zip(units, deviations.tolist(), strict=True):
            here[unit] += deviation
        for unit, deviation in self._live.items():
            if unit not in here:
                self._variance += deviation**2
                self._fourth += deviation**4
        self._live = here
        return self.now()

    def now(self) -> Estimate:
        """The sum so far."""
        if not self._known:
            return Estimate(self._value)
        variance = self._variance + sum(d**2 for d in self._live.values())
        fourth = self._fourth + sum(d**4 for d in self._live.values())
        # Of equal normal deviations the mean fourth power is three squared variances: their number
        # less one is left.
        freedom = max(1.0, 3 * variance**2 / fourth - 1) if fourth > 0 else math.inf
        return Estimate(self._value, math.sqrt(variance), freedom)

    def state(self) -> dict[str, Any]:
        """Numbers and names, for `load`."""
        parts = {"value": self._value, "variance": self._variance, "fourth": self._fourth, "known": self._known}
        return {**parts, "live": dict(self._live)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError for anything but what `state` gives."""
        if not isinstance(state, Mapping):
            raise ValueError("a running sum is recorded as something that is no object")
        numbers = [state.get(name) for name in ("value", "variance", "fourth")]
        live = state.get("live")
        if not isinstance(live, Mapping) or not isinstance(state.get("known"), bool):
            raise ValueError("a running sum is incomplete")
        for number in [*numbers, *live.values()]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError("a running sum holds what is not a number")
        value, variance, fourth = (float(number) for number in numbers if number is not None)
        if variance < 0 or fourth < 0:
            raise ValueError("a running sum's variance is negative")
        self._value, self._variance, self._fourth, self._known = value, variance, fourth, bool(state["known"])
        self._live = {str(unit): float(deviation) for unit, deviation in live.items()}
