"""One recorded sequence in the terms of this project, and the table of them that every reader of a dump makes.

Columns of the table, all but the first two optional; null where a value was not recorded:

    prompt_ids, completion_ids    token ids, prompt and completion as the policy saw them; or
    prompt, completion            their texts (or chat messages), to be tokenised; see `PromptForm`
    completion_mask               which tokens of completion_ids the policy drew; one run or several
    reward, advantage, weight     w_i of the loss gradient g = -sum_i w_i dS_i is `weight`, or follows from one of the others
    sampler_logprobs              log-probability of each completion token as the sampler reported it, nats
    group                         sequences of one group share a baseline
    step                          the optimizer step that was made of the sequence, counted from 1
    temperature                   at which it was drawn
    truncated                     whether it was cut before an end-of-sequence token

docs/guides/rollouts.md describes the same as a file format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from rl_training.errors import UserError
from rl_training.files import write_whole_by

PromptForm = Literal["chat", "plain", "templated", "stripped"]
"""What a prompt's text is: messages or a user's text that the chat template goes around (chat); text that was tokenised as it
is (plain); the template's own output (templated), or that with its special tokens removed (stripped)."""

LARGEST_TOKEN = 2**31 - 1
_REASONS_SHOWN, _NUMBERS_SHOWN = 5, 40

SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int64())),
        ("completion_ids", pa.list_(pa.int64())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("prompt", pa.string()),
        ("prompt_form", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("weight", pa.float64()),
        ("sampler_logprobs", pa.list_(pa.float64())),
        ("group", pa.string()),
        ("step", pa.int64()),
        ("temperature", pa.float64()),
        ("truncated", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class RolloutRow:
    """One sequence. place: where it stands in its file, for errors, such as "line 3"."""

    place: str
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    completion_mask: list[bool] | None = None
    prompt: Any = None
    prompt_form: PromptForm = "chat"
    completion: str | None = None
    reward: float | None = None
    advantage: float | None = None
    weight: float | None = None
    sampler_logprobs: list[float | None] | None = None
    group: str | None = None
    step: int | None = None
    temperature: float | None = None
    truncated: bool | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, in words for a user, where parts are missing or contradict each other."""
        if (self.prompt_ids is None) != (self.completion_ids is None):
            have, lack = (
                ("prompt_ids", "completion_ids") if self.completion_ids is None else ("completion_ids", "prompt_ids")
            )
            raise ValueError(f"{have} without {lack}: give token ids of both, or the texts of both")
        if self.prompt_ids is None:
            if self.prompt is None or self.completion is None:
                raise ValueError("neither token ids nor texts of both prompt and completion")
            for name in ("completion_mask", "sampler_logprobs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is by token, and there are no token ids: give prompt_ids and completion_ids"
                    )
            return
        assert self.completion_ids is not None
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: nothing predicts the first token; leave the row out")
        if not self.completion_ids:
            raise ValueError("completion_ids is empty: the policy drew nothing; leave the row out")
        for name in ("completion_mask", "sampler_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                raise ValueError(
                    f"{name} has {len(values)} entries, completion_ids {len(self.completion_ids)}: give one a token"
                )
        if self.completion_mask is not None and not any(self.completion_mask):
            raise ValueError("completion_mask is false everywhere: the policy drew nothing; leave the row out")

    @property
    def drawn_logprobs(self) -> list[float | None]:
        """The sampler's log-probabilities of the drawn tokens; None where one was not recorded."""
        values = self.sampler_logprobs or []
        return [v for v, drawn in zip(values, self.completion_mask or [True] * len(values), strict=True) if drawn]


@dataclass(frozen=True)
class RolloutTable:
    """The sequences of a dump. format: of which trainer, in words; notes: what a reader has to say about all of them."""

    path: Path
    format: str
    rows: list[RolloutRow]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps that rows name, in order."""
        return sorted({row.step for row in self.rows if row.step is not None})

    def write(self, path: Path) -> Path:
        """Write the table as parquet, whole or not at all; `import_rollouts` reads it back equal."""
        columns = [
            {
                **{name: getattr(row, name) for name in SCHEMA.names},
                "prompt": row.prompt if row.prompt is None or isinstance(row.prompt, str) else json.dumps(row.prompt),
            }
            for row in self.rows
        ]
        said = {
            b"rollouts": json.dumps({"format": self.format, "source": str(self.path), "notes": self.notes}).encode()
        }
        table = pa.Table.from_pylist(columns, schema=SCHEMA.with_metadata(said))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_by(path, lambda part: pq.write_table(table, part))
        return path


@dataclass
class Mistakes:
    """Bad rows of a file by number: every one is named, the first few with what is wrong."""

    path: Path
    unit: str
    by_number: dict[int, str] = field(default_factory=dict)

    def add(self, number: int, what: object) -> None:
        self.by_number.setdefault(number, str(what))

    def refuse(self) -> None:
        """Raises UserError where there are any."""
        if not self.by_number:
            return
        numbers = sorted(self.by_number)
        text = "; ".join(f"{self.unit} {n}: {self.by_number[n]}" for n in numbers[:_REASONS_SHOWN])
        if rest := numbers[_REASONS_SHOWN:]:
            listed = ", ".join(map(str, rest[:_NUMBERS_SHOWN])) + (", ..." if len(rest) > _NUMBERS_SHOWN else "")
            text += f"; and {len(rest)} more bad {self.unit}{'s' * (len(rest) > 1)}: {listed}"
        raise UserError(f"{self.path}: {text}")


def tokens(name: str, value: Any) -> list[int] | None:
    """Token ids. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of token ids, found {_shown(value)}")
    for token in value:
        if type(token) is not int or not 0 <= token <= LARGEST_TOKEN:
            raise ValueError(f"{name} holds {_shown(token)}, which is no token id")
    return list(value)


def mask(name: str, value: Any) -> list[bool] | None:
    """True or false (or 1 and 0) of each token. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or any(v not in (0, 1) or isinstance(v, str) for v in value):
        raise ValueError(f"{name} must be a list of true and false, found {_shown(value)}")
    return [bool(v) for v in value]


def number(name: str, value: Any) -> float | None:
    """A finite number. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ValueError(f"{name} must be a finite number, found {_shown(value)}")
    return float(value)


def positive(name: str, value: Any) -> float | None:
    """A finite number above 0. Raises ValueError for anything else."""
    found = number(name, value)
    if found is not None and not found > 0:
        raise ValueError(f"{name} must be positive, found {_shown(value)}")
    return found


def logprobs(name: str, value: Any) -> list[float | None] | None:
    """Log-probabilities, at most 0 up to rounding; null and NaN: not recorded. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of log-probabilities, found {_shown(value)}")
    found: list[float | None] = []
    for v in value:
        if v is not None and (isinstance(v, bool) or not isinstance(v, int | float)):
            raise ValueError(f"{name} holds {_shown(v)}, which is no log-probability")
        if v is not None and v > 1e-3:
            raise ValueError(
                f"{name} holds {_shown(v)}: a log-probability is at most 0 (probabilities? give their logarithms)"
            )
        if v is not None and math.isinf(v):
            raise ValueError(f"{name} holds {_shown(v)}: a token of probability 0 cannot have been drawn")
        found.append(None if v is None or math.isnan(v) else float(v))
    return found


def whole(name: str, value: Any) -> int | None:
    """A whole number from 0 on. Raises ValueError for anything else."""
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{name} must be a whole number from 0 on, found {_shown(value)}")
    return value


def truth(name: str, value: Any) -> bool | None:
    """true or false. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, found {_shown(value)}")
    return value


def text(name: str, value: Any) -> str | None:
    """Text of whole characters. Raises ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, found {_shown(value)}")
    if "\0" in value:
        raise ValueError(f"{name} holds the character NUL")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object; an empty one for null. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, found {_shown(value)}")
    return value or {}


def listed(name: str, value: Any) -> list[Any]:
    """A list; an empty one for null. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{name} must be a list, found {_shown(value)}")
    return value or []


def messages(name: str, value: Any) -> list[dict[str, str]]:
    """Chat messages of texts. Raises ValueError for anything else, and for an empty list."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be text or a list of chat messages, found {_shown(value)}")
    found = []
    for message in value:
        # parquet gives every struct every key: what is null was not there
        parts = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if not {"role", "content"} <= set(parts) or not isinstance(parts["role"], str):
            raise ValueError(f"{name} must hold messages of role and content, found {_shown(message)}")
        if other := sorted(set(parts) - {"role", "content"}):
            raise ValueError(
                f"{name} has a message with {other[0]!r}, which only the run's own template knows: save token ids"
            )
        found.append({"role": parts["role"], "content": text(f"a message of {name}", parts["content"]) or ""})
    return found


def prompt_form(value: Any) -> PromptForm:
    """The form a table names; chat where it names none. Raises ValueError for another word."""
    if value is None:
        return "chat"
    if value not in get_args(PromptForm):
        raise ValueError(f"prompt_form must be one of {', '.join(get_args(PromptForm))}, found {_shown(value)}")
    return value


def all_or_none(rows: Sequence[RolloutRow], mistakes: Mistakes, numbers: Sequence[int]) -> None:
    """Note every row without the weight that others have; where none has one, without the advantage; else the reward."""
    for name in ("weight", "advantage", "reward"):
        without = [n for row, n in zip(rows, numbers, strict=True) if getattr(row, name) is None]
        for n in without if len(without) < len(rows) else ():
            mistakes.add(n, f"no {name}, which other rows have: give it on all rows or on none")
        if len(without) < len(rows):
            return


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    return repr(value)[:40]
