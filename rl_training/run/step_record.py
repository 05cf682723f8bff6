"""What a run's log was made of, step by step: `<output_dir>/recorded_steps/`, written by `record_steps(trainer)`.

    run.json               settings by which the trainer's metrics were made (RunSettings)
    step-000040.parquet    one row a sequence, in the order of generation and of the loss:
        part "generated"   what was drawn in this step before any selection; `batch` counts the calls of the generator
        part "loss"        what passed through the loss; `batch` is the micro-batch. A step that reuses completions has no
                           generated rows and loss rows all the same

mask: which tokens of completion_ids count: in a generated row those that the policy drew, in a loss row those in the loss (none
where the trainer masked the completion out). width: columns of the micro-batch's padded completions. rewards: one for each reward
function, null where it did not judge. sampler_logprobs: those that the generator returned, null where it returned none.
advantage: in a loss row A_i as the trainer's loss had it, null where each token had its own, and in files of earlier releases.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import PositiveFloat, PositiveInt

from rl_training.configuration import StrictModel, validate_config
from rl_training.errors import UserError
from rl_training.files import own_folder, write_whole, write_whole_by
from rl_training.run.rollouts import COPY_AGAIN
from rl_training.run.sidecar import refuse_special_file
from rl_training.run.sums import add_sum, check_sum

FOLDER = "recorded_steps"
FORMAT = 1
GENERATED, LOSS = "generated", "loss"

SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("batch", pa.int64()),
        ("rank", pa.int64()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("completion_ids", pa.list_(pa.int64())),
        ("mask", pa.list_(pa.bool_())),
        ("width", pa.int64()),
        ("rewards", pa.list_(pa.float64())),
        ("sampler_logprobs", pa.list_(pa.float64())),
        ("advantage", pa.float64()),
    ]
)
_EARLIER = SCHEMA.remove(SCHEMA.get_field_index("advantage"))


class RunSettings(StrictModel):
    """How the trainer made its metrics."""

    format: int = FORMAT
    temperature: PositiveFloat
    max_completion_length: PositiveInt
    eos_token_ids: list[int]
    pad_token_id: int
    completions_per_prompt: PositiveInt
    reward_names: list[str]
    reward_weights: list[float]
    mixed_precision: str
    """Autocast of the training forwards, "no" for none."""
    mask_truncated_completions: bool
    beta: float
    dtype: str
    """Of the weights, e.g. "float32"."""
    model_name: str
    """What the base model was loaded by; empty where it was made in place."""
    sampler_departures: list[str]
    """What took completions away from softmax(logits / temperature), in words."""


def step_path(run_dir: Path, step: int) -> Path:
    """Where the sequences of optimizer step `step` (counted from 1) stand."""
    return Path(run_dir) / FOLDER / f"step-{step:06d}.parquet"


def write_settings(run_dir: Path, settings: RunSettings) -> None:
    """Write the run's settings. Raises UserError where the folder is a link."""
    path = own_folder(Path(run_dir) / FOLDER) / "run.json"
    write_whole(path, settings.model_dump_json(indent=1))
    add_sum(path)


def read_settings(run_dir: Path) -> RunSettings | None:
    """None where the run recorded no steps. Raises UserError for a damaged file."""
    path = Path(run_dir) / FOLDER / "run.json"
    if not path.exists():
        return None
    refuse_special_file(path)
    check_sum(path, COPY_AGAIN)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged") from error
    found = validate_config(RunSettings, data, str(path))
    if found.format != FORMAT:
        raise UserError(f"{path} is of format {found.format}, this release reads format {FORMAT}")
    return found


def write_step(run_dir: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write one step's rows, whole or not at all. Raises UserError where the folder is a link."""
    path = step_path(run_dir, step)
    own_folder(path.parent)
    write_whole_by(path, lambda part: pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), part))
    add_sum(path)


def read_step(run_dir: Path, step: int) -> list[dict[str, Any]] | None:
    """The rows of one step, None where it was not recorded. Raises UserError for a damaged file."""
    path = step_path(run_dir, step)
    if not path.exists():
        return None
    refuse_special_file(path)
    check_sum(path, COPY_AGAIN)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged") from error
    if table.schema not in (SCHEMA, _EARLIER):
        raise UserError(f"{path} has other columns than this release writes: it is damaged, or of another release")
    return table.to_pylist()
