"""Every sequence that a GRPOTrainer generates for training, whether it is trained on in the same
step, later, or never.

A trainer may put what it generates into a buffer and train on something older (asynchronous
training, replay). The older sequences are then new to `compute_loss`, and nothing in a batch tells
when they were drawn: only the generation does.
"""

from __future__ import annotations

from typing import Any

from entropy_core.processes import Processes
from rl_training.generation.drawn_tokens import drawn_masks
from rl_training.sequences import RolloutSequence


class GeneratedSequences:
    """Listens to `trainer._generate` while the model is in training mode; a trainer without it
    generates unseen.
    """

    def __init__(self, trainer: Any, sharing: Processes) -> None:
        self._sharing = sharing
        self._sequences: list[RolloutSequence] = []
        generate = getattr(trainer, "_generate", None)
        if generate is None:
            return

        def listening(*args: Any, **kwargs: Any) -> Any:
            found = generate(*args, **kwargs)
            if trainer.model.training:
                self._take_in(found)
            return found

        trainer._generate = listening

    def _take_in(self, generated: Any) -> None:
        """Keep the sequences of one generation.

        Args:
            generated: (prompts, completions, masks of drawn tokens or None, ...), lists with one
                entry a sequence.
        """
        if not isinstance(generated, tuple) or len(generated) < 3:
            return
        prompts, completions, masks = *generated[:2], drawn_masks(generated)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            drawn = None if masks is None else tuple(masks[i])
            if len(completion) and (drawn is None or any(drawn)):
                drawn = None if drawn is None or all(drawn) else drawn
                self._sequences.append(RolloutSequence(tuple(prompt), tuple(completion), drawn=drawn))

    def take(self) -> list[RolloutSequence]:
        """Those generated since the last call, of all processes; call it in each."""
        taken, self._sequences = self._sequences, []
        return self._sharing.gather(taken)
