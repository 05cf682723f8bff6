"""Sequences that the user gives as rows or columns of the kernel: a JSONL file, or each prompt's
reference completion.

    {"prompt": text or messages, "completion": text, "prompt_index": number, "reward": number, "weight": number}

The last three are optional. A completion in which the policy did not write everything is a list of
segments, such as

    [{"text": "I call the tool."}, {"text": "Its result.", "drawn": false}, {"text": "So it is 4."}]

Segments that were not drawn are conditioned on, never scored. They are taken as they are: each
becomes tokens by itself, an end-of-sequence token may stand between them, and nothing is cut.
Prompts become what the task's prompts become (a text is the user's message, the task's system
prompt goes before it), completions are closed by an end-of-sequence token and cut where the sampler
would have cut them. See docs/guides/analysis.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.sampling_plan import SamplingPlan
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import tokenize_prompts
from rl_training.prompts.text_tokenizer import text_tokens
from rl_training.sampling import Rollouts, SamplingConfig, prompt_text
from rl_training.sequences import RolloutSequence
from rl_training.tasks.json_lines import check_values, regular_file

_KEYS = ("prompt", "completion", "prompt_index", "reward", "weight")
_REASONS_SHOWN, _NUMBERS_SHOWN = 5, 40


@dataclass(frozen=True, kw_only=True)
class CustomSequence:
    """One line: chat messages (the last one the user's), the completion's text, and what else the
    line says.

    Attributes:
        segments: (text, whether the policy drew it) of a completion that was given in several.
    """

    line: int
    messages: list[dict[str, str]]
    completion: str
    segments: tuple[tuple[str, bool], ...] | None = None
    prompt_index: int | None = None
    reward: float | None = None
    weight: float | None = None


@dataclass
class PromptNumbers:
    """The number of a prompt: the task's own where it is one of the task's prompts, else the
    file's or a new one.

    One object numbers the prompts of both buffers, so that the same prompt has the same number on
    both sides.
    """

    task_rows: list[dict[str, Any]]
    _number_of: dict[str, int] = field(init=False)
    _owner_of: dict[int, str] = field(init=False)
    _highest: int = field(init=False)

    def __post_init__(self) -> None:
        self._number_of = {_key(row["prompt"]): int(row["prompt_index"]) for row in self.task_rows}
        self._owner_of = {number: key for key, number in self._number_of.items()}
        self._highest = max(self._owner_of, default=-1)

    def rows(self, path: Path, sequences: Sequence[CustomSequence]) -> list[dict[str, Any]]:
        """A task row for each sequence. Sequences that a file gives one number count as one prompt.

        Raises UserError, naming the lines, where a number is another prompt's of the task, or one
        prompt has two numbers.
        """
        mistakes: dict[int, str] = {}
        for s in sequences:
            if s.prompt_index is None:
                continue
            key = _key(s.messages)
            if self._owner_of.get(s.prompt_index, key) != key:
                mistakes[s.line] = f"prompt_index {s.prompt_index} is another prompt's already: leave it out"
            elif (known := self._number_of.setdefault(key, s.prompt_index)) != s.prompt_index:
                mistakes[s.line] = f"this prompt has prompt_index {known} already"
            self._highest = max(self._highest, s.prompt_index)
        refuse_lines(path, mistakes)
        task_row = {_key(row["prompt"]): row for row in self.task_rows}
        keys = [_key(s.messages) for s in sequences]
        return [
            task_row.get(key) or {"prompt": s.messages, "prompt_index": self.number(key)}
            for key, s in zip(keys, sequences, strict=True)
        ]

    def number(self, key: str) -> int:
        """The number of a prompt that the task does not have; `key` identifies it."""
        if key not in self._number_of:
            self._highest += 1
            self._number_of[key], self._owner_of[self._highest] = self._highest, key
        return self._number_of[key]


def _key(messages: Any) -> str:
    return json.dumps(messages, sort_keys=True)


def read_custom_sequences(path: str | Path, system_prompt: str | None = None) -> list[CustomSequence]:
    """The sequences of a JSONL file, blank lines left out.

    Raises:
        UserError: a file that cannot be read or is empty, and for bad lines: all of them by number,
            the first few with what is wrong; also where only some lines have a reward or a weight.
    """
    file = regular_file(path, str(path))
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist (looked in {Path.cwd()})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    sequences: list[CustomSequence] = []
    mistakes: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sequences.append(_from_line(number, line, system_prompt))
        except ValueError as error:
            mistakes[number] = str(error)
    for name in ("reward", "weight"):
        without = [s.line for s in sequences if getattr(s, name) is None]
        if len(without) < len(sequences):
            mistakes |= {n: f"no {name!r}, which other lines have: give it on all lines or on none" for n in without}
    refuse_lines(file, mistakes)
    if not sequences:
        raise UserError(f'{path} holds no sequences: write one {{"prompt": ..., "completion": ...}} a line')
    return sequences


def refuse_lines(path: Path, mistakes: dict[int, str]) -> None:
    """Raises UserError where there are mistakes: every line by its number, the first few with their
    reasons.
    """
    if not mistakes:
        return
    numbers = sorted(mistakes)
    text = "; ".join(f"line {n}: {mistakes[n]}" for n in numbers[:_REASONS_SHOWN])
    if rest := numbers[_REASONS_SHOWN:]:
        listed = ", ".join(map(str, rest[:_NUMBERS_SHOWN])) + (", ..." if len(rest) > _NUMBERS_SHOWN else "")
        text += f"; and {len(rest)} more bad line{'s' * (len(rest) > 1)}: {listed}"
    raise UserError(f"{path}: {text}")


def _from_line(number: int, line: str, system_prompt: str | None) -> CustomSequence:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    for key in data:
        if key not in _KEYS and (near := get_close_matches(key, _KEYS, n=1, cutoff=0.8)):
            raise ValueError(f"unknown key {key!r}: did you mean {near[0]!r}?")
    for key in ("prompt", "completion"):
        if key not in data:
            raise ValueError(f"no {key!r}")
        check_values(data[key])
    segments = _segments(data["completion"])
    index = data.get("prompt_index")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**62):
        raise ValueError(f"'prompt_index' must be a whole number from 0 on, found {json.dumps(index)[:40]}")
    return CustomSequence(
        line=number,
        messages=_messages(data["prompt"], system_prompt),
        completion=data["completion"] if segments is None else "".join(text for text, _ in segments),
        segments=segments,
        prompt_index=index,
        **{name: _number(name, data.get(name)) for name in ("reward", "weight")},
    )


def _segments(completion: Any) -> tuple[tuple[str, bool], ...] | None:
    if isinstance(completion, str):
        return None
    if not isinstance(completion, list) or not completion:
        raise ValueError("'completion' must be text, or a list of {'text', 'drawn'} segments")
    for segment in completion:
        if not isinstance(segment, dict) or not {"text"} <= set(segment) <= {"text", "drawn"}:
            raise ValueError("a segment of 'completion' must be {'text'} or {'text', 'drawn'}")
        if not isinstance(segment["text"], str) or not isinstance(segment.get("drawn", True), bool):
            raise ValueError("a segment's 'text' must be text, its 'drawn' true or false")
    found = tuple((segment["text"], segment.get("drawn", True)) for segment in completion)
    if not any(text and drawn for text, drawn in found):
        raise ValueError("no segment of 'completion' with text was drawn by the policy: nothing can be scored")
    return found


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name!r} must be a finite number, found {json.dumps(value)[:40]}")
    return number


def _messages(prompt: Any, system_prompt: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    if not well_formed or not messages:
        raise ValueError("'prompt' must be text or a list of {'role', 'content'} messages")
    if not messages[-1]["content"].strip():
        raise ValueError("'prompt' is empty")
    if system_prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def as_sampled(tokenizer: Any, completion: str, sampling_config: SamplingConfig) -> list[int]:
    """The text as tokens of a completion: up to its first end-of-sequence token, one added where it
    has none, and cut at the sampling configuration's maximum length.
    """
    tokens = text_tokens(tokenizer, completion)
    ends = [k for k, token in enumerate(tokens) if token in sampling_config.eos_token_ids]
    own = tokenizer.eos_token_id
    eos = own if own in sampling_config.eos_token_ids else sampling_config.eos_token_ids[0]
    whole = tokens[: ends[0] + 1] if ends else [*tokens, eos]
    return whole[: sampling_config.max_completion_length]


def segments_as_tokens(
    tokenizer: Any, segments: Sequence[tuple[str, bool]], sampling_config: SamplingConfig
) -> tuple[list[int], list[bool]]:
    """(tokens, which of them were drawn): each segment's own, closed by an end-of-sequence token
    where the last one was drawn.
    """
    ids: list[int] = []
    drawn: list[bool] = []
    for text, own in segments:
        tokens = text_tokens(tokenizer, text)
        ids, drawn = ids + tokens, drawn + [own] * len(tokens)
    if drawn and drawn[-1] and ids[-1] not in sampling_config.eos_token_ids:
        eos = tokenizer.eos_token_id
        ids, drawn = (
            [*ids, eos if eos in sampling_config.eos_token_ids else sampling_config.eos_token_ids[0]],
            [*drawn, True],
        )
    return ids, drawn


def given_rollouts(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    plan: SamplingPlan,
    status: str,
    rewards: Sequence[float | None] | None = None,
    segments: Sequence[tuple[tuple[str, bool], ...] | None] | None = None,
) -> Rollouts:
    """Completions that were given, not drawn, in the form of rollouts: one for each task row.

    Args:
        segments: of completions that the policy did not write alone; None (of one, or of all) where
            it did.
    """
    ids, drawn = [], []
    for text, parts in zip(completions, segments or [None] * len(completions), strict=True):
        tokens, mask = (
            (as_sampled(tokenizer, text, plan.sampling_config), None)
            if parts is None
            else segments_as_tokens(tokenizer, parts, plan.sampling_config)
        )
        ids.append(tokens)
        drawn.append(None if mask is None or all(mask) else tuple(mask))
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    whole = tokenizer.batch_decode([text_tokens(tokenizer, text) for text in completions], skip_special_tokens=True)
    # decoding need not give back a text to the letter; where nothing was cut off, the text itself
    # is shown
    shown = [t if d == w else d for t, d, w in zip(completions, decoded, whole, strict=True)]
    prompts = tokenize_prompts(tokenizer, [row["prompt"] for row in rows], plan.sampling_config.rendering)
    rollouts = Rollouts(tuple(RolloutSequence(tuple(p), tuple(c)) for p, c in zip(prompts, ids, strict=True)))
    return rollouts.with_values(
        drawn=drawn,
        prompt_index=[int(row["prompt_index"]) for row in rows],
        prompt=[prompt_text(row["prompt"]) for row in rows],
        completion=shown,
        prompt_row=rows,
        reward=rewards if rewards is not None else [None] * len(rows),
        status=[status] * len(rows),
    )


def reference_rollouts(tokenizer: Any, rows: Sequence[dict[str, Any]], plan: SamplingPlan, status: str) -> Rollouts:
    """Each row's own answer as its completion.

    Raises:
        UserError: the task names no single answer.
    """
    without = [row["prompt_index"] for row in rows if not str(row.get("answer", "")).strip()]
    if without:
        raise UserError(
            f"prompt {without[0]} of the task {plan.task.name} has no reference completion ({len(without)} of {len(rows)} "
            "prompts have none): its data set accepts several answers; give a file instead (eval_sequences_path, "
            "train_sequences_path)"
        )
    return given_rollouts(tokenizer, rows, [row["answer"] for row in rows], plan, status)
