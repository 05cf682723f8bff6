"""Which other definition gives the numbers that were logged: single changes first, then pairs, and
nothing beyond what they show.

A change is a cause where it gives the logged value, within the number's own precision, at every
window where log and recomputation differ, and gives another value there than the right definition
does. Pairs are tried where no single change does. With many alternatives, or coarsely written
numbers, some will agree by accident: how many to expect is estimated from how densely the
alternatives lie around the logged value, and a cause that is no better than an accident is not
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from rl_training.errors import UserError

# Expected number of accidental agreements above which nothing is said to be the cause.
_ACCIDENTS = 0.05
# Fields that need a forward pass of their own: no pair of both.
_DEAR = {"policy", "precision"}
_NEIGHBOURHOOD = 20  # tolerances, over which the density of alternatives is taken


@dataclass(frozen=True)
class Window:
    """A logged number.

    Attributes:
        right: recomputed by the definition that the trainer documents.
        tolerance: what precision explains.
        grain: distance between neighbouring values that the number could take at all; 0 where it
            could take any.
    """

    steps: range
    logged: float
    right: float
    tolerance: float
    grain: float = 0.0

    @property
    def differs(self) -> bool:
        return not abs(self.logged - self.right) <= self.tolerance


@dataclass(frozen=True)
class Cause:
    """A definition that gives the logged values.

    Attributes:
        changes: (field, value) against the right definition.
        values: what it gives at each window.
    """

    changes: tuple[tuple[str, Any], ...]
    values: tuple[float, ...]
    accidents: float
    """How many alternatives would be expected to agree this well by accident."""

    @property
    def convincing(self) -> bool:
        return self.accidents <= _ACCIDENTS


Values = Callable[[Any, range], float]
"""(definition, steps) -> value; NaN where it has none."""
Slack = Callable[[Any, range], float]


def where_known(value: Values) -> Values:
    """`value`, NaN where a policy that the definition needs is not there."""

    def known(definition: Any, steps: range) -> float:
        try:
            return value(definition, steps)
        except UserError:
            return math.nan

    return known


def in_words(changes: Sequence[tuple[str, Any]], choices: Mapping[str, Mapping[Any, str]]) -> str:
    """(field, value) pairs by the words of `choices`."""
    return " and ".join(choices[name][value] for name, value in changes)


def exactly(definition: Any, steps: range) -> float:
    """The slack of what can be recomputed."""
    return 0.0


def find_causes(
    right: Any,
    alternatives: Mapping[str, Sequence[Any]],
    value: Values,
    windows: Sequence[Window],
    slack: Slack = exactly,
    pairs_too: bool = True,
) -> list[Cause]:
    """Definitions that give all `windows` (each differs): none, one, or several that these numbers
    cannot tell apart.

    Whether they are causes, `Cause.convincing` says.

    Args:
        alternatives: field -> values other than the right definition's.
        slack: further tolerance of a definition at some steps, for what cannot be recomputed
            exactly.
    """
    singles = [((name, v),) for name, choices in alternatives.items() for v in choices if getattr(right, name) != v]
    found = {changes: _values(right, changes, value, windows) for changes in singles}
    causes = _matching(right, found, windows, slack)
    if causes or not pairs_too:
        return causes
    useful = [s for s in singles if not _only_nan(found[s])]
    pairs = [a + b for a, b in combinations(useful, 2) if a[0][0] != b[0][0] and {a[0][0], b[0][0]} != _DEAR]
    both = {changes: _values(right, changes, value, windows) for changes in pairs}
    # A pair one half of which changes nothing is the other half alone.
    inert = {
        pair
        for pair, values in both.items()
        if any(_equal(values, found[(half,)], windows) for half in pair)
        or _equal(values, [w.right for w in windows], windows)
    }
    return _matching(right, {p: v for p, v in both.items() if p not in inert}, windows, slack)


def _values(right: Any, changes: tuple[tuple[str, Any], ...], value: Values, windows: Sequence[Window]) -> list[float]:
    definition = replace(right, **dict(changes))
    return [value(definition, window.steps) for window in windows]


def _matching(
    right: Any,
    found: Mapping[tuple[tuple[str, Any], ...], list[float]],
    windows: Sequence[Window],
    slack: Slack,
) -> list[Cause]:
    causes = []
    for changes, values in found.items():
        definition = replace(right, **dict(changes))
        at = zip(values, windows, strict=True)
        if all(math.isfinite(v) and _explains(v, w, slack(definition, w.steps)) for v, w in at):
            causes.append(Cause(changes, tuple(values), _accidents(values, list(found.values()), windows)))
    exact = [c for c in causes if all(_explains(v, w, 0.0) for v, w in zip(c.values, windows, strict=True))]
    return exact or causes


def _explains(value: float, window: Window, slack: float) -> bool:
    """Whether it gives the logged number and not the right one."""
    off, shift = abs(value - window.logged), abs(value - window.right)
    if slack > window.tolerance:  # half of the difference at most is left
        return off <= slack and off <= 0.5 * abs(window.logged - window.right) and shift > window.tolerance
    return off <= window.tolerance and shift > window.tolerance


def _accidents(values: Sequence[float], alternatives: Sequence[Sequence[float]], windows: Sequence[Window]) -> float:
    """Expected number of alternatives that come as close as `values` at every window by accident.

    By how densely alternatives lie close to the logged value, and within the size of the difference
    to be explained.
    """
    chance = 1.0
    for place, window in enumerate(windows):
        off = abs(values[place] - window.logged)
        unit = max(2 * off, window.tolerance / _NEIGHBOURHOOD, window.grain / 2)
        size = 2 * abs(window.logged - window.right)
        others = [v[place] - window.logged for v in alternatives if math.isfinite(v[place])]
        # Equal alternatives count once; those that agree are not counted against themselves.
        others = [d for d in others if abs(d) > max(off, window.tolerance)]
        near = {round(d / (2 * unit)) for d in others if abs(d) <= _NEIGHBOURHOOD * unit}
        within = {round(d / (2 * unit)) for d in others if abs(d) <= size}
        # Of a number with few possible values a single one is no evidence, however few alternatives
        # happen to lie near it.
        least = 2.5 if window.grain > window.tolerance else 0.5
        chance *= min(1.0, max(len(near), least, len(within) * _NEIGHBOURHOOD * unit / size) / _NEIGHBOURHOOD)
    return chance


def _equal(a: Sequence[float], b: Sequence[float], windows: Sequence[Window]) -> bool:
    return all(abs(x - y) <= w.tolerance for x, y, w in zip(a, b, windows, strict=True))


def _only_nan(values: Sequence[float]) -> bool:
    return all(math.isnan(v) for v in values)
