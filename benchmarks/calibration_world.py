"""An exact world to calibrate in: a policy of which every completion is enumerated in float64, so that the truth is known.

`World` draws buffers as a trainer does (prompts uniformly, completions from the policy) and holds the statistics of every
completion, from which the product's own functions make every number. A model is passed through once a world and a step length,
never once a buffer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from entropy_core.directional import token_derivatives, weights_moved
from entropy_core.scores import TokenStatistics, token_statistics
from tests.entropy_core.support import whole_space
from tests.oracle.enumeration import (
    ExactPolicy,
    detached_parameters,
    entropies_along,
    enumerate_completions,
    exact_entropies,
    flatten,
    solve,
    token_terms,
    unflatten,
)
from tests.oracle.policy import RecurrentPolicy, Task


@dataclass(frozen=True)
class Shape:
    """A buffer: prompts, completions of each (a range: every prompt draws its own number), and the length of the step.

    copies: how often each drawn completion stands in the buffer; 2: half of the sequences are duplicates.
    """

    name: str
    prompts: int
    completions: tuple[int, int]
    step: float
    copies: int = 1


class World:
    """A policy, its completions, and a direction; derivatives and statistics of every completion, made once a step length.

    seed, size: of the direction, a step of length `size` at step length 1. policy_seed: of the parameters, which are multiplied
    by `sharpness`: the larger, the rarer are the completions that carry the influence. vocabulary: tokens, the end included;
    longest: tokens of the longest completion. Prompts are all sequences of one to three tokens.
    """

    def __init__(
        self,
        seed: int = 4,
        size: float = 1.0,
        policy_seed: int = 7,
        vocabulary: int = 4,
        longest: int = 4,
        sharpness: float = 1.0,
    ) -> None:
        prompts = tuple(p for n in (1, 2, 3) for p in product(range(1, vocabulary), repeat=n))
        self.policy = RecurrentPolicy(vocabulary=vocabulary, seed=policy_seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(sharpness)
        self.space = enumerate_completions(Task(prompts=prompts, vocabulary=vocabulary, max_completion_length=longest))
        named = detached_parameters(self.policy)
        flat = torch.randn(len(flatten(named)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.direction = unflatten(flat * (size / flat.norm()), named)
        self._measure()

    def _measure(self) -> None:
        leaves = {name: p.requires_grad_(True) for name, p in detached_parameters(self.policy).items()}
        entropy = exact_entropies(self.policy, self.space, 1.0, leaves)[1]
        gradient = torch.autograd.grad(entropy, list(leaves.values()))
        self.token_entropy = entropy.item()
        self.slope = float(flatten(dict(zip(leaves, gradient, strict=True))) @ flatten(self.direction))
        self.batch = whole_space(self.space)
        self.before = token_statistics(self.policy, self.batch)
        self.along = token_derivatives(self.policy, self.batch, self.direction)
        scores = token_terms(self.policy, self.space, parameters=detached_parameters(self.policy))[0].sum(1)
        self.by_prompt = scores.exp().view(self.space.prompts, -1)
        self._after: dict[float, tuple[TokenStatistics, float]] = {}

    @cached_property
    def exact(self) -> ExactPolicy:
        """Everything enumerated, gradients of every token included (1 s)."""
        return solve(self.policy, self.space)

    def at(self, step: float) -> World:
        """The world after `step` times the direction, with the same direction."""
        other = World.__new__(World)
        other.policy, other.space, other.direction = deepcopy(self.policy), self.space, self.direction
        with torch.no_grad():
            for name, parameter in other.policy.named_parameters():
                parameter.add_(self.direction[name], alpha=step)
        other._measure()
        return other

    def towards(self, direction: dict[str, Tensor]) -> World:
        """The same world with another direction."""
        other = World.__new__(World)
        other.policy, other.space, other.direction = self.policy, self.space, direction
        other._measure()
        return other

    def after(self, step: float) -> tuple[TokenStatistics, float]:
        """Statistics after `step` times the direction, and the true change of entropy, nats per token."""
        if step not in self._after:
            with weights_moved(self.policy, self.direction, step):
                statistics = token_statistics(self.policy, self.batch)
            change = entropies_along(self.policy, self.space, self.direction, step)[1] - self.token_entropy
            self._after[step] = statistics, float(change)
        return self._after[step]

    def expectation(self, values: Tensor) -> float:
        """E[values] of (n,) values of the completions, prompts drawn uniformly."""
        return float((self.by_prompt.flatten() * values).sum() / len(self.by_prompt))

    def draw(self, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N,) completions of a buffer and the number of the draw (the unit) that each belongs to."""
        low, high = shape.completions
        prompts = torch.randint(0, len(self.by_prompt), (shape.prompts,), generator=generator)
        counts = torch.randint(low, high + 1, (shape.prompts,), generator=generator)
        drawn = [
            p * self.by_prompt.shape[1] + torch.multinomial(self.by_prompt[p], int(n), True, generator=generator)
            for p, n in zip(prompts.tolist(), counts, strict=True)
        ]
        units = torch.repeat_interleave(torch.arange(shape.prompts), counts)
        return torch.cat(drawn).repeat_interleave(shape.copies), units.repeat_interleave(shape.copies)
