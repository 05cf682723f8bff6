"""What the entropy is, from noisy looks at it and from predictions of each step that are a little off.

    expected   e_t = h_{t-1} + d_{t-1} + b_{t-1}          d: predicted change of the step, b: its running bias
    seen       y_t = x_t - o_t                            x: on the step's own completions; o: their offset (offset.py)
    level      h_t = e_t + k (y_t - e_t)
    bias       b_t = b_{t-1} + i (y_t - e_t) , |b| <= limit

Where no own completions are known, y is the look at held-out sequences. The bias: first-order predictions leave out curvature.
Source: alpha-beta filter, Bar-Shalom, Li & Kirubarajan 2001, 6.5.
"""

from __future__ import annotations

import math
from typing import Any

from rl_training.control.offset import OwnOffset


class EntropyLevel:
    """Give it every look at the entropy, and after each the change that the coming step is predicted to make.

    Args:
        gain, bias_gain: k and i. bias_limit: nats per token and step.
        lasting: steps for which held-out sequences stay.
    """

    def __init__(self, gain: float, bias_gain: float, bias_limit: float, lasting: int) -> None:
        self._gain, self._bias_gain, self._bias_limit = gain, bias_gain, bias_limit
        self.value: float | None = None
        """Nats per token; None before the first look."""
        self.bias = 0.0
        """Nats per token and step."""
        self._offset, self._predicted = OwnOffset(lasting), 0.0

    def see(self, held: float, standard_error: float = math.nan, own: float = math.nan) -> float:
        """Take in a look before a step, and return the level; what is not finite changes nothing.

        Args:
            held: of sequences of held-out prompts, nats per token, with its standard error.
            own: of the step's own completions; NaN where they are not known.
        """
        self._offset.learn(own, held, standard_error)
        seen = own - self._offset.value if math.isfinite(own) else held
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
        return {"value": self.value, "bias": self.bias, "predicted": self._predicted, **self._offset.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.value, self.bias, self._predicted = state["value"], state["bias"], state["predicted"]
        self._offset.load(state)
