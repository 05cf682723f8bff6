"""`run.json`: where, when and by what an analysis was made, how long each stage took, and its self-checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from entropy_experiments.records.record import Count, Nonnegative, Number, Record, Rows


class CheckpointRecord(Record):
    """The analysed checkpoint."""

    path: str
    """Its folder."""
    step: Count
    """The training step after which it was written."""
    model: str
    """Name or path of the model that was trained."""


class RunCheckpoint(CheckpointRecord):
    """The analysed checkpoint, with its run."""

    run_dir: str
    """The run's folder."""


class Hardware(Record):
    """The machine."""

    platform: str
    """Operating system and its version."""
    processor: str
    """Kind of processor."""
    threads: Count
    """Threads that torch used."""
    device: str
    """Name of the accelerator, or "cpu"."""


class StageRecord(Record):
    """One stage of the analysis."""

    name: str
    """What was done."""
    seconds: Nonnegative
    """How long it took, seconds."""


class CheckRecord(Record):
    """One self-check: a number against its tolerance (docs/guides/self-checks.md)."""

    name: str
    """What was checked."""
    value: Number
    """What was found, in the check's own unit; null: not a number, which fails."""
    tolerance: Number
    """The largest value that passes."""
    explanation: str
    """What was compared, and what a failure means."""
    allows: str = ""
    """What would have passed."""
    passed: bool
    """Whether value <= tolerance."""


class Provenance(Record):
    """When and by what results were made."""

    created: str
    """When they were written, ISO 8601, UTC."""
    command: str
    """The command line."""
    versions: Annotated[dict[str, str], Field(max_length=1000)]
    """Package -> version, of those that the numbers depend on."""
    git_sha: str | None
    """Commit of this project's checkout; null where there is none."""
    hardware: Hardware
    """The machine."""


class RunRecord(Provenance):
    """run.json."""

    processes: Count
    """Processes that shared the work."""
    checkpoint: RunCheckpoint
    """The analysed checkpoint."""
    stages: Rows[StageRecord]
    """Stages in the order they were run."""
    seconds: Nonnegative
    """Sum over the stages, seconds."""
    self_checks: Rows[CheckRecord]
    """Every self-check that was made."""
    failed_analyses: dict[str, str]
    """Analysis -> what went wrong, of those that failed (--keep-going)."""
