"""What the entropy is, from noisy looks at it and from predictions of each step that are a little off.

    expected   e_t = h_{t-1} + d_{t-1} + b_{t-1}          d: predicted change of the step, b: its running bias
    seen       y_t = x_t - o_t                            x: on the step's own completions, which are many and new at every step
    offset     o_t = o_{t-1} + w_t (x_t - z_t - o_{t-1})  z: on sequences of held-out prompts, few and the same for some steps
    level      h_t = e_t + k (y_t - e_t)
    bias       b_t = b_{t-1} + i (y_t - e_t) , |b| <= limit

The level is that of held-out prompts: what a trainer draws by difficulty, or drops, is in the offset, which is learned slowly
(w_t falls to 0.02). The bias is the integral term: first-order predictions leave out curvature and what momentum and P do later.
Source: alpha-beta filter, Bar-Shalom, Li & Kirubarajan 2001, 6.5.
"""

from __future__ import annotations

import math
from typing import Any

_SLOWEST, _AT_FIRST = 0.02, 10


class EntropyLevel:
    """Give it every look at the entropy, and after each the change that the coming step is predicted to make.

    Args:
        gain, bias_gain: k and i. bias_limit: nats per token and step.
    """

    def __init__(self, gain: float, bias_gain: float, bias_limit: float) -> None:
        self._gain, self._bias_gain, self._bias_limit = gain, bias_gain, bias_limit
        self.value: float | None = None
        """Nats per token; None before the first look."""
        self.bias = 0.0
        """Nats per token and step."""
        self._offset = self._predicted = 0.0
        self._looks = 0

    def see(self, held: float, own: float = math.nan) -> float:
        """Take in a look before a step, and return the level; what is not finite changes nothing.

        Args:
            held: of sequences of held-out prompts, nats per token.
            own: of the step's own completions; NaN where they are not known.
        """
        seen = held
        if math.isfinite(own):
            if math.isfinite(held):
                self._offset += max(_SLOWEST, 1 / (self._looks + _AT_FIRST)) * (own - held - self._offset)
                self._looks += 1
            seen = own - self._offset
        if self.value is None:
            self.value = seen if math.isfinite(seen) else None
        else:
            expected = self.value + self._predicted + self.bias
            surprise = seen - expected if math.isfinite(seen) else 0.0
            self.value = expected + self._gain * surprise
            limit = self._bias_limit
            self.bias = min(limit, max(-limit, self.bias + self._bias_gain * surprise))
        self._predicted = 0.0
        return math.nan if self.value is None else self.value

    def expect(self, change: float) -> None:
        """The coming step is predicted to change entropy by this, nats per token."""
        self._predicted = change

    def state(self) -> dict[str, Any]:
        """For `load`."""
        numbers = {"value": self.value, "bias": self.bias, "predicted": self._predicted}
        return {**numbers, "offset": self._offset, "looks": self._looks}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.value, self.bias, self._predicted = state["value"], state["bias"], state["predicted"]
        self._offset, self._looks = state["offset"], state["looks"]
