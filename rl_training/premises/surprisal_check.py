"""Whether a trainer's completions come from the distribution that they are scored by: the check of
rl_training.probe.surprisal, run on its own rollouts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from rl_training.generation.rollout_sequences import to_batch
from rl_training.probe.surprisal import SurprisalCheck, surprisal_sums
from rl_training.sampling import SamplingConfig
from rl_training.sequences import RolloutSequence

_SEQUENCES, _PER_PROMPT = 16, 4
# Between one pass of its own and the next the number of steps grows by this factor.
_LOOK_EVERY = 2


class SamplerWatch:
    """Runs the check on a trainer's own rollouts, and warns once.

    Where the probe computes statistics of sequences that today's policy has just drawn, `take` uses
    these: every such step is looked at, for one more sum over the vocabulary. Where it watches
    other sequences (held-out ones, those of the step before), `look` makes a forward pass of its
    own at the first, second, fourth ... step: what a sampler does it does from the start.
    """

    def __init__(self, trainer: Any) -> None:
        self.check = SurprisalCheck()
        self._trainer = trainer
        self._steps, self._next = 0, 1
        self._drawn_now = self._warned = False

    def state(self) -> list[Any]:
        """What has been looked at, for `load`."""
        check = self.check
        return [self._steps, self._next, self._warned, check.difference, check.variance, check.tokens]

    def load(self, state: Any) -> None:
        """Go on from `state`. Raises ValueError."""
        kinds = (int, int, bool, float, float, int)
        if not isinstance(state, list) or [type(value) for value in state] != list(kinds):
            raise ValueError("what was looked at of the sampler is not recorded")
        self._steps, self._next, self._warned = state[:3]
        self.check = SurprisalCheck(*state[3:])

    def step_begins(self) -> None:
        """Call it before the step's first micro-batch: only then is it known whether the trainer
        will generate.
        """
        args = self._trainer.args
        every = int(getattr(args, "steps_per_generation", 1) or 1) * int(getattr(args, "num_iterations", 1) or 1)
        self._drawn_now = getattr(self._trainer, "_step", 0) % every == 0

    @property
    def wanted(self) -> bool:
        """Whether statistics of what this step drew, with their variances, would be looked at."""
        return self._drawn_now and not self._warned

    def take(self, statistics: TokenStatistics, batch: SequenceBatch) -> None:
        """Take in the statistics of sequences drawn in this step.

        Args:
            statistics: of sequences that today's policy drew in this step, chosen without a look at
                them; the same in every process.
        """
        if not self.wanted:
            return
        difference, variance, tokens = surprisal_sums(statistics, batch).tolist()
        self.check.add(difference, variance, int(tokens))
        if self.check.alarmed:
            self._warned = True
            warnings.warn(f"entropy probe: {self.check.sentence()}", UserWarning, stacklevel=2)

    def look(
        self,
        generated: Sequence[RolloutSequence],
        sampling_config: SamplingConfig,
        statistics: Callable[..., TokenStatistics],
    ) -> None:
        """Look at some of a step's sequences, where they are needed.

        Args:
            generated: the step's sequences before any was rejected, of all processes, the same list
                in each.
            statistics: `SimpleEntropyProbe.statistics`.
        """
        if not (self.wanted and generated):
            return
        self._steps += 1
        if self._steps < self._next:
            return
        self._next *= _LOOK_EVERY
        batch = to_batch(_some(generated), sampling_config).to(self._trainer.accelerator.device)
        self.take(statistics(batch, with_variances=True), batch)


def _some(generated: Sequence[RolloutSequence]) -> list[RolloutSequence]:
    """At most `_SEQUENCES`, up to `_PER_PROMPT` of a prompt, whose tokens pass through the model
    once.

    Which ones has nothing to do with what was drawn.
    """
    by_prompt: dict[tuple[int, ...], list[RolloutSequence]] = {}
    for sequence in generated:
        by_prompt.setdefault(sequence.prompt_ids, []).append(sequence)
    each = max(_PER_PROMPT, -(-_SEQUENCES // len(by_prompt)))
    return [s for members in by_prompt.values() for s in members[:each]][:_SEQUENCES]
