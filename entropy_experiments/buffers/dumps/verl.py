"""verl's `trainer.rollout_data_dir` and `trainer.validation_data_dir`: `<step>.jsonl`, one sequence a line, texts alone.

verl decodes prompts and responses with skip_special_tokens=True: markers of the chat template and end-of-sequence tokens are
gone from both. `score` is the sum of the sequence's token scores. The prompt's uid is not written: sequences of one text and
one step are a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.rows import RolloutRow, number, text, whole

NAME = "verl"
FILES = r"(?P<step>\d+)\.jsonl"


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is one of verl's."""
    return {"input", "output", "score"} <= keys


def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
    """The sequence of a line. Raises ValueError where it is not what verl writes."""
    yield RolloutRow(
        place=place,
        prompt=text("input", data.get("input")),
        prompt_form="stripped",
        completion=text("output", data.get("output")),
        reward=_required(number("score", data.get("score"))),
        step=whole("step", data.get("step")) if data.get("step") is not None else step,
    )


def _required(score: float | None) -> float:
    if score is None:
        raise ValueError("score is null: the sequence was not judged; leave the line out")
    return score


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them."""
    return ["verl writes no group: sequences with one prompt text and one step are taken for a group"]
