"""This project's own files: the documented schema of rollouts (JSONL or parquet), and the rollouts that its trainer stores.

Keys are the columns of rows.py; in JSONL also `already_templated` (the prompt's text is the chat template's own output) and
`prompt_index`, which stands for a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.rows import (
    SCHEMA,
    RolloutRow,
    logprobs,
    mask,
    messages,
    number,
    positive,
    prompt_form,
    text,
    tokens,
    truth,
    whole,
)

NAME = "the schema of this project"
FILES = r"step-(?P<step>\d+)\.parquet"

_KEYS = (*SCHEMA.names, "already_templated", "prompt_index")
# What the stored rollouts of this project's trainer have beside the schema, and what is made of it.
_STORED = ("round", "rank", "status", "draw_probability")
KNOWN = frozenset((*_KEYS, *_STORED))
# Of other trainers: a mask or log-probabilities that were passed over would change numbers without a word.
_OTHER_NAMES = {
    **dict.fromkeys(
        ("response_mask", "loss_mask", "action_mask", "tool_mask", "mask", "labels", "assistant_masks"),
        "completion_mask",
    ),
    **dict.fromkeys(
        ("logprobs", "log_probs", "rollout_log_probs", "old_log_probs", "per_token_logps"), "sampler_logprobs"
    ),
    **dict.fromkeys(("input_ids", "prompt_tokens"), "prompt_ids"),
    **dict.fromkeys(("response_ids", "response_tokens", "output_ids"), "completion_ids"),
    **dict.fromkeys(("uid", "prompt_uid", "group_index"), "group"),
    **dict.fromkeys(("score", "scores", "rewards"), "reward"),
}
_TELLING = set(_KEYS) - {"prompt", "completion", "reward", "weight", "prompt_index"}


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is one of ours; with prompt, completion, reward and weight alone it is a plain text file's
    (entropy_experiments/buffers/custom.py)."""
    return bool(_TELLING & keys)


def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
    """The sequence of a row; none of a group that the trainer rejected. Raises ValueError for what the schema does not allow."""
    stored = "status" in data
    known = (*_KEYS, *_STORED) if stored else _KEYS
    for key in data:
        if key not in known and (near := get_close_matches(str(key), known, n=1, cutoff=0.75)):
            raise ValueError(f"unknown key {key!r}: did you mean {near[0]!r}?")
        if (meant := _OTHER_NAMES.get(str(key))) is not None and data.get(meant) is None:
            raise ValueError(
                f"{key!r} is not read here: write it as {meant!r} (docs/guides/rollouts.md), or leave it out"
            )
    if stored and data["status"] == "rejected":
        return
    prompt, form = _prompt(data)
    group = data["group"] if data.get("group") is not None else data.get("prompt_index")
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
        raise ValueError(f"group must be text or a whole number, found {str(group)[:40]!r}")
    ids = tokens("prompt_ids", data.get("prompt_ids"))
    yield RolloutRow(
        place=place,
        prompt_ids=ids,
        completion_ids=tokens("completion_ids", data.get("completion_ids")),
        completion_mask=mask("completion_mask", data.get("completion_mask")),
        prompt=prompt,
        prompt_form=form,
        completion=text("completion", data.get("completion")),
        **{name: number(name, data.get(name)) for name in ("reward", "advantage", "weight")},
        sampler_logprobs=logprobs("sampler_logprobs", data.get("sampler_logprobs")),
        group=None if group is None else str(group),
        step=whole("step", data.get("step")) if data.get("step") is not None else step,
        temperature=positive("temperature", data.get("temperature")),
        truncated=truth("truncated", data.get("truncated")),
    )


def _prompt(data: dict[str, Any]) -> tuple[Any, Any]:
    value, form = data.get("prompt"), prompt_form(data.get("prompt_form"))
    templated = truth("already_templated", data.get("already_templated"))
    if templated is not None:
        if data.get("prompt_form") is not None and templated != (form == "templated"):
            raise ValueError("already_templated and prompt_form contradict each other: give one of them")
        form = "templated" if templated else form
    if isinstance(value, str) and form == "chat" and value.lstrip().startswith("["):
        value = _messages_in(value)
    if value is not None and not isinstance(value, str):
        value = messages("prompt", value)
        if form != "chat":
            raise ValueError("prompt holds chat messages, and is said to be text already: give the text")
    return text("prompt", value) if isinstance(value, str) else value, form


def _messages_in(value: str) -> Any:
    # A table keeps chat messages as JSON; a text that only begins like them stays a text.
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) and found and all(isinstance(m, dict) for m in found) else value


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them."""
    return []
