"""Fresh completions of held-out prompts, and the prompts that the probe cannot draw them of as the
trainer would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from entropy_core.processes import Processes
from rl_training.errors import UserError
from rl_training.generation.drawn_tokens import environment_of
from rl_training.generation.model_inputs import row_beyond_text
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.sampling import SamplingConfig, draw
from rl_training.sequences import RolloutSequence


def refuse_prompts(trainer: Any, rows: Sequence[dict[str, Any]], source: str = "fresh") -> None:
    """Raises UserError where fresh completions of these rows would not be those that the trainer
    draws.
    """
    if (argument := environment_of(trainer)) is not None:
        raise UserError(
            f"rollouts={source}: the trainer has {argument}, and the probe cannot run an environment for completions of its own; "
            "watch the run's own with rollouts=current or rollouts=previous_step"
        )
    for row in rows:
        if (kind := row_beyond_text(row)) is not None:
            raise UserError(
                f"rollouts={source}: a prompt holds more than text ({kind}), which the probe does not pass on; give it rows of "
                "text alone (attach_entropy_probe(rows=...))"
            )


class FreshCompletions:
    """Draws completions of rows by today's policy, each process some, all of them the same list."""

    def __init__(self, trainer: Any, model: nn.Module, sampling_config: SamplingConfig, sharing: Processes) -> None:
        self._trainer, self._model, self._sampling_config, self._sharing = trainer, model, sampling_config, sharing

    def draw(self, rows: Sequence[dict[str, Any]], rng: np.random.Generator, each: int = 1) -> list[RolloutSequence]:
        """`each` completions of every row, in the order of the rows."""
        rank, size = self._sharing.rank, self._sharing.size
        mine, seed, drawn = list(rows)[rank::size], int(rng.integers(2**31)) + rank, []
        if mine:
            coder = text_tokenizer(self._trainer.processing_class)
            found = draw(self._model, coder, mine, each, self._sampling_config, seed, "evaluation")
            drawn = [RolloutSequence(s.prompt_ids, s.completion_ids) for s in found]  # a row may hold anything
        blocks = [drawn[i : i + each] for i in range(0, len(drawn), each)]
        places = range(rank, len(rows), size)
        gathered = self._sharing.gather(list(zip(places, blocks, strict=True)))
        return [sequence for _, block in sorted(gathered, key=lambda pair: pair[0]) for sequence in block]
