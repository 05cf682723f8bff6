"""Over how many steps of the optimizer one measurement goes: as many as were asked for, fewer while the policy moves fast.

The pass after the last step of a span is the pass before the first of the next, so that a longer span costs less and leaves no
step out. It must not be too long: where fewer than CALM of the sequences would count after it, drawn before it and weighted to
the policy after, the next is of one step, and from there on spans grow again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CALM, CALMER = 2 / 3, 3 / 4
"""Part of the sequences that must count over a span, and beyond which the next may be twice as long (by replay)."""


class Spans:
    """`begin` before a step, `took` after each, `end` when it was measured.

    Args:
        longest: steps.
    """

    def __init__(self, longest: int) -> None:
        self._longest = self._length = longest
        self.taken = 0
        """Steps of the span that is open."""
        self.open = False

    def begin(self) -> None:
        """Before a step from which on the change is measured."""
        self.open, self.taken = True, 0

    def took(self) -> bool:
        """After a step of the optimizer: whether the span is as long as it is to be."""
        self.taken += 1
        return self.open and self.taken >= self._length

    def end(self, counting: float) -> None:
        """After the measurement. counting: part of the sequences that count over it."""
        self.open = False
        if counting < CALM:
            self._length = 1
        elif counting > CALMER:
            self._length = min(self._longest, 2 * self._length)

    def drop(self) -> None:
        """Without a measurement."""
        self.open = False

    def shorten(self) -> None:
        """From now on every span is one step."""
        self._longest = self._length = 1

    def state(self) -> dict[str, Any]:
        """Between two spans."""
        return {"length": self._length}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError."""
        length = state.get("length")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError("the length of a span must be a number of steps")
        self.drop()
        self._length = min(length, self._longest)
