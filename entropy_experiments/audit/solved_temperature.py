"""The temperature at which entropy would be what was logged, kept where it is a round number or the
same at several steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from entropy_experiments.audit.causes import Window
from entropy_experiments.audit.token_definitions import TokenDefinition

_LOWEST, _HIGHEST, _HALVINGS = 0.05, 8.0, 24
_CLEAR = 10.0  # tolerances


def solve_temperature(
    right: TokenDefinition, value: Callable[[TokenDefinition, range], float], windows: Sequence[Window]
) -> float | None:
    """A temperature that gives the logged value at every window: of two decimals, or else solved
    for where two windows or more agree on it and no smaller story fits them.

    None where there is none.
    """
    if not windows or right.quantity != "entropy":
        return None

    def off(temperature: float, window: Window) -> float:
        return value(replace(right, temperature=temperature), window.steps) - window.logged

    first = windows[0]
    low, high = _LOWEST, _HIGHEST
    if not off(low, first) < 0 < off(high, first):  # entropy rises with temperature
        return None
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if off(middle, first) < 0 else (low, middle)
    solved = math.sqrt(low * high)
    for candidate in (round(solved, 1), round(solved, 2), solved):
        fits = candidate > 0 and all(abs(off(candidate, w)) <= w.tolerance for w in windows)
        if fits and (candidate is not solved or _tells(windows)):
            return candidate
    return None


def _tells(windows: Sequence[Window]) -> bool:
    """Whether the numbers say more than one free parameter: a temperature fits any one of them, and
    any small constant error.
    """
    off = [w.logged - w.right for w in windows]
    coarse = max(w.tolerance for w in windows)
    return len(windows) > 1 and max(off) - min(off) > _CLEAR * coarse and min(map(abs, off)) > _CLEAR * coarse
