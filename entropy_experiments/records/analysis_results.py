"""summary.json's "analyses": one entry an analysis, its result, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Tag

from entropy_experiments.records.attribution_results import AttributionResult
from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.records.kernel_results import BuffersResult, PromptStructureResult
from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.records.record import Record, Result
from entropy_experiments.records.step_results import (
    BaselinesResult,
    EntropyPredictionResult,
    HigherOrderResult,
    InterventionResult,
)
from entropy_experiments.records.weighting_results import WeightingResult


class Skipped(Record):
    """An analysis whose question does not arise."""

    skipped: str
    """Why."""


class Failed(Record):
    """An analysis that failed; written with --keep-going only."""

    error: str
    """What went wrong."""


def _kind(entry: Any) -> str:
    if isinstance(entry, Skipped) or (isinstance(entry, Mapping) and "skipped" in entry):
        return "skipped"
    return "failed" if isinstance(entry, Failed) or (isinstance(entry, Mapping) and "error" in entry) else "result"


R = TypeVar("R", bound=Result)
Outcome = Annotated[
    Annotated[R, Tag("result")] | Annotated[Skipped, Tag("skipped")] | Annotated[Failed, Tag("failed")],
    Discriminator(_kind),
]
"""A result, or why there is none."""


class AnalysesRecord(Record):
    """One entry an analysis; absent where it is switched off."""

    buffers: Outcome[BuffersResult] | None = None
    """How do the training buffer's sequences differ from those that entropy is measured on?"""
    entropy_prediction: Outcome[EntropyPredictionResult] | None = None
    """Does the first order predict the change of entropy?"""
    higher_order: Outcome[HigherOrderResult] | None = None
    """How large is the second order?"""
    attribution: Outcome[AttributionResult] | None = None
    """Who moved entropy in this step?"""
    intervention: Outcome[InterventionResult] | None = None
    """Do the shares say what real steps without some sequences do?"""
    prompt_structure: Outcome[PromptStructureResult] | None = None
    """Do sequences of one prompt move each other more?"""
    sequence_clustering: Outcome[ClusteringResult] | None = None
    """Do gradients fall into groups?"""
    weighting_schemes: Outcome[WeightingResult] | None = None
    """What would other weightings cost?"""
    prices: Outcome[PricesResult] | None = None
    """What could be done in place of this step, and what would it cost?"""
    baselines: Outcome[BaselinesResult] | None = None
    """How near do other predictors come?"""

    def entries(self) -> Iterator[tuple[str, Result | Skipped | Failed]]:
        """(name, entry) of the analyses that were asked for, in the order of the report."""
        for name in type(self).model_fields:
            entry = getattr(self, name)
            if entry is not None:
                yield name, entry

    def failed(self) -> dict[str, str]:
        """Name -> what went wrong, of the analyses that failed."""
        return {name: entry.error for name, entry in self.entries() if isinstance(entry, Failed)}


def finished(entry: R | Skipped | Failed | None) -> R | None:
    """The result, or None where there is none: ``finished(summary.analyses.buffers)``."""
    return None if entry is None or isinstance(entry, Skipped | Failed) else entry
