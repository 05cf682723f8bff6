"""The range of every field of a checkpoint's record: what a run can have had. Outside lies damage, or a stranger's invention.

A value out of its range is refused when the record is read; what depends on the model (ids against its vocabulary) is held
against it later (entropy_experiments.checkpoints.validation). Types are strict and numbers finite as well.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

_MOST_TEXT, _MOST_SETTINGS, _DEEPEST = 4096, 1 << 20, 20


def _one_line(text: str) -> str:
    if "\0" in text:
        raise ValueError("must hold no NUL")
    return text


def _distinct(ids: list[int]) -> list[int]:
    if len(set(ids)) < len(ids):
        raise ValueError("must name each id once")
    return ids


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if _depth(value) > _DEEPEST or len(json.dumps(value, allow_nan=False)) > _MOST_SETTINGS:
        raise ValueError(f"must have at most {_MOST_SETTINGS:,} characters and {_DEEPEST} levels")
    return value


def _depth(value: Any, level: int = 0) -> int:
    if level > _DEEPEST or not isinstance(value, dict | list):
        return level
    parts = value.values() if isinstance(value, dict) else value
    return max((_depth(part, level + 1) for part in parts), default=level)


def _rates_of_prompts(value: dict[str, list[float]]) -> dict[str, list[float]]:
    if value.keys() != {"passes", "failures"} or len(value["passes"]) != len(value["failures"]):
        raise ValueError("must hold passes and failures of equally many prompts")
    return value


Text = Annotated[str, Field(min_length=1, max_length=_MOST_TEXT), AfterValidator(_one_line)]
LongText = Annotated[str, Field(max_length=1 << 16), AfterValidator(_one_line)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Settings = Annotated[dict[str, Any], AfterValidator(_small)]
TaskSettings = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(_small)]
Texts = Annotated[list[Text], Field(max_length=10_000)]

Step = Annotated[int, Field(ge=0, le=10**9)]
Processes = Annotated[int, Field(ge=1, le=10**6)]
Sequences = Annotated[int, Field(ge=1, le=10**6)]
"""Prompts of a step, completions of a prompt."""
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]
"""Of a completion."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
EndTokens = Annotated[list[TokenId], Field(max_length=1000), AfterValidator(_distinct)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20)]

Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=10**7)]
LearningRate = Annotated[float, Field(ge=0, le=10)]
LARGEST_LEARNING_RATE = 10.0
LARGEST_GRADIENT_NORM = 1e30
GradientNorm = Annotated[float, Field(ge=0, le=LARGEST_GRADIENT_NORM)]
"""0: gradients are not clipped."""
Rounds = Annotated[int, Field(ge=0, le=10**6)]
Score = Annotated[float, Field(ge=-1e7, le=1e-3)]
"""Log-probability of a completion, nats."""
Error = Annotated[float, Field(ge=0)]
Count = Annotated[float, Field(ge=0, le=1e12)]
PassCounts = Annotated[dict[str, list[Count]], AfterValidator(_rates_of_prompts)]

Precision = Literal["float32", "bfloat16", "float16", "float64"]
Autocast = Literal["no", "bf16", "fp16", "fp8"]
Scheme = Literal["dr_grpo"]
"""The one that this project's trainer has; weights of another would be others."""
Normalizer = Literal["constant", "prompt_longest"]
