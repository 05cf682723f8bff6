"""verl's `trainer.rollout_data_dir` and `trainer.validation_data_dir`: `<step>.jsonl`, one sequence a line, texts alone.

verl decodes prompts and responses with skip_special_tokens=True: markers of the chat template and end-of-sequence tokens are
gone from both. `score` is the sum of the sequence's token scores. The newest trainer (trainer/ppo/v1) writes `uid`,
<prompt>_<session>_<output>, whose first part is a group; the others do not, and sequences of one text and step are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.rows import RolloutRow, number, text, whole

NAME = "verl"
FILES = r"(?P<step>\d+)\.jsonl"
_UID = re.compile(r"(.+)_(\d+)_(\d+)")


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
        group=_group(data.get("uid")),
        step=whole("step", data.get("step")) if data.get("step") is not None else step,
    )


def _group(uid: Any) -> str | None:
    """The prompt's part of a uid. Raises ValueError for one of a session's several outputs, each of which has its score."""
    if not isinstance(uid, str):
        return None
    parts = _UID.fullmatch(uid)
    if parts is not None and int(parts[3]):
        raise ValueError(
            f"is output {parts[3]} of a session of several ({uid[:60]}), whose score stands in each: not a reward a sequence; "
            "write token ids, masks and weights (docs/guides/rollouts.md)"
        )
    return uid if parts is None else parts[1]


def _required(score: float | None) -> float:
    if score is None:
        raise ValueError("score is null: the sequence was not judged; leave the line out")
    return score


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them."""
    if all(row.group is not None for row in rows):
        return []
    return ["this verl writes no group: sequences with one prompt text and one step are taken for a group"]
