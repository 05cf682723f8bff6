"""A pool of fresh sequences of distinct held-out prompts, each watched for several steps and then replaced.

What is watched across a step was drawn by a policy up to `age` steps old, and is weighted to today's by its log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.scores import token_statistics
from rl_training.generation.rollout_sequences import to_batch
from rl_training.sampling import SamplingConfig, draw
from rl_training.sequences import RolloutSequence

POOL_AGE = 8
"""Of a recording that says nothing else."""


@dataclass(frozen=True)
class _Watched:
    """row: of its prompt; drawn_score: its log-probability when it was drawn."""

    row: int
    sequence: RolloutSequence
    drawn_score: float


class Pool:
    """`size` slots; slot j is drawn anew in the steps whose number less one has j's remainder by `age`, all in the first."""

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        sampling_config: SamplingConfig,
        size: int,
        age: int = POOL_AGE,
    ) -> None:
        self._trainer, self._model, self._rows, self._sampling_config = trainer, model, rows, sampling_config
        self._size, self._age = size, age
        self._watched: list[_Watched] = []

    def turn(self, step: int) -> tuple[SequenceBatch, list[float]]:
        """Draw what is due at `step` (from 1) and return all sequences with their log-probabilities when drawn."""
        first = not self._watched
        slots = [j for j in range(self._size) if first or j % self._age == (step - 1) % self._age]
        rng = np.random.default_rng((self._trainer.args.seed, step, 6))
        taken = {w.row for w in self._watched}
        chosen = [int(i) for i in rng.permutation(len(self._rows)) if i not in taken][: len(slots)]
        coder, rows = self._trainer.processing_class, [self._rows[i] for i in chosen]
        found = draw(self._model, coder, rows, 1, self._sampling_config, 104729 + step, "")
        scores = token_statistics(self._model, found.to_batch(self._sampling_config)).scores().tolist()
        new = [_Watched(*drawn) for drawn in zip(chosen, found, scores, strict=True)]
        if first:
            self._watched = new
        for slot, watched in zip(slots, new, strict=True):
            self._watched[slot] = watched
        return to_batch([w.sequence for w in self._watched], self._sampling_config), [
            w.drawn_score for w in self._watched
        ]
