"""The entropy that is to be held, step by step.

    constant        tau_t = a
    linear          tau_t = a + (b - a) s                      s = min(1, steps / steps of the schedule)
    cosine          tau_t = a + (b - a) (1 - cos(pi s)) / 2
    reward_gated    linear, s counted from the step at which the running mean reward reaches the gate

Steps are the optimizer's, those taken so far.
"""

from __future__ import annotations

import math
from typing import Any

from rl_training.controller_config import EntropyControllerConfig

_KEEP = 0.9  # of the running mean reward, a step


class TargetPath:
    """Where entropy is to be. `last`: steps of the run in all."""

    def __init__(self, config: EntropyControllerConfig) -> None:
        self._config = config
        self.held = config.target
        """The target at the beginning, nats per token; None until `begin` has seen an entropy."""
        self._opened: int | None = None
        self._reward: float | None = None

    def begin(self, entropy: float) -> None:
        """Hold what is there, unless there is a target."""
        if self.held is None:
            self.held = entropy

    def note_reward(self, step: int, reward: float | None) -> None:
        """Take in the mean reward of the step that is about to be taken, `step` having been taken; None where none is known."""
        if reward is None or not math.isfinite(reward):
            return
        self._reward = reward if self._reward is None else _KEEP * self._reward + (1 - _KEEP) * reward
        gate = self._config.reward_gate
        if gate is not None and self._opened is None and self._reward >= gate:
            self._opened = step

    def at(self, step: int, last: int) -> float:
        """Nats per token after `step` steps of `last`.

        Raises:
            ValueError: before `begin`.
        """
        if self.held is None:
            raise ValueError("there is no target yet: call begin")
        config, start = self._config, 0
        if config.schedule == "constant" or config.final_target is None:
            return self.held
        if config.schedule == "reward_gated":
            if self._opened is None:
                return self.held
            start = self._opened
        length = config.schedule_steps or max(1, last - start)
        part = min(1.0, max(0.0, (step - start) / length))
        if config.schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.held + (config.final_target - self.held) * part

    def state(self) -> dict[str, Any]:
        """For `load`."""
        return {"held": self.held, "opened": self._opened, "reward": self._reward}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.held, self._opened, self._reward = state["held"], state["opened"], state["reward"]
