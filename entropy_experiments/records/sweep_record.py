"""`sweep.json`: what a sweep was asked, by what it was made, and what became of every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from entropy_experiments.records.files import read_record
from entropy_experiments.records.record import Count, Nonnegative, Record, Rows
from entropy_experiments.records.run_record import Provenance
from rl_training.run.sums import check_sums

SWEEP_FORMAT = 2
"""sweep.json's "format_version", of evolution.json and results.parquet too. 1: folders that do not say."""


SWEEP_REMEDY = "put the sweep together anew with `entropy-experiments sweep RUN --folder FOLDER --assemble`"
"""What to do about a sweep's file that cannot be used."""


class SweepEntry(Record):
    """One checkpoint of a sweep."""

    name: str
    """Its name in the sweep."""
    run: str
    """Its run's name."""
    step: Count
    """Its training step."""
    checkpoint: str
    """Its folder."""
    folder: str
    """Its results folder, inside the sweep's."""
    status: Literal["done", "failed", "open", "unreadable"]
    """Whether it was analysed, could not be, is not yet, or left results that cannot be read."""
    error: str | None
    """Why there are no results; null where there are, or where it was not tried."""
    seconds: Nonnegative
    """How long the analysis took, seconds."""

    @property
    def missing(self) -> str | None:
        """Why there are no results; None where there are."""
        return None if self.status == "done" else self.error or "not analysed yet"


class SweepRecord(Provenance):
    """sweep.json."""

    format_version: Literal[2]
    """Version of this format."""
    runs: dict[str, str]
    """Run's name -> its folder."""
    complete: bool
    """Whether every checkpoint was analysed."""
    checkpoints: Rows[SweepEntry]
    """By run and step."""
    config: dict[str, Any]
    """The configuration, as config.yaml has it."""


def read_sweep(folder: Path) -> SweepRecord:
    """The sweep.json of a sweep that was put together.

    Raises:
        UserError: It is not there, malformed, or of another format, or a file of the sweep differs from its digest.
    """
    sweep = read_record(folder / "sweep.json", SweepRecord, version=SWEEP_FORMAT, remedy=SWEEP_REMEDY)
    check_sums(folder, SWEEP_REMEDY)
    return sweep
