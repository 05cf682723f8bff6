"""What the self-checks say in a sentence: what each found, and what it would have let through.

A check is evidence of what it can see: "passed" beside a tolerance of 80% says little, beside 1e-4 it says much.
"""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.records.run_record import CheckRecord
from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import counted, plain

WEAK = 0.1
"""A share or relative error of this size or more is much to let through: named by itself."""


def check_value(check: CheckRecord) -> str:
    """The number a self-check found; a check that ended in NaN or infinity says so."""
    return "not a finite number" if check.value is None else plain(check.value)


def check_sentences(self_checks: Sequence[CheckRecord]) -> list[Sentence]:
    """Whether the analysis's checks of itself passed, up to which tolerance; the failed ones by name and number; and which of
    those that passed would have let much through.
    """
    if not self_checks:
        return [Sentence("No self-checks were recorded: these numbers have not been checked.", "warning")]
    failed = [check for check in self_checks if not check.passed]
    if failed:
        described = [_against(check) for check in failed]
        return [
            Sentence(
                f"{len(failed)} of {counted(len(self_checks), 'self-check')} FAILED: {', '.join(described)}. "
                "Do not rely on the numbers below until this is explained.",
                "bad",
            )
        ]
    weak = [check for check in self_checks if (check.tolerance or 0.0) >= WEAK]
    strong = [check for check in self_checks if check not in weak]
    text = f"All {counted(len(self_checks), 'self-check')} passed"
    listed = f": {', '.join(map(_against, strong))}" if strong else ""
    found = [Sentence(f"{text}{listed}.", "good")]
    if weak:
        found.append(
            Sentence(f"Passed within wide tolerances, which let much through: {'; '.join(map(_power, weak))}.")
        )
    return found


def _against(check: CheckRecord) -> str:
    return f"{_name(check)} ({check_value(check)}, tolerance {plain(check.tolerance)})"


def _power(check: CheckRecord) -> str:
    said = f", {quoted(check.allows, 300)[1:-1]}" if check.allows else ""
    return f"{_against(check)}{said}"


def _name(check: CheckRecord) -> str:
    return quoted(check.name)[1:-1]
