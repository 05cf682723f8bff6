"""The integral term of the controller: what its plans get wrong step after step.

    z_t = z_{t-1} + (h_t - tau_t) / 4N ,   |z| <= limit

A plan that makes good 1/N of a distance at every step, and is wrong by d at every step, settles N d from the target; with z
in the plan it settles on it. 1 / 4N damps that loop critically: s^2 + s/N + 1/(4 N^2) = (s + 1/2N)^2.
Source: PI control with conditional integration, Astrom & Hagglund 2006, 3.5.
"""

from __future__ import annotations

import math


class MissedDistance:
    """Sum up the distance from the target at every step.

    Args:
        horizon: N, steps. limit: nats per token.
    """

    def __init__(self, horizon: int, limit: float) -> None:
        self._horizon, self._limit = horizon, limit
        self.value = 0.0
        """z, nats per token: how much further than to the target a plan has to go, downwards."""

    def sum_up(self, distance: float, counts: bool) -> None:
        """Take in h - tau, nats per token.

        Args:
            counts: whether the plan was free to close the distance; one that was cut to a bound would be made good a second time.
        """
        if counts and math.isfinite(distance):
            self.value = min(self._limit, max(-self._limit, self.value + distance / (4 * self._horizon)))
