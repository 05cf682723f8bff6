"""A pool of fresh sequences of distinct held-out prompts, each watched for several steps and then replaced.

The step's own sequences are what the step learns from: its change of entropy on them is not the policy's (up to three times as
large where all weights are trained, benchmarks/probe_replay). Sequences of other prompts know nothing of the step; to draw all of
them anew each time would cost more than the rest of the probe, so each stays for `age` steps and is weighted to today's policy by
its log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_training.sequences import RolloutSequence

Draw = Callable[[Sequence[dict[str, Any]], np.random.Generator], list[RolloutSequence]]


@dataclass
class _Member:
    """name: unique in a run. drawn_score: its log-probability at drawing, nats; None until a pass has told it."""

    name: str
    row: int
    sequence: RolloutSequence
    drawn_score: float | None = None


class SequencePool:
    """Call `turn` before each watched step, then `scored` with the pass before the step.

    Args:
        rows: the prompts to draw from.
        size: sequences; where there are fewer prompts some have several.
        age: watched steps that a sequence stays.
        draw: draws one completion for each of some rows, the same in all processes.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], size: int, age: int, draw: Draw) -> None:
        self._rows, self._size, self._age, self._draw = rows, size, age, draw
        self._members: list[_Member] = []
        self._drawn = 0

    def turn(self, rng: np.random.Generator) -> list[RolloutSequence]:
        """Replace the oldest sequences (all of them at first, else one in `age`) and return all, the oldest first."""
        leaving = -(-self._size // self._age) if self._members else 0
        self._members = self._members[leaving:]
        wanted, taken = self._size - len(self._members), {m.row for m in self._members}
        order = [int(i) for i in rng.permutation(len(self._rows))]
        free = [i for i in order if i not in taken] + [i for i in order if i in taken]
        rows = [free[k % len(free)] for k in range(wanted)]
        for row, sequence in zip(rows, self._draw([self._rows[i] for i in rows], rng), strict=True):
            self._members.append(_Member(str(self._drawn), row, sequence))
            self._drawn += 1
        return [m.sequence for m in self._members]

    @property
    def names(self) -> list[str]:
        """Of the sequences that `turn` returned, in their order."""
        return [m.name for m in self._members]

    def scored(self, scores: Tensor) -> Tensor:
        """Of today's (N,) log-probabilities, which new sequences were drawn at, the (N,) ones at drawing of all."""
        for member, score in zip(self._members, scores.tolist(), strict=True):
            if member.drawn_score is None:
                member.drawn_score = score
        drawn = [m.drawn_score for m in self._members]
        return torch.tensor(drawn, dtype=torch.float64, device=scores.device)

    def clear(self) -> None:
        """Begin anew at the next turn."""
        self._members = []
