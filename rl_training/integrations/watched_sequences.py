"""Which of a trainer's sequences the probe watches in a step, and how likely each was when it was drawn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.generation.rollout_sequences import choose, to_batch
from rl_training.premises.drawn_policies import DrawnPolicies
from rl_training.sampling import SamplingConfig
from rl_training.sequences import RolloutSequence


@dataclass(frozen=True)
class Watched:
    """drawn: (N,) log-probabilities when they were drawn, None where today's policy drew all."""

    sequences: list[RolloutSequence]
    drawn: Tensor | None


class WatchedSequences:
    """Call `begin` in every step before the optimizer moves, then `choose` where sequences are watched, then `end`.

    generation: the sequences of a generation that was made in this step, by micro-batch, for this step and later ones (empty
    where no later one trains on them); None where this step made none, so that its sequences are of an earlier one's.
    """

    def __init__(
        self, trainer: Any, config: EntropyProbeConfig, sampling_config: SamplingConfig, probe: SimpleEntropyProbe
    ) -> None:
        self._config, self._sampling_config, self._probe = config, sampling_config, probe
        self._device = trainer.accelerator.device
        args = trainer.args
        self._micro_batches = int(args.gradient_accumulation_steps)
        iterations = int(getattr(args, "num_iterations", 1) or 1)
        of_generation = int(getattr(args, "steps_per_generation", 0) or self._micro_batches) * iterations
        self.reused = of_generation > self._micro_batches
        """Whether the trainer's settings say that a generation is trained on in several steps."""
        self._policies = DrawnPolicies()
        self._replays = False
        self._step, self._made, self._stale = 0, False, False
        self._generation: Sequence[Sequence[RolloutSequence]] = []
        self._said: set[str] = set()

    def begin(self, step: int, generation: Sequence[Sequence[RolloutSequence]] | None) -> None:
        self._step, self._made, self._stale = step, generation is not None, self.reused and generation is None
        self._generation = generation or []

    def choose(self, generated: Sequence[RolloutSequence], rng: np.random.Generator) -> Watched:
        """Some of the step's sequences; none where it cannot be known which policy drew them, with a warning once."""
        known = self._policies.known(generated, self._step) if self._stale else []
        chosen = self._some(known if len(known) > 1 else generated, rng)
        recorded = any(s.drawn_score is not None for s in chosen) and not self._made
        if not (self._stale or recorded or self._policies.seen_before(chosen, self._step)):
            return Watched(chosen, None)
        found = self._weighted(chosen)
        if found.unknown:
            known = self._policies.known(generated, self._step)
            if len(known) > len(found.places):
                chosen = self._some(known, rng)
                found = self._weighted(chosen)
        self._replays = self._replays or found.replayed > 0
        if len(found.places) < 2:
            self._say(
                "the trainer trains on sequences of an earlier step that the probe made no pass over, so their weight for "
                "today's policy is not known: such a step is not measured, and is predicted by earlier gradients"
            )
            return Watched([], None)
        if found.doubtful:
            self._say(
                "the log-probabilities that the trainer recorded say that another policy drew its sequences than today's, and "
                "are too coarse to weight them by: entropies are those on the sequences as they are"
            )
        return Watched([chosen[i] for i in found.places], found.scores)

    def scores_at_drawing(self, watched: Watched) -> list[float]:
        """Log-probabilities of sequences when they were drawn, by a pass under today's policy where that drew them."""
        if watched.drawn is not None:
            return watched.drawn.tolist()
        scores = self._scores(watched.sequences)
        self._policies.remember(watched.sequences, scores, self._step)
        return scores.tolist()

    def end(
        self,
        generated: Sequence[RolloutSequence],
        watched: Watched,
        scores: Tensor | None,
        drawn: Sequence[RolloutSequence] = (),
    ) -> None:
        """The optimizer is about to move. scores: (N,) of `watched` under today's policy, None where nothing was observed.
        drawn: what the trainer generated in this step, trained on in it or not.

        Takes scores of sequences that a later step will train on, while the policy is the one that drew them.
        """
        if scores is not None and watched.sequences:
            self._policies.remember(watched.sequences, scores, self._step)
        self._policies.note(generated, self._step)
        later = [self._new(part) for part in self._generation] if self.reused else []
        if not self.reused and self._replays:
            later = [self._new(drawn or generated)]
        each = -(-self._config.eval_sequences // (self._micro_batches if self.reused else 1))
        wanted = [s for part in later for s in part[:each]]
        if wanted:
            self._policies.remember(wanted, self._scores(wanted), self._step)
        for part in (*self._generation, drawn):
            self._policies.note(part, self._step)

    # ------------------------------------------------------------------ for a checkpoint
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, for `load`."""
        tensors, values = self._policies.state()
        return tensors, {**values, "replays": self._replays}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. Raises ValueError for what it did not give."""
        if not isinstance(values.get("replays"), bool):
            raise ValueError("its record of known sequences is incomplete")
        self._policies.load(tensors, values)
        self._replays = values["replays"]

    def _new(self, sequences: Sequence[RolloutSequence]) -> list[RolloutSequence]:
        return [s for s in sequences if self._policies.wants_score(s, self._step)]

    def _weighted(self, chosen: Sequence[RolloutSequence]) -> Any:
        return self._policies.drawn(chosen, self._scores(chosen), self._step, self._stale)

    def _scores(self, sequences: Sequence[RolloutSequence]) -> Tensor:
        return self._probe.statistics(to_batch(sequences, self._sampling_config).to(self._device)).scores()

    def _some(self, sequences: Sequence[RolloutSequence], rng: np.random.Generator) -> list[RolloutSequence]:
        return choose(sequences, self._config.eval_sequences, self._config.completions_per_prompt, rng)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"the entropy probe: {text}", RuntimeWarning, stacklevel=2)
