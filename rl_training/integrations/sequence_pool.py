"""A pool of fresh sequences of distinct held-out prompts, each watched for several steps and then replaced.

The step's own sequences are what the step learns from: its change of entropy on them is not the policy's (up to three times as
large where all weights are trained, benchmarks/probe_replay). Sequences of other prompts know nothing of the step; to draw all of
them anew each time would cost more than the rest of the probe, so each stays for up to `age` steps and is weighted to today's
policy by its log-probability. One half is drawn at a time, since a few sequences cost nearly what many do.

While the policy moves fast the weights degenerate, and what is measured is nearer to 0 than the truth. So the older half goes
early, and then all, where less than ENOUGH of the sequences would count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_core.entropy import effective_sample_size
from rl_training.sequences import RolloutSequence

ENOUGH = 0.5
"""Part of the sequences that must count once they are weighted to today's policy."""

Draw = Callable[[Sequence[dict[str, Any]], np.random.Generator], list[RolloutSequence]]


@dataclass(frozen=True)
class _Member:
    """name: unique in a run. row: of its prompt. born: step that it was drawn before (of the first half: as if it had been).
    drawn_score, score: its log-probability at drawing and as last seen, nats; None until a pass has told them.
    """

    name: str
    row: int
    born: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    drawn_score: float | None = None
    score: float | None = None

    @property
    def log_weight(self) -> float:
        return 0.0 if self.score is None or self.drawn_score is None else self.score - self.drawn_score


class SequencePool:
    """Call `turn` before what is watched, `scored` with the pass before it and with the one after it.

    Args:
        rows: the prompts to draw from.
        size: sequences; where there are fewer prompts some have several.
        age: steps of the optimizer that a sequence stays at most.
        draw: draws one completion for each of some rows, the same in all processes.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], size: int, age: int, draw: Draw) -> None:
        self._rows, self._size, self._age, self._draw = rows, size, age, draw
        self._members: list[_Member] = []
        self._drawn = 0

    def turn(self, step: int, rng: np.random.Generator) -> list[RolloutSequence]:
        """Replace what is too old or too far from today's policy, and return all, the oldest first. step: counted from 0."""
        first = not self._members
        self._members = self._staying(step)
        wanted, taken = self._size - len(self._members), {m.row for m in self._members}
        order = [int(i) for i in rng.permutation(len(self._rows))]
        free = [i for i in order if i not in taken] + [i for i in order if i in taken]
        rows = [free[k % len(free)] for k in range(wanted)]
        drawn = self._draw([self._rows[i] for i in rows], rng) if rows else []
        for k, (row, s) in enumerate(zip(rows, drawn, strict=True)):
            early = first and k < self._size // 2  # so that the halves take turns from the beginning
            born = step - self._age // 2 if early else step
            self._members.append(_Member(str(self._drawn), row, born, s.prompt_ids, s.completion_ids))
            self._drawn += 1
        return [RolloutSequence(m.prompt_ids, m.completion_ids) for m in self._members]

    def _staying(self, step: int) -> list[_Member]:
        """Young enough, and of these the youngest so many that with new ones in the others' place enough would count."""
        staying = [m for m in self._members if step - m.born < self._age]
        for born in sorted({m.born for m in staying}):
            weights = torch.tensor([m.log_weight for m in staying] + [0.0] * (self._size - len(staying)))
            if effective_sample_size(weights.double().exp()) >= ENOUGH * self._size:
                break
            staying = [m for m in staying if m.born > born]
        return staying

    @property
    def names(self) -> list[str]:
        """Of the sequences that `turn` returned, in their order."""
        return [m.name for m in self._members]

    @property
    def prompt_rows(self) -> list[dict[str, Any]]:
        """Of the same, the rows that their prompts are from."""
        return [self._rows[m.row] for m in self._members]

    def scored(self, scores: Tensor) -> Tensor:
        """Of today's (N,) log-probabilities, which new sequences were drawn at, the (N,) ones at drawing of all."""
        values = zip(self._members, scores.tolist(), strict=True)
        self._members = [
            replace(m, score=s, drawn_score=s if m.drawn_score is None else m.drawn_score) for m, s in values
        ]
        drawn = [m.drawn_score for m in self._members]
        return torch.tensor(drawn, dtype=torch.float64, device=scores.device)

    def clear(self) -> None:
        """Begin anew at the next turn."""
        self._members = []

    # ------------------------------------------------------------------ for a trainer's state
    def state(self) -> dict[str, Any]:
        """Numbers and tokens, for `load`."""
        return {"drawn": self._drawn, "members": [asdict(m) for m in self._members]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: the same prompts to draw from are assumed.

        Raises:
            ValueError: what is not a state of a pool.
        """
        drawn, members = state.get("drawn"), state.get("members")
        if not _is_count(drawn) or not isinstance(members, list):
            raise ValueError("the pool is incomplete")
        self._members, self._drawn = [self._checked(m) for m in members][: self._size], drawn

    def _checked(self, found: Any) -> _Member:
        if not isinstance(found, Mapping) or found.keys() != _Member.__dataclass_fields__.keys():
            raise ValueError("a sequence of the pool is incomplete")
        tokens = [found["prompt_ids"], found["completion_ids"]]
        if not all(isinstance(ids, list | tuple) and ids and all(map(_is_count, ids)) for ids in tokens):
            raise ValueError("the tokens of a pooled sequence are not tokens")
        scores = (found["drawn_score"], found["score"])
        if not all(isinstance(s, float) and np.isfinite(s) for s in scores):
            raise ValueError("a pooled sequence has no log-probability")
        born = found["born"]
        if not _is_count(found["row"]) or found["row"] >= len(self._rows) or not isinstance(born, int):
            raise ValueError("a pooled sequence is of no prompt, or no step")
        return _Member(str(found["name"]), found["row"], born, *(tuple(ids) for ids in tokens), *scores)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
