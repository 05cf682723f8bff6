"""`comparison.json`: verdict, folders, and the numbers of the last training step that all sides share."""

from __future__ import annotations

from typing import Literal

from entropy_experiments.records.estimates import Estimate, Mean
from entropy_experiments.records.outcome_record import SentenceRecord
from entropy_experiments.records.record import Count, Record, Rows

COMPARISON_FORMAT = 2
"""comparison.json's "format_version"."""


class SideRecord(Record):
    """One side of the comparison."""

    letter: str
    """A, which the others are compared with, or B, ..."""
    name: str
    """What it is called."""
    folder: str
    """Its folder."""


class DifferenceRecord(Estimate):
    """A side's number minus A's."""

    paired_prompts: Count
    """Evaluation prompts that the difference is paired over; 0: unpaired."""
    why_unpaired: str | None
    """Why it is not paired."""
    differs_from_zero: bool | None
    """Whether 0 lies outside the 95% interval; null without one."""


class QuantityRecord(Record):
    """One quantity on all sides."""

    quantity: str
    """Its name."""
    part: str | None
    """Part of the step; null where there are none."""
    estimator: str | None
    """How it was estimated or measured."""
    label: str
    """Its name in words."""
    unit: str
    """Its unit."""
    values: dict[str, Mean]
    """Side's letter -> its number."""
    minus_a: dict[str, DifferenceRecord]
    """Side's letter -> its difference from A."""


class ComparisonRecord(Record):
    """comparison.json."""

    format_version: Literal[2]
    """Version of this format."""
    kind: Literal["analysis", "sweep"]
    """What was compared."""
    sides: Rows[SideRecord]
    """In order."""
    shared_steps: Rows[Count] | None
    """Training steps that all sweeps share; null for single analyses."""
    verdict: Rows[SentenceRecord]
    """What was found, the most important first."""
    quantities: Rows[QuantityRecord]
    """At the last shared step."""
