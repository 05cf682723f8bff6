"""The schema of the files that commands write, made of the records; `entropy-experiments schema` prints it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from entropy_experiments.records.columns import TABLES, described
from entropy_experiments.records.comparison_record import ComparisonRecord
from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.records.sweep_record import SweepRecord
from rl_training.errors import UserError

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILES: dict[str, Any] = {
    "summary.json": Summary,
    "run.json": RunRecord,
    "training_history.json": list[HistoryRow],
    "sweep.json": SweepRecord,
    "evolution.json": dict[str, Evolution],
    "comparison.json": ComparisonRecord,
}
"""JSON file -> what it holds: of an analysis, of a sweep, of a comparison."""


def schema(file: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one JSON file, or the columns of one parquet file.

    Args:
        file: One of `FILES` or of `TABLES`.

    Raises:
        UserError: No such file; the line names those that there are.
    """
    if file in TABLES:
        return described(file)
    if file not in FILES:
        raise UserError(f"no results file is called {file[:80]!r}: choose from {', '.join([*FILES, *TABLES])}")
    return TypeAdapter(FILES[file]).json_schema() | {"$schema": _DIALECT, "title": file}


def schemas() -> dict[str, Any]:
    """File -> its schema."""
    return {file: schema(file) for file in [*FILES, *TABLES]}
