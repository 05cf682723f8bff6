"""What the self-checks say in a sentence: what each found, and what it would have let through.

A check is evidence of what it can see: "passed" beside a tolerance of 80% says little, beside 1e-4 it says much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import as_number, counted, plain

WEAK = 0.1
"""A share or relative error of this size or more is much to let through: named by itself."""


def check_value(check: Mapping[str, Any]) -> str:
    """The number a self-check found; a check that ended in NaN or infinity says so."""
    value = check.get("value")
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return plain(value)


def check_sentences(self_checks: Sequence[Mapping[str, Any]]) -> list[Sentence]:
    """Whether the analysis's checks of itself passed, up to which tolerance; the failed ones by name and number; and which of
    those that passed would have let much through.
    """
    if not self_checks:
        return [Sentence("No self-checks were recorded: nothing vouches for these numbers.", "warning")]
    failed = [check for check in self_checks if check.get("passed") is not True]
    if failed:
        described = [_against(check) for check in failed]
        return [
            Sentence(
                f"{len(failed)} of {counted(len(self_checks), 'self-check')} FAILED: {', '.join(described)}. "
                "Do not rely on the numbers below until this is explained.",
                "bad",
            )
        ]
    weak = [check for check in self_checks if (as_number(check.get("tolerance")) or 0.0) >= WEAK]
    strong = [check for check in self_checks if check not in weak]
    text = f"All {counted(len(self_checks), 'self-check')} passed"
    listed = f": {', '.join(map(_against, strong))}" if strong else ""
    found = [Sentence(f"{text}{listed}.", "good")]
    if weak:
        found.append(
            Sentence(f"Passed within wide tolerances, which let much through: {'; '.join(map(_power, weak))}.")
        )
    return found


def _against(check: Mapping[str, Any]) -> str:
    return f"{_name(check)} ({check_value(check)}, tolerance {plain(check.get('tolerance'))})"


def _power(check: Mapping[str, Any]) -> str:
    allows = check.get("allows")
    said = f", {quoted(str(allows), 300)[1:-1]}" if isinstance(allows, str) and allows else ""
    return f"{_against(check)}{said}"


def _name(check: Mapping[str, Any]) -> str:
    return quoted(str(check.get("name", "unnamed")))[1:-1]
