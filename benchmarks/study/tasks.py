"""The study's tasks, each with the small policy that learns it from worked answers before reinforcement learning begins.

sums     13+8-2|       the policy of benchmarks/probe_replay: three numbers, answered in one of three styles, some 15 tokens
chains   13+8-2+4-9|   five numbers, every partial sum shown, some 25 tokens
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from benchmarks.probe_replay import small_policy

ROOT = Path("runs/study")
TRAINED, HELD_OUT = 1024, 768


@dataclass(frozen=True)
class Task:
    """Attributes:
    longest: tokens of a completion at most. target: entropy that arms with a target hold, nats per token.
    """

    name: str
    longest: int
    target: float
    make: Callable[[Path], Path]

    def policy(self) -> Path:
        """The folder of the trained small policy; made where it is missing."""
        return self.make(ROOT / f"policy-{self.name}")

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training prompts and held-out ones, each with its answer."""
        lines = [json.loads(line) for line in (self.policy() / "problems.jsonl").read_text().splitlines()]
        rows = [{"prompt": f"{line['prompt']}|", "answer": line["answer"]} for line in lines]
        Random(1).shuffle(rows)
        return rows[:TRAINED], rows[TRAINED : TRAINED + HELD_OUT]

    def dataset(self) -> Dataset:
        return Dataset.from_list(self.rows()[0])


def right(completions: list[str], answer: list[str], **_columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer."""
    numbers = [re.findall(r"-?\d+", text) for text in completions]
    return [float(bool(n) and n[-1] == a) for n, a in zip(numbers, answer, strict=True)]


def _sums(folder: Path) -> Path:
    return small_policy.make_policy(folder)


def _chains(folder: Path) -> Path:
    return small_policy.make_policy(folder, terms_each=5)


TASKS = {"sums": Task("sums", 24, 0.40, _sums), "chains": Task("chains", 48, 0.30, _chains)}
