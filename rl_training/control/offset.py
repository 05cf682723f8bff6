"""How much more entropy a step's own completions have than sequences of held-out prompts, as far as that is certain.

    o_t   = o_{t-1} + w_t (x_t - z_t - o_{t-1})          x: own completions, z: held-out sequences;  w_t falls to 0.01
    s_t^2 = (1 - w_t)^2 s_{t-1}^2 + w_t^2 K se_t^2       se: of z, whose sequences stay for some steps: K of them count as one
    used  = o_t max(0, 1 - (2 s_t / o_t)^2)

Own completions are many and new at every step; held-out sequences are few. A trainer that draws its prompts by difficulty,
or drops some, sees another entropy than held-out prompts have; most do not, and an offset that is not told from 0 would only
move the level by its own error. So it is shrunk, to 0 within two standard errors.
Source: positive-part shrinkage, Efron & Morris 1973.
"""

from __future__ import annotations

import math
from typing import Any

_SLOWEST, _AT_FIRST = 0.01, 10


class OwnOffset:
    """Learn the offset from pairs of looks.

    Args:
        lasting: K, steps for which held-out sequences stay.
    """

    def __init__(self, lasting: int) -> None:
        self._lasting = lasting
        self._mean = self._variance = 0.0
        self._looks = 0

    def learn(self, own: float, held: float, standard_error: float) -> None:
        """Take in a look at both, nats per token; what is not finite changes nothing."""
        if not all(map(math.isfinite, (own, held, standard_error))):
            return
        weight = max(_SLOWEST, 1 / (self._looks + _AT_FIRST))
        self._mean += weight * (own - held - self._mean)
        self._variance = (1 - weight) ** 2 * self._variance + weight**2 * self._lasting * standard_error**2
        self._looks += 1

    @property
    def value(self) -> float:
        """The offset to be taken off own completions, nats per token."""
        if self._mean == 0.0:
            return 0.0
        return self._mean * max(0.0, 1 - 4 * self._variance / self._mean**2)

    def state(self) -> dict[str, Any]:
        """For `load`."""
        return {"mean": self._mean, "variance": self._variance, "looks": self._looks}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._mean, self._variance, self._looks = state["mean"], state["variance"], state["looks"]
