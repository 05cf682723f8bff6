"""A policy whose completions can all be enumerated, trained by AdamW on a loss that is a weighted sum of scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.probe.change import EntropyChange
from rl_training.probe.shares import TrainingSequences
from tests.oracle.enumeration import (
    CompletionSpace,
    ExactPolicy,
    detached_parameters,
    enumerate_completions,
    exact_entropies,
    flatten,
    solve,
    token_terms,
)
from tests.oracle.policy import RECURRENT_TASK, RecurrentPolicy

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8
RATES, DECAYS = (1e-2, 2e-2), (0.1, 0.0)  # of matrices and of vectors
MAX_NORM = 0.05  # of the clipped gradient: the losses here have far larger ones


def by_group(model: torch.nn.Module, values: tuple[float, float]) -> dict[str, float]:
    """Name -> the value of its group: matrices first."""
    return {name: values[p.dim() == 1] for name, p in model.named_parameters()}


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if (p.dim() == 1) == vectors],
            "lr": RATES[vectors],
            "weight_decay": DECAYS[vectors],
        }
        for vectors in (False, True)
    ]
    return torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPSILON)


@dataclass
class Setting:
    """model, optimizer: as trained so far. batch: every completion of every prompt, once."""

    model: RecurrentPolicy
    optimizer: torch.optim.AdamW
    space: CompletionSpace
    batch: SequenceBatch

    @classmethod
    def fresh(cls) -> Setting:
        model, space = RecurrentPolicy(), enumerate_completions(RECURRENT_TASK)
        index = space.prompt_index.tolist()
        batch = SequenceBatch.from_sequences(space.prompt_ids, space.completion_ids, index, pad_token_id=0)
        return cls(model, make_optimizer(model), space, batch)

    def twin(self) -> Setting:
        """The same state in objects of its own."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Setting(model, optimizer, self.space, self.batch)

    def exact(self) -> ExactPolicy:
        return solve(self.model, self.space)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(grad h, grad H), exact and flat: the part of `exact` that most tests need, quickly."""
        leaves = {name: value.requires_grad_(True) for name, value in detached_parameters(self.model).items()}
        per_completion, per_token, _ = exact_entropies(self.model, self.space, parameters=leaves)
        found = [torch.autograd.grad(e, list(leaves.values()), retain_graph=True) for e in (per_token, per_completion)]
        return flatten(dict(zip(leaves, found[0], strict=True))), flatten(dict(zip(leaves, found[1], strict=True)))

    def entropy(self) -> float:
        """h, exact."""
        with torch.no_grad():
            return float(exact_entropies(self.model, self.space)[1])

    def counting_scores(self) -> Tensor:
        """`drawn_scores` under which the batch stands for the policy's own distribution: each completion was taken once."""
        return torch.zeros(len(self.batch), dtype=torch.float64)

    def training(self, seed: int) -> tuple[list[int], TrainingSequences]:
        """Twenty completions with advantages and weights of either sign, and their indices."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.batch), generator=generator)[:20].tolist()
        advantages = torch.randn(20, generator=generator, dtype=torch.float64)
        lengths = self.batch.completion_lengths[chosen].double()
        return chosen, TrainingSequences(self.batch.select(chosen), advantages, advantages / (20 * lengths))

    def backward(self, seed: int, norm: float = MAX_NORM) -> float:
        """The gradient of -sum_i w_i S_i, clipped; returns the coefficient of clipping."""
        chosen, training = self.training(seed)
        weights = training.weights
        assert weights is not None
        self.optimizer.zero_grad()
        scores = token_terms(self.model, self.space)[0].sum(1)[chosen]
        (-(weights * scores).sum()).backward()
        found = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm))
        return min(1.0, norm / (found + 1e-6))

    def step(self, seed: int, probe: SimpleEntropyProbe | None = None, training: bool = False) -> EntropyChange | None:
        """One step of AdamW, watched if there is a probe."""
        self.backward(seed)
        if probe is None:
            self.optimizer.step()
            return None
        probe.before_step(self.optimizer, self.training(seed)[1] if training else None)
        self.optimizer.step()
        return probe.after_step()

    def watched_step(self, seed: int, probe: SimpleEntropyProbe, training: bool = False) -> EntropyChange:
        """A step with the policy's exact distribution observed before it."""
        probe.observe(self.batch, self.counting_scores())
        change = self.step(seed, probe, training)
        assert change is not None
        return change

    def moments(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Name -> (m, v, t) of the optimizer, copied; zeros before the first step."""
        out = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state.get(p, {})
            zero = torch.zeros_like(p)
            out[name] = (
                state.get("exp_avg", zero).clone(),
                state.get("exp_avg_sq", zero).clone(),
                int(state.get("step", 0)),
            )
        return out

    def parts_by_hand(self) -> dict[str, dict[str, Tensor]]:
        """batch, momentum, decay of the step ahead, and P_t, by the formulas of AdamW; gradients are in place."""
        rates, decays = by_group(self.model, RATES), by_group(self.model, DECAYS)
        parts: dict[str, dict[str, Tensor]] = {"batch": {}, "momentum": {}, "decay": {}, "P": {}}
        moments = self.moments()
        for name, p in self.model.named_parameters():
            m, v, t = moments[name]
            g = p.grad
            assert g is not None
            v_new = BETA2 * v + (1 - BETA2) * g * g
            P = 1 / ((v_new / (1 - BETA2 ** (t + 1))).sqrt() + EPSILON)
            unbiased = rates[name] / (1 - BETA1 ** (t + 1))
            parts["P"][name] = P
            parts["batch"][name] = -unbiased * (1 - BETA1) * P * g
            parts["momentum"][name] = -unbiased * BETA1 * P * m
            parts["decay"][name] = -rates[name] * decays[name] * p.detach()
        return parts

    def values(self) -> dict[str, Tensor]:
        return detached_parameters(self.model)


def along(gradient: Tensor, direction: dict[str, Tensor]) -> float:
    """<gradient, direction>, the gradient flat."""
    return float(gradient @ flatten(direction))


def difference(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - before[name] for name in after}


def make_probe(setting: Setting, **config: object) -> SimpleEntropyProbe:
    """A probe that predicts from the newest gradient alone, unless the test says otherwise."""
    return SimpleEntropyProbe(
        EntropyProbeConfig(**{"mode": "simple", "preset": "accurate", "rollouts": "fresh", "averaging": 0.0, **config}),
        setting.model,
    )
