"""Whether completions come from the distribution that they are scored by, told from the completions
alone.

    x_k = -log pi(a_k | c_k) - H(c_k) ,        E[x_k | c_k] = 0  where a_k ~ pi(. | c_k) ,
    M = sum of x over all tokens so far ,      V = (1/3) sum x^2 + (2/3) sum Var[log pi | c_k] ,
    P( |M| >= sqrt((V + r) (log((V + r) / r) + 2 log(1 / alpha)))  at any time )  <=  alpha .

Surprisal and entropy have the same mean where a_k is drawn from pi: a truncated, penalised, colder
or otherwise altered sampler shifts one against the other, whatever its name. M is a martingale over
the tokens of all steps. As exp(x - x^2/6) is at most 1 + x + x^2/3 for every real x, exp(l M - l^2
V / 2) is a supermartingale for every l, whatever the size and the symmetry of x (Delyon 2009,
"Exponential inequalities for sums of weakly dependent variables"). Mixed over l ~ N(0, 1/r) it
bounds M at all times at once (Ville's inequality), so that looking at every step costs nothing: the
chance that a run of any length is alarmed without reason is at most alpha. r is where the bound is
tightest, in nats^2.

Source: docs/theory/double-sampling.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from rl_training.generation.rollout_sequences import to_batch
from rl_training.sampling import SamplingConfig
from rl_training.sequences import RolloutSequence

FALSE_ALARMS = 5e-4
_TIGHTEST = 30.0
_SEQUENCES, _PER_PROMPT = 16, 4
# Between one pass of its own and the next the number of steps grows by this factor.
_LOOK_EVERY = 2


@dataclass
class SurprisalCheck:
    """Adds up tokens over the steps of a run. All sums in nats or nats^2, float64."""

    difference: float = 0.0
    variance: float = 0.0
    tokens: int = 0

    def add(self, difference: float, variance: float, tokens: int) -> None:
        """Take in a step's sums, e.g. those of several processes added up; see `surprisal_sums`."""
        self.difference += difference
        self.variance += variance
        self.tokens += tokens

    def limit(self) -> float:
        """What |difference| stays below at all times, with probability 1 - FALSE_ALARMS."""
        whole = self.variance + _TIGHTEST
        return math.sqrt(whole * (math.log(whole / _TIGHTEST) + 2 * math.log(1 / FALSE_ALARMS)))

    @property
    def z(self) -> float:
        """The difference in standard deviations."""
        return self.difference / math.sqrt(self.variance) if self.variance > 0 else 0.0

    @property
    def alarmed(self) -> bool:
        """Whether the tokens seen so far do not come from the distribution that they are scored by."""
        return abs(self.difference) >= self.limit()

    def sentence(self) -> str:
        """For a warning: what was found, and what it does to the numbers."""
        each = self.difference / max(1, self.tokens)
        side = "likelier" if each < 0 else "less likely"
        return (
            f"completions are {side} than draws from softmax(logits / temperature) are: their surprisal and the entropy differ "
            f"by {each:+.3f} nats per token over {self.tokens} tokens (z = {self.z:+.1f}). The sampler is another (truncated, "
            "penalised, another temperature, engine or precision), or only some of what was drawn is trained on, or an earlier "
            "policy drew it: predicted and measured changes are those of the softmax, and can have the opposite sign"
        )


def surprisal_sums(statistics: TokenStatistics, batch: SequenceBatch) -> torch.Tensor:
    """(3,) float64 of sequences drawn by the policy of `statistics`: sums of x, of x^2/3 + 2 Var/3,
    and tokens.

    Args:
        statistics: with `surprisal_variances`. Add such sums up over steps and processes.
    """
    assert statistics.surprisal_variances is not None
    mask = batch.completion_mask.double()
    x = (-statistics.logprobs.double() - statistics.entropies.double()) * mask
    variance = statistics.surprisal_variances.double().clamp(min=0) * mask
    return torch.stack([x.sum(), (x.square() / 3 + 2 * variance / 3).sum(), mask.sum()]).to(torch.float64)


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
