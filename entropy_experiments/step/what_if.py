"""The step that AdamW, or a plain gradient step, would take with another loss: exact, from the moments before it.

    g -> c g  ->  m, v  ->  dtheta = -lr [ m_hat / (sqrt(v_hat) + eps) + decay theta ]

Clipping, both moments and P answer to g in full. Nothing is stepped: theta, moments and optimizer stay as they are.
Source: docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entropy_core.adamw import changed_step
from entropy_experiments.step.optimizer_step import AnalysedStep, NextStep, clip_coefficient, without_gradient


@dataclass(frozen=True)
class StepMaker:
    """Makes steps from `step`'s point. parameters: name -> value before it; max_grad_norm: of clipping, None: not clipped."""

    step: AnalysedStep
    parameters: Mapping[str, Tensor]
    max_grad_norm: float | None

    def delta(
        self, gradient: Mapping[str, Tensor], learning_rate_factor: float = 1.0, keeps_momentum: bool = True
    ) -> dict[str, Tensor]:
        """theta_after - theta_before.

        Args:
            gradient: name -> loss gradient before clipping.
            learning_rate_factor: on every group's rate.
            keeps_momentum: False puts zeros in place of the first moments; step counts stay.
        """
        clip, _ = clip_coefficient(gradient, self.max_grad_norm)
        if not isinstance(self.step, NextStep):
            return {name: -learning_rate_factor * self.step.learning_rate * clip * g for name, g in gradient.items()}
        # A parameter that never had a gradient and has none now is passed over, as torch does.
        idle = without_gradient(gradient, [name for name in self.parameters if not self.step.state[name].step])
        seen = {n: None if n in idle else (clip * gradient[n]).to(p.dtype) for n, p in self.parameters.items()}
        states = {name: self.step.state[name] for name in self.parameters}
        return changed_step(states, self.parameters, seen, learning_rate_factor, keeps_momentum)
