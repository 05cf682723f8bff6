"""The parquet record of one step's sequences: `<run>/rollouts/step-000040.parquet`, one row a generated sequence.

Neither TRL nor a checkpoint keeps what a step trained on. status is "trained", "filler" (kept without gradient, because
refilling ran out) or "rejected"; advantage and weight are null where rejected. completion_mask: which tokens of
completion_ids the policy drew (the others came from tools or an environment), null where it drew all; older files lack it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rl_training.errors import UserError
from rl_training.files import own_folder, write_whole_by
from rl_training.run.checkpoint_digests import file_digest
from rl_training.run.sidecar import refuse_special_file
from rl_training.run.sums import add_sum, check_sum
from rl_training.sequences import RolloutSequence

COPY_AGAIN = "copy it again, or move it away to go on without it"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("round", pa.int64()),
        ("rank", pa.int64()),
        ("status", pa.string()),
        ("prompt_index", pa.int64()),
        ("draw_probability", pa.float64()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("completion_ids", pa.list_(pa.int64())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("completion", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("weight", pa.float64()),
    ]
)


def rollouts_path(run_dir: Path, step: int) -> Path:
    """Where the sequences of optimizer step `step` (counted from 1) stand."""
    return Path(run_dir) / "rollouts" / f"step-{step:06d}.parquet"


def write_rollouts(run_dir: Path, step: int, sequences: Iterable[RolloutSequence]) -> Path:
    """Write one step's sequences, whole or not at all. Raises UserError where the folder of rollouts is a link."""
    path = rollouts_path(run_dir, step)
    own_folder(path.parent)
    rows = [_row(sequence) for sequence in sequences]
    write_whole_by(path, lambda part: pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part))
    add_sum(path)
    return path


def _row(sequence: RolloutSequence) -> dict[str, Any]:
    row = sequence.to_json()
    return {name: row["drawn" if name == "completion_mask" else name] for name in SCHEMA.names}


def check_rollouts(run_dir: Path, step: int, digest: str | None) -> None:
    """Raises UserError where one step's record is there and is not the one of this SHA-256."""
    path = rollouts_path(run_dir, step)
    if digest is not None and path.is_file() and file_digest(path) != digest:
        raise UserError(
            f"{path} is not the file that the trainer wrote (its SHA-256 differs from the checkpoint's record): it is damaged or "
            "was changed; copy it again, or move it away to go on without it"
        )


def read_rollouts(run_dir: Path, step: int) -> list[RolloutSequence]:
    """The sequences of one step. Raises UserError where they were not recorded or cannot be read."""
    path = rollouts_path(run_dir, step)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: this run recorded no sequences of step {step}; use train_prompts: random"
        )
    refuse_special_file(path)
    check_sum(path, COPY_AGAIN)
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): it is damaged") from error
    for row in rows:
        odd = next((name for name, is_right in _COLUMNS.items() if not is_right(row.get(name))), None)
        if odd is None and row.get("completion_mask") and len(row["completion_mask"]) != len(row["completion_ids"]):
            odd = "completion_mask"
        if odd is None and row["status"] != "rejected":
            odd = next((name for name in ("weight", "advantage") if not _is_finite(row.get(name))), None)
        if odd is not None:
            raise UserError(
                f"{path}: {odd} holds {str(row.get(odd))[:60]}, which no run records: it is damaged; copy it again"
            )
    return [_sequence(row) for row in rows]


def _sequence(row: dict[str, Any]) -> RolloutSequence:
    drawn, reward = row.pop("completion_mask", None), row["reward"]
    known = {name: row[name] for name in SCHEMA.names if name in row}
    judged = reward is not None and not math.isnan(reward)
    return RolloutSequence.from_json({**known, "drawn": drawn, "reward": reward if judged else None})


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


_COLUMNS: dict[str, Callable[[Any], bool]] = {
    "status": lambda value: isinstance(value, str),
    "prompt_index": lambda value: type(value) is int,
    "round": lambda value: type(value) is int,
    "rank": lambda value: type(value) is int,
    "draw_probability": lambda value: _is_finite(value) and value > 0,
    "prompt_ids": _are_tokens,
    "completion_ids": _are_tokens,
    "completion": lambda value: isinstance(value, str),
    "reward": lambda value: value is None or isinstance(value, int | float),
    "completion_mask": lambda value: value is None or (isinstance(value, list) and all(type(v) is bool for v in value)),
}
