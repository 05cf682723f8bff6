"""The JSON schema of a results folder's files, made of the records; `entropy-experiments schema` prints it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import Summary
from rl_training.errors import UserError

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILES: dict[str, Any] = {
    "summary.json": Summary,
    "run.json": RunRecord,
    "training_history.json": list[HistoryRow],
}
"""File -> what it holds."""


def schema(file: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one file of a results folder.

    Args:
        file: One of `FILES`.

    Raises:
        UserError: No such file; the line names those that there are.
    """
    if file not in FILES:
        raise UserError(f"no results file is called {file[:80]!r}: choose from {', '.join(FILES)}")
    return TypeAdapter(FILES[file]).json_schema() | {"$schema": _DIALECT, "title": file}


def schemas() -> dict[str, Any]:
    """File -> its schema."""
    return {file: schema(file) for file in FILES}
