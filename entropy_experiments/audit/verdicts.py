"""What is said of each logged number: that it agrees, differs for a named cause, or differs
unexplained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from entropy_experiments.audit.causes import Cause, Slack, Window, find_causes

AGREES, DIFFERS, UNEXPLAINED, RECOMPUTED = "agrees", "differs", "unexplained", "recomputed"
_WINDOWS_SEARCHED = 6
_MOST_HINTS = 3


@dataclass(frozen=True)
class Finding:
    """One logged number.

    Attributes:
        why: the cause where it differs, or what to know where it agrees.
        status: see the constants above.
    """

    metric: str
    first_step: int
    step: int
    logged: float | None
    recomputed: float
    tolerance: float
    status: str
    why: str = ""

    @property
    def difference(self) -> float:
        return math.nan if self.logged is None else self.logged - self.recomputed


def judge(
    name: str,
    right: Any,
    choices: Mapping[str, Any],
    value: Callable[[Any, range], float],
    windows: Sequence[Window],
    slack: Slack,
    say: Callable[[Sequence[tuple[str, Any]]], str],
) -> list[Finding]:
    """What to say of each window.

    Args:
        right, choices: the documented definition and, by field, the values of others.
        value: (definition, steps) -> number.
        slack: see `find_causes`.
        say: changes in words.
    """
    listed = {key: list(values) for key, values in choices.items()}
    differing = [w for w in windows if w.differs]
    named, hints = _explain(right, listed, value, differing, slack, say) if differing else ({}, {})
    out = []
    for w in windows:
        key = w.steps[-1]
        status = AGREES if not w.differs else DIFFERS if key in named else UNEXPLAINED
        why = named.get(key, hints.get(key, "")) if w.differs else ""
        out.append(Finding(name, w.steps[0], key, w.logged, w.right, w.tolerance, status, why))
    return out


def _explain(
    right: Any,
    choices: Mapping[str, Sequence[Any]],
    value: Callable[[Any, range], float],
    differing: Sequence[Window],
    slack: Slack,
    say: Callable[[Sequence[tuple[str, Any]]], str],
) -> tuple[dict[int, str], dict[int, str]]:
    """(causes, what would explain single numbers), by the last step of the window.

    A cause is one for all numbers that differ; else for most of them, each of which it explains
    alone. What fits a few is no cause: with so many alternatives something always fits somewhere.
    """
    if (swapped := _permuted(differing)) is not None:
        return swapped, {}
    joint = find_causes(right, choices, value, some(differing), slack)
    joint = [c for c in joint if all(_holds(c, right, value, w, slack) for w in differing)]
    if joint:
        said = {w.steps[-1]: _sentence(joint, say) for w in differing}
        return (said, {}) if all(c.convincing for c in joint) else ({}, said if len(joint) <= _MOST_HINTS else {})
    fitting = {w.steps[-1]: find_causes(right, choices, value, [w], slack, pairs_too=False) for w in some(differing)}
    counts = Counter(cause.changes for causes in fitting.values() for cause in causes)
    named, hints = {}, {}
    for step, causes in fitting.items():
        most = max((counts[c.changes] for c in causes), default=0)
        best = [c for c in causes if counts[c.changes] == most]
        if best and len(best) <= _MOST_HINTS:
            sure = 2 * most > len(differing) and most > 1 and all(c.convincing for c in best)
            (named if sure else hints)[step] = _sentence(best, say)
    return named, hints


def _permuted(differing: Sequence[Window]) -> dict[int, str] | None:
    """Where the numbers are right ones of each other's steps, which step each belongs to."""
    if len(differing) < 2:
        return None
    left, said = list(differing), {}
    for window in differing:
        source = next((w for w in left if abs(w.right - window.logged) <= window.tolerance), None)
        if source is None:
            return None
        left.remove(source)
        said[window.steps[-1]] = f"numbers of other steps: this is the one of step {source.steps[-1]}"
    return said


def _holds(cause: Cause, right: Any, value: Any, window: Window, slack: Slack) -> bool:
    definition = replace(right, **dict(cause.changes))
    return abs(value(definition, window.steps) - window.logged) <= max(
        window.tolerance, slack(definition, window.steps)
    )


def _sentence(causes: Sequence[Cause], say: Callable[[Sequence[tuple[str, Any]]], str]) -> str:
    said = list(dict.fromkeys(say(c.changes) for c in causes))
    if len(said) == 1:
        return said[0]
    return "one of these, which the numbers cannot tell apart: " + "; ".join(said)


def some(windows: Sequence[Window]) -> list[Window]:
    """At most so many, evenly taken: each alternative is computed at each."""
    if len(windows) <= _WINDOWS_SEARCHED:
        return list(windows)
    return [windows[round(i * (len(windows) - 1) / (_WINDOWS_SEARCHED - 1))] for i in range(_WINDOWS_SEARCHED)]
