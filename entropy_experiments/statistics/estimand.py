"""Which entropy an analysis is about, and all that follows from it: estimators, the measurement, and the words.

    policy          entropy of the policy's own completions: the evaluation sequences were drawn from it
    given tokens    how entropy moves on texts that the policy did not draw: these say nothing of the policy's entropy

An analysis has one `Estimand`; nobody else asks whether its evaluation sequences were drawn. No torch here: a report is
written on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from entropy_core.entropy import Estimator

Measure = Literal["snis", "fixed_prefix"]
"""How a change is measured: reweighted to the new policy (self-normalised importance sampling), or on the same tokens."""


@dataclass(frozen=True)
class Estimand:
    """What predictions, shares and measurements of one analysis are of.

    rows_drawn: whether the policy drew the evaluation sequences. gradient: the estimator that kernels and shares rest on.
    derivative: the estimator whose prediction is the exact derivative of the measurement on the same tokens. estimators: all
    that predict, the one to quote first. measure: how its change is measured. quantity: its name in a sentence.
    """

    rows_drawn: bool
    gradient: Estimator
    derivative: Estimator
    estimators: tuple[Estimator, ...]
    measure: Measure
    quantity: str

    @staticmethod
    def of(rows_drawn: bool) -> Estimand:
        """The estimand of evaluation sequences that the policy drew, or that were given."""
        return POLICY if rows_drawn else GIVEN_TOKENS


POLICY = Estimand(
    rows_drawn=True,
    gradient="rao_blackwell",
    derivative="split",
    estimators=("rao_blackwell", "split", "score_function", "fixed_prefix"),
    measure="snis",
    quantity="the policy's entropy",
)
GIVEN_TOKENS = Estimand(
    rows_drawn=False,
    gradient="fixed_prefix",
    derivative="fixed_prefix",
    estimators=("fixed_prefix",),
    measure="fixed_prefix",
    quantity="the entropy on the given tokens",
)


def measure_of(estimator: str) -> Measure:
    """The measurement that an estimator's prediction is compared with."""
    return "fixed_prefix" if estimator == "fixed_prefix" else "snis"
