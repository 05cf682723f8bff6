"""What a run was trained on and rewarded for, in a sentence for the readers of its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import PurePath
from typing import Any

REWARD_IN_WORDS = {
    "exact": "1 if the stripped completion is the answer, else 0",
    "last_number": "1 if the last number in the completion is the answer, else 0",
    "math_verify": "1 if math-verify finds it equal to the answer, else 0",
    "score_answer": "the data set's own score of the completion, 0 to 1",
}
_REASONING_GYM = "[reasoning-gym](https://github.com/open-thought/reasoning-gym)"
_LONGEST = 200


def default_reward(source: str) -> str:
    """The reward that a task of this source has where none is named."""
    return "score_answer" if source == "reasoning_gym" else "math_verify"


def task_in_words(task: Mapping[str, Any]) -> str:
    """Problems, system prompt and reward, in Markdown that a table's cell may hold.

    Args:
        task: the fields of a TaskConfig; of some other mapping its texts are listed by name.
    """
    source = task.get("source")
    if source not in ("reasoning_gym", "jsonl"):
        return ", ".join(f"{key} {_code(value)}" for key, value in task.items() if isinstance(value, str))
    said = _problems(source, task) + _counts(task)
    if task.get("system_prompt"):
        said += f", after the system prompt {_code(task['system_prompt'])}"
    return f"{said}; reward: {_reward(source, task)}"


def scripted_task_in_words(data_set: Any, rewards: Sequence[str]) -> str:
    """The same of a trainer that a script gave its data set and reward functions.

    Args:
        data_set: of it the number of prompts is told where it has one, and its name where `datasets` knows it.
        rewards: names of the reward functions.
    """
    count = f"{len(data_set)} prompts" if isinstance(data_set, Sized) else "prompts"
    name = getattr(getattr(data_set, "info", None), "dataset_name", None)
    named = f" of the data set {_code(name)}" if name else " given by the training script"
    return f"{count}{named}; {'reward' if len(rewards) == 1 else 'rewards'}: {', '.join(map(_code, rewards))}"


def _problems(source: str, task: Mapping[str, Any]) -> str:
    if source == "jsonl":  # of its path the name alone: folders mean nothing to others
        return f"problems of the file {_code(PurePath(str(task.get('path'))).name)}"
    given = task.get("arguments") or {}
    arguments = f" ({', '.join(_code(f'{key}={value}') for key, value in given.items())})" if given else ""
    return f"problems that {_REASONING_GYM} generates as {_code(task.get('name'))}{arguments}"


def _counts(task: Mapping[str, Any]) -> str:
    trained, held_out = task.get("size"), task.get("heldout_size")
    return f", {trained} to train on and {held_out} held out" if trained and held_out is not None else ""


def _reward(source: str, task: Mapping[str, Any]) -> str:
    name = str(task.get("reward") or "default")
    if name == "default":
        name = default_reward(source)
    if name in REWARD_IN_WORDS:
        return REWARD_IN_WORDS[name]
    module, _, function = name.rpartition(":")
    return f"the function {_code(function)} of {_code(PurePath(module).name)}"


def _code(value: object) -> str:
    """Text as it stands, on one line: tags, stars and bars of it mean nothing to Markdown."""
    text = " ".join(str(value).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"
