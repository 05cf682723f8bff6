"""Whether a gradient of entropy is a derivative of the policy's entropy: held against forward passes along a step.

    <g, u> = sum_tk [ alpha_tk D H_tk + gamma_tk D log pi_tk ]        D: derivative along u; alpha, gamma: entropy_core.entropy

A model may compute something else under a gradient than it computes (straight-through rounding, a gradient that a layer scales).
The right side takes no backward pass. One pass more at the first, second, fourth ... prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from entropy_core.directional import token_derivatives
from entropy_core.entropy import TokenCoefficients
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_core.uncertainty import Estimate
from rl_training.probe.observation import Observation
from rl_training.probe.step_errors import disagreement


class DerivativeCheck:
    """Call `hold` in every process at every prediction.

    Args:
        model: the policy.
        sharing: processes that hold the same observation.
        say: takes a sentence, once a run.
        what_now: how the sentence ends, in place of what a probe says.
    """

    def __init__(
        self, model: nn.Module, sharing: Processes, say: Callable[[str], None], what_now: str | None = None
    ) -> None:
        self._model, self._sharing, self._say = model, sharing, say
        self._ending = () if what_now is None else (what_now,)
        self._uses, self._told = 0, False

    def hold(
        self, value: float, seen: Observation, coefficients: Callable[[], TokenCoefficients], step: Mapping[str, Tensor]
    ) -> None:
        """Say so where the gradient along a step is not the derivative.

        Args:
            value: <g, step> of the newest gradient, nats per token.
            seen: what it was taken on, under the policy as it is now.
            coefficients: gives those of the sum over `seen` whose mean over sequences was differentiated.
            step: name -> tensor, over all trained parameters.
        """
        self._uses += 1
        if self._told or self._uses & (self._uses - 1) or not math.isfinite(value):
            return
        parts = self._by_sequence(seen, coefficients(), step)
        if isinstance(parts, str):
            why = f"it was not checked whether the gradient of entropy is a derivative of it: {parts}"
        else:
            why = disagreement(Estimate(value, float(parts.norm())), float(parts.sum()), *self._ending)
        if why is not None:
            self._told = True
            self._say(why)

    def _by_sequence(self, seen: Observation, of: TokenCoefficients, step: Mapping[str, Tensor]) -> Tensor | str:
        """(N,) each sequence's part of the right side; why not where it cannot be had, in all processes alike."""
        batch, trouble = seen.batch, None
        mine = self._sharing.my_sequences(batch.prompt_index)
        parts = torch.zeros(len(batch), dtype=torch.float64, device=batch.device)
        if len(mine):
            try:
                with PassState(self._model, true_derivatives=True):
                    along = token_derivatives(self._model, batch.select(mine), step)
                sums = of.entropy[mine].double() * along.entropies.double()
                parts[mine] = (sums + of.logprob[mine].double() * along.logprobs.double()).sum(1) / len(batch)
            except (ValueError, RuntimeError) as error:  # what ends one process alone would leave the others waiting
                trouble = str(error)
        if self._sharing.any(trouble is not None, batch.device):
            return trouble or "another process could not take derivatives of its sequences"
        return self._sharing.sum(parts)
