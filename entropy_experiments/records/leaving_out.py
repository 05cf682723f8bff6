"""summary.json's "leaving_out": what leaving sequences out of the step does, and who moved entropy most."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from entropy_experiments.records.record import (
    Count,
    Finite,
    Index,
    NotKnown,
    Number,
    Probability,
    Record,
    Rows,
    kind_of_known,
)
from entropy_experiments.records.step_results import Unit


class PromptEffect(Record):
    """What leaving one training prompt out does."""

    prompt_index: Index
    """Its number."""
    share: Finite
    """Sum of its sequences' shares."""
    effect: Finite
    """Sum of their effects."""
    real: Number
    """What a step without the whole prompt does at first order; null where it was not computed."""


class FirstPlace(Record):
    """Sequences that are named together, and in what part of the bootstraps."""

    rows: Rows[Rows[Count]]
    """Training indices of each unit."""
    value: Finite
    """Sum over the units."""
    low: Number = None
    """Lower end of its 95% interval, over evaluation prompts."""
    high: Number = None
    """Upper end."""
    first_in: Probability
    """Part of the bootstraps in which one of them is first."""


class FirstUnit(Record):
    """The unit (a sequence with its copies, or a prompt) that moved entropy most in one direction."""

    rows: Rows[Count]
    """Its training indices."""
    value: Finite
    """Its number."""
    low: Number = None
    """Lower end of its 95% interval, over evaluation prompts."""
    high: Number = None
    """Upper end."""
    first_in: Probability
    """Part of the bootstraps in which it is first."""
    set: FirstPlace
    """The smallest set of units that is first in nine of ten."""


class FirstByDirection(Record):
    """Either direction."""

    lowering: FirstUnit | None
    """Lowered entropy most; null where none did."""
    raising: FirstUnit | None
    """Raised it most."""


class WhoWasFirst(Record):
    """Who moved entropy most, by a bootstrap over evaluation prompts."""

    bootstraps: Count
    """Bootstraps."""
    evaluation_prompts: Count
    """Prompts that were drawn from."""
    sequences: FirstByDirection
    """By training sequence, copies together."""
    prompts: FirstByDirection
    """By training prompt."""
    distinct: Count
    """Distinct training sequences."""


class LeavingOut(Record):
    """What leaving sequences out of the step does; null without a step."""

    unit: Unit
    """Of all changes."""
    sum_of_effects: Finite
    """Sum over the sequences, which is not the step's change."""
    own_part_of_second_moment: Finite
    """(1 - beta2)/(1 - beta2^t), the part of P_t that this batch makes."""
    early_above: Finite
    """Above which the effect of leaving out names who was first, below it the share."""
    headline: Literal["effect", "share"]
    """Which of both does here."""
    by_prompt: Rows[PromptEffect]
    """By training prompt."""
    slope_of_real: Number
    """Least squares of real on effect, through 0."""
    first: Annotated[
        Annotated[WhoWasFirst, Tag("known")] | Annotated[NotKnown, Tag("unknown")], Discriminator(kind_of_known)
    ]
    """Who was first, or why that is not known."""
