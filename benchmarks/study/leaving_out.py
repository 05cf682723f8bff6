"""Training without the sequences that cost most entropy: each step's are found before it is taken, and left out of it.

    r_i    change of entropy with sequence i in the step less the change without it             (entropy_core.leaving_out)

The COUNT lowest of a step's r_i, as far as they are below 0, get an advantage of 0; the loss divides by a constant, so nothing
else changes. The gradient of entropy rests on held-out prompts, as the controller's does: the same pool, of the same size. Ratios
to the sampling policy are taken as 1, which in the second step of a generation they are nearly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer

from benchmarks.study.tasks import Task
from entropy_core.adamw import read_adamw_state
from entropy_core.batch import SequenceBatch
from entropy_core.directional import sequence_derivatives
from entropy_core.gradients import trainable_parameters
from entropy_core.leaving_out import leaving_out_direction
from entropy_core.processes import Processes
from rl_training.control.look import HeldOutLook
from rl_training.controller_config import EntropyControllerConfig
from rl_training.generation.description import describe_sampling
from rl_training.generation.rollout_sequences import to_batch
from rl_training.integrations.fresh_prompts import FreshCompletions
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.watched_source import held_out_prompts

COUNT = 8
"""Of 64 sequences."""


class LeavingOutTrainer(GRPOTrainer):
    """Call `watch` before training. A micro-batch is a whole step, and the loss is Dr. GRPO's."""

    count = COUNT

    def watch(self, task: Task) -> None:
        """Draw the pool's sequences from held-out prompts of `task` that no look of the study is on."""
        config = EntropyControllerConfig()
        self._sampling = describe_sampling(self).sampling_config()
        fresh = FreshCompletions(self, self.model, self._sampling, Processes())
        rows = held_out_prompts(self, task.rows()[1][256:])
        self._pool = SequencePool(rows, config.eval_sequences, config.pool_age, fresh.draw)
        self._entropy_of_held_out = HeldOutLook(self.model, config.advantage_decay)
        self._parameters = trainable_parameters(self.model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        effects = self.effects(model, inputs)
        lowest = effects.argsort()[: self.count]
        kept = torch.ones_like(effects)
        kept[lowest[effects[lowest] < 0]] = 0.0
        self._metrics["train"]["left_out/sequences"].append(float((kept == 0).sum()))
        self._metrics["train"]["left_out/effect"].append(float(effects[kept == 0].sum()))
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * kept})

    def effects(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """(N,) r_i of the step to come, nats per token."""
        if self.current_gradient_accumulation_steps != 1 or model.training is False:
            raise ValueError("effects are of a whole step in training: set gradient_accumulation_steps=1")
        found = torch.autograd.grad(super()._compute_loss(model, inputs), list(self._parameters.values()))
        gradient = dict(zip(self._parameters, found, strict=True))
        entropy_gradient = self._gradient_of_entropy()
        norm = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
        clip = min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        states = read_adamw_state(self.optimizer, self._parameters, others=True)
        direction = leaving_out_direction(states, gradient, entropy_gradient, clip)
        along = sequence_derivatives(self.model, self._batch_of(inputs), direction).sequences
        weights = inputs["advantages"] / (len(along) * int(self.max_completion_length or 1))
        return clip * weights * along.to(weights)

    def _gradient_of_entropy(self) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.args.seed, self.state.global_step, 0, 0, 2))
        watched = to_batch(self._pool.turn(self.state.global_step, rng), self._sampling).to(self.accelerator.device)
        return self._entropy_of_held_out(watched, self._pool.scored)[1]

    def _batch_of(self, inputs: dict[str, Any]) -> SequenceBatch:
        prompts, completions = (
            [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(ids), len(places)) for ids in prompts]
        return SequenceBatch.from_sequences(
            prompts, completions, index, self._sampling.pad_token_id, self._sampling.temperature
        )
