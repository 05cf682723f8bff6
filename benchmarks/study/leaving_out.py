"""Holding entropy at a target by leaving sequences out of the step: those that cost most entropy, as few as it takes.

    r_i    change of entropy with sequence i in the step less the change without it             (entropy_core.leaving_out)

    leave out the fewest, lowest r_i first, with   h + dh_N - (N / 1) sum r_i >= target          at most MOST of a step

h is the filtered level and dh_N the predicted change over the controller's horizon of N steps; (N / 1) counts how often a
gradient acts in N steps against one, momentum included. Held-out sequences, filter and horizon are the controller's defaults.
What is left out gets an advantage of 0; the loss divides by a constant, so nothing else changes. Ratios to the sampling
policy are taken as 1, which in the second step of a generation they are nearly.
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
from entropy_core.bonus import BonusResponse
from entropy_core.directional import sequence_derivatives
from entropy_core.gradients import trainable_parameters
from entropy_core.leaving_out import leaving_out_direction
from entropy_core.processes import Processes
from entropy_core.uncertainty import Estimate
from rl_training.control.level import EntropyLevel
from rl_training.control.look import HeldOutLook
from rl_training.controller_config import EntropyControllerConfig
from rl_training.generation.description import describe_sampling
from rl_training.generation.rollout_sequences import to_batch
from rl_training.integrations.fresh_prompts import FreshCompletions
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.watched_source import held_out_prompts

MOST = 16
"""Of 64 sequences."""


class LeavingOutTrainer(GRPOTrainer):
    """Call `watch` before training. A micro-batch is a whole step, and the loss is Dr. GRPO's."""

    def watch(self, task: Task) -> None:
        """Hold the task's target, by sequences of held-out prompts that no look of the study is on."""
        self._settings = config = EntropyControllerConfig(target=task.target)
        self._sampling = describe_sampling(self).sampling_config()
        rows = held_out_prompts(self, task.rows()[1][256:])
        fresh = FreshCompletions(self, self.model, self._sampling, Processes())
        self._pool = SequencePool(rows, config.eval_sequences, config.pool_age, fresh.draw)
        self._level = EntropyLevel(config.level_gain, config.bias_gain, config.bias_limit, config.pool_age)
        self._entropy_of_held_out = HeldOutLook(self.model, config.advantage_decay)
        self._parameters = trainable_parameters(self.model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        effects, missing = self.effects(model, inputs)
        lowest = effects.argsort()[:MOST]
        before = effects[lowest].cumsum(0) - effects[lowest]  # of those that are left out already
        out = lowest[(effects[lowest] < 0) & (-before < missing)]
        kept = torch.ones_like(effects)
        kept[out] = 0.0
        self._level.expect(self._predicted - float(effects[out].sum()))
        self._metrics["train"]["left_out/sequences"].append(float(len(out)))
        self._metrics["train"]["left_out/effect"].append(float(effects[out].sum()))
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * kept})

    def effects(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
        """(N,) r_i of the step to come, and what is missing in this step for the target to be reached, nats per token."""
        if self.current_gradient_accumulation_steps != 1 or model.training is False:
            raise ValueError("effects are of a whole step in training: set gradient_accumulation_steps=1")
        found = torch.autograd.grad(super()._compute_loss(model, inputs), list(self._parameters.values()))
        gradient = dict(zip(self._parameters, found, strict=True))
        held, towards = self._held_out()
        states = read_adamw_state(self.optimizer, self._parameters, others=True)
        response = BonusResponse(states, self._parameters, gradient, {}, self.args.max_grad_norm)
        direction = leaving_out_direction(states, gradient, towards, response.clip(0.0))
        along = sequence_derivatives(self.model, self._batch_of(inputs), direction).sequences
        weights = inputs["advantages"] / (len(along) * int(self.max_completion_length or 1))
        effects = response.clip(0.0) * weights * along.to(weights)
        level, steps = self._level.see(held.value, held.standard_error), self._settings.horizon
        self._predicted = response.along(towards, 0.0)
        planned = level + response.along(towards, 0.0, steps)
        often = response.weights(steps)[0] / response.weights(1)[0]
        return effects, (float(self._settings.target or 0.0) - planned) / often

    def _held_out(self) -> tuple[Estimate, dict[str, Tensor]]:
        """Entropy of the held-out sequences, and its gradient."""
        rng = np.random.default_rng((self.args.seed, self.state.global_step, 0, 0, 2))
        watched = to_batch(self._pool.turn(self.state.global_step, rng), self._sampling).to(self.accelerator.device)
        seen, gradient = self._entropy_of_held_out(watched, self._pool.scored)
        return seen.entropy(), gradient

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
