"""TRL's `log_completions=True`: `<output_dir>/completions/completions_<step>.parquet` of GRPOTrainer and RLOOTrainer.

    step, prompt, completion (texts, or chat messages), one column a reward function, columns of log_extra, advantage

Texts without special tokens, no token ids and no groups: sequences with one prompt and one step are a group. Which numeric
columns are rewards is not said, so that the advantage alone is taken, and the reward where one column alone can be it.
A file holds the last generation batch before the log; an evaluation at the same step overwrites it, and is told by the Trainer's
own log beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.files import rows_of
from entropy_experiments.buffers.dumps.rows import RolloutRow, messages, number, text, whole
from entropy_experiments.checkpoints.folder import read_trainer_state
from rl_training.errors import UserError

NAME = "TRL"
# With one of these it is a file of this project's own schema.
_NEVER_TRLS = {"prompt_ids", "completion_ids", "prompt_form", "already_templated", "group", "weight", "truncated"}
FILES = r"completions_(?P<step>\d+)\.(parquet|jsonl)"


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is one of TRL's."""
    return {"step", "prompt", "completion", "advantage"} <= keys and not _NEVER_TRLS & keys


def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
    """The sequence of a row. Raises ValueError where it is not what TRL writes."""
    prompt = data["prompt"]
    advantage = number("advantage", data["advantage"])
    if advantage is None:
        raise ValueError("advantage is null")
    yield RolloutRow(
        place=place,
        prompt=prompt if isinstance(prompt, str) else messages("prompt", prompt),
        prompt_form="plain" if isinstance(prompt, str) else "chat",
        completion=_reply(data["completion"]),
        reward=_reward(data),
        advantage=advantage,
        step=whole("step", data["step"]) if data["step"] is not None else step,
    )


def _reply(completion: Any) -> str:
    if isinstance(completion, str):
        return text("completion", completion) or ""
    turns = messages("completion", completion)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(
            f"completion has {len(turns)} messages: tokens of tools and turns cannot be had again from texts; save token ids"
        )
    return turns[0]["content"]


def _reward(data: dict[str, Any]) -> float | None:
    known = {"step", "prompt", "completion", "advantage"}
    judged = [v for k, v in data.items() if k not in known and isinstance(v, float)]
    return judged[0] if len(judged) == 1 and math.isfinite(judged[0]) else None


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them. Raises UserError for a file that an evaluation wrote over."""
    said = ["TRL writes no group: sequences with one prompt and one step are taken for a group"]
    steps = {row.step for row in rows if row.step is not None}
    _refuse_evaluations(path, steps)
    before = path.with_name(f"completions_{min(steps, default=0) - 1:05d}{path.suffix}")
    if re.fullmatch(FILES, path.name) and before.is_file() and _contents(before) == _contents(path):
        said.append(
            f"{path.name} has the sequences of {before.name}: a generation batch that several steps took their parts of "
            "(steps_per_generation, num_iterations), so that not all of them made this step"
        )
    return said


def _refuse_evaluations(path: Path, steps: set[int]) -> None:
    """An evaluation at a logged step goes to that step's file, in place of what the step was made of."""
    run = path.absolute().parent.parent
    numbered = {int(m[1]): p for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d{1,9})", p.name))}
    if path.parent.name != "completions" or not numbered or not steps:
        return
    folder = numbered[
        min((n for n in numbered if n >= max(steps)), default=max(numbered))
    ]  # its log has all rows until then
    rows = read_trainer_state(folder).get("log_history", [])
    evaluated = {row.get("step") for row in rows if any(str(key).startswith("eval_") for key in row)}
    if found := sorted(steps & evaluated):
        raise UserError(
            f"{path} is of an evaluation at step {found[0]} ({folder.name}/trainer_state.json), which TRL writes over that "
            "step's own sequences: take another step, and train with eval_strategy='no' or evaluate between logs"
        )


def _contents(path: Path) -> list[tuple[Any, ...]]:
    names = ("prompt", "completion", "advantage")
    return [tuple(row.get(name) for name in names) for _, row in rows_of(path, names) if isinstance(row, dict)]
