"""Which prompts to draw next: running pass rates, and a weight that prefers prompts solved about
half of the time.

A prompt whose completions all succeed or all fail gives zero advantage and no gradient. With a
Beta(1, 1) prior and (decayed) counts of passes and failures, the expected within-group variance of
a 0/1 reward is

    w(p) = E[q (1 - q)] = a b / ((a + b)(a + b + 1)),        a = 1 + passes, b = 1 + failures,

and prompts are drawn without replacement with probability proportional to max(w(p), floor * max w).
With each drawn prompt is kept how likely it was to be in the draw (rl_training.tasks.inclusion), so
that a mean over all prompts can be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rl_training.tasks.inclusion import inclusion_probabilities

# A policy changes: counts older than a few visits say little about it.
_MEMORY = 0.7
# No prompt is ever given up: it keeps at least this share of the best prompt's weight.
_FLOOR = 0.1


def mean_reward(rewards: Sequence[float]) -> float:
    """Their mean, NaN rewards (completions that no function judges) left out; NaN where there is no
    other.
    """
    known = [reward for reward in rewards if not math.isnan(reward)]
    return float(np.mean(known)) if known else math.nan


@dataclass
class PassRates:
    """Decayed counts of passed and failed completions of each of `size` training prompts.

    A completion passes when its reward reaches `pass_threshold`.
    """

    size: int
    pass_threshold: float = 0.5
    passes: np.ndarray = field(init=False)
    failures: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"there must be at least one prompt, not {self.size}")
        self.passes = np.zeros(self.size)
        self.failures = np.zeros(self.size)

    def update(self, prompt: int, rewards: Sequence[float]) -> None:
        """Count one group of rewards of a prompt; NaN rewards (not scorable) are left out."""
        known = np.asarray([r for r in rewards if not math.isnan(r)])
        passed = int((known >= self.pass_threshold).sum())
        self.passes[prompt] = _MEMORY * self.passes[prompt] + passed
        self.failures[prompt] = _MEMORY * self.failures[prompt] + len(known) - passed

    def weights(self) -> np.ndarray:
        """(size,) expected reward variance within a group of each prompt, floored; not normalised."""
        a, b = 1 + self.passes, 1 + self.failures
        variance = a * b / ((a + b) * (a + b + 1))
        return np.maximum(variance, _FLOOR * variance.max())

    def draw(
        self, count: int, rng: np.random.Generator, exclude: Sequence[int] = (), weighted: bool = True
    ) -> tuple[list[int], list[float]]:
        """`count` distinct prompts outside `exclude`, and the probability with which each is in
        such a draw.

        Args:
            weighted: by difficulty if true, uniformly if false. Where fewer prompts than `count`
                are left, excluded ones are drawn again rather than none; where there are fewer than
                `count` in all, prompts are drawn with replacement, and the number is how often each
                is expected to be drawn.
        """
        weights = self.weights() if weighted else np.ones(self.size)
        available = np.setdiff1d(np.arange(self.size), np.asarray(list(exclude), dtype=int))
        if len(available) < count:
            available = np.arange(self.size)
        probabilities = weights[available] / weights[available].sum()
        chosen = rng.choice(len(available), size=count, replace=count > len(available), p=probabilities)
        repeated = count > len(available)
        expected = count * probabilities if repeated else inclusion_probabilities(weights[available], count)
        return available[chosen].tolist(), expected[chosen].tolist()

    def subset(self, prompts: Sequence[int]) -> PassRates:
        """The rates of some prompts, numbered by their place in `prompts`."""
        part = PassRates(len(prompts), self.pass_threshold)
        part.passes, part.failures = self.passes[list(prompts)], self.failures[list(prompts)]
        return part

    def state_dict(self) -> dict[str, list[float]]:
        return {"passes": self.passes.tolist(), "failures": self.failures.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Raises ValueError when the counts are of another number of prompts."""
        if len(state["passes"]) != self.size:
            raise ValueError(
                f"the checkpoint counts pass rates of {len(state['passes'])} prompts, the task has {self.size}: resume "
                "with the task the run was started with"
            )
        self.passes = np.asarray(state["passes"], dtype=float)
        self.failures = np.asarray(state["failures"], dtype=float)
