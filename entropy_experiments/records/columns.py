"""The parquet files that commands write: columns, types, meanings; the writers and the page of the format are made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()


class Column(NamedTuple):
    """One column of a table."""

    name: str
    kind: pa.DataType
    meaning: str


SEQUENCES = (
    Column("buffer", _TEXT, '"evaluation" or "training".'),
    Column("row", _WHOLE, "Place on that axis of the kernels, from 0."),
    Column("prompt_index", _WHOLE, "The prompt's number."),
    Column("prompt", _TEXT, "The prompt's text."),
    Column("completion", _TEXT, "The completion's text."),
    Column("prompt_ids", pa.list_(_WHOLE), "The prompt's tokens."),
    Column("completion_ids", pa.list_(_WHOLE), "The completion's tokens."),
    Column("token_texts", pa.list_(_TEXT), "Text of each completion token."),
    Column("completion_mask", pa.list_(pa.bool_()), "Whether the policy drew the token; null: all of them."),
    Column("logprobs", pa.list_(_NUMBER), "Log-probability of each token; null where it was not drawn."),
    Column("entropies", pa.list_(_NUMBER), "Entropy at each token, nats; null where it was not drawn."),
    Column("token_shares", pa.list_(_NUMBER), "Share of each token, nats per token; null where it was not computed."),
    Column("length", _WHOLE, "Tokens that the policy drew."),
    Column("truncated", pa.bool_(), "Whether the completion was cut at its maximum length."),
    Column("ending", _TEXT, "How it ended."),
    Column("score", _NUMBER, "Sum of the log-probabilities, nats."),
    Column("entropy_sum", _NUMBER, "Sum of the entropies, nats."),
    Column("reward", _NUMBER, "Reward."),
    Column("advantage", _NUMBER, "Advantage; of training sequences, as all that follows but delta_h_lost."),
    Column("weight", _NUMBER, "Weight in the loss."),
    Column("delta_h", _NUMBER, "Accounting share of the step's batch part, nats per token."),
    Column("delta_h_horizon", _NUMBER, "The same over the life of the momentum buffer."),
    Column("delta_h_lost", _NUMBER, "Of evaluation sequences: part of the predicted change, nats per token."),
    Column("effect_of_leaving_out", _NUMBER, "Effect of leaving the sequence out of the step, nats per token."),
    Column("delta_h_low", _NUMBER, "Lower end of the 95% interval of delta_h; null where it is not known."),
    Column("delta_h_high", _NUMBER, "Upper end."),
    Column(
        "effect_low", _NUMBER, "Lower end of the 95% interval of effect_of_leaving_out; null where it is not known."
    ),
    Column("effect_high", _NUMBER, "Upper end."),
)
SWEEP_NUMBERS = (
    Column("run", _TEXT, "Name of the run."),
    Column("step", _WHOLE, "Training step; of a number between two checkpoints, the later one's."),
    Column("quantity", _TEXT, "What the number is of."),
    Column(
        "part", _TEXT, 'Part of the step (total, batch, momentum, weight_decay), of the batch (above, below), or "".'
    ),
    Column("estimator", _TEXT, 'How it was estimated or measured, or "".'),
    Column("value", _NUMBER, "The number."),
    Column("standard_error", _NUMBER, "Its standard error; null where there is none."),
    Column("unit", _TEXT, "Its unit."),
)
COMPARED_NUMBERS = (
    Column("run", _TEXT, "Letter and name of the side."),
    Column("step", _WHOLE, "Training step of the analysed checkpoint."),
    Column("quantity", _TEXT, "What the number is of."),
    Column("part", _TEXT, "Part of the step; null where there are none."),
    Column("estimator", _TEXT, "How it was estimated or measured; null where there is one way."),
    Column("value", _NUMBER, "The number, or the difference."),
    Column("standard_error", _NUMBER, "Its standard error; null where there is none."),
    Column("unit", _TEXT, "Its unit."),
    Column("minus", _TEXT, "The side that was subtracted; null for a side's own number."),
    Column("paired_prompts", _WHOLE, "Evaluation prompts that a difference is paired over; 0: unpaired."),
)
TABLES = {
    "sequences.parquet": SEQUENCES,
    "results.parquet": SWEEP_NUMBERS,
    "comparison.parquet": COMPARED_NUMBERS,
}
"""File -> its columns. leave_one_out.parquet has one column a number, by its name (records.leave_one_out)."""


def schema_of(columns: tuple[Column, ...]) -> pa.Schema:
    """The columns for pyarrow."""
    return pa.schema([(column.name, column.kind) for column in columns])


def described(file: str) -> dict[str, Any]:
    """A table's columns as plain data: {"title", "columns": [{"name", "type", "description"}]}."""
    columns = [{"name": c.name, "type": str(c.kind), "description": c.meaning} for c in TABLES[file]]
    return {"title": file, "columns": columns}
