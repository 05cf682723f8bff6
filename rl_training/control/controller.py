"""One step of holding entropy: look, plan, and add to the loss gradient what brings entropy to the target.

    -alpha grad H_bonus ,    alpha solves   h + z + dh_N(alpha) + f_N = tau_{t+N}          (entropy_core.bonus)

H_bonus is the mean entropy of the step's own tokens, the bonus of TRL's entropy_coef; dh_N rests on the gradient of h on
held-out sequences, which know nothing of the step (docs/decisions/0013). h is the filtered level (rl_training.control.level),
tau the target, z what plans get wrong step after step (rl_training.control.missed). dh_N takes this step's loss gradient for
those to come; f_N puts in its place what gradients did of late, since a single one is mostly noise. Inside the band alpha is
0 and no gradient is touched.

    controller.begin_step()
    controller.add_bonus(entropy)          # of each micro-batch, with its graph
    loss.backward()
    record = controller.act(...)           # gradients are whole and not yet clipped

Source: docs/theory/entropy-control.md.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.adamw import read_adamw_state
from entropy_core.batch import SequenceBatch
from entropy_core.bonus import BonusResponse, BonusSolution, solve_bonus
from entropy_core.gradients import trainable_parameters
from entropy_core.processes import Processes
from rl_training.control.level import EntropyLevel
from rl_training.control.look import HeldOutLook
from rl_training.control.missed import MissedDistance
from rl_training.control.target import TargetPath
from rl_training.controller_config import EntropyControllerConfig
from rl_training.probe.derivative_check import DerivativeCheck

_KEEP = 0.9  # of what loss gradients usually do, a step


def _warn(sentence: str) -> None:
    warnings.warn(f"the entropy controller: {sentence}", RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class ControlledStep:
    """What the controller did; nats per token throughout.

    Attributes:
        alpha: coefficient of the bonus that was added.
        entropy: of the held-out sequences before the step, with its standard error; own: of the step's completions.
        level: what they and the predictions say of held-out prompts.
        bias: of predictions, a step.
        target: after the step. planned: entropy that is planned at the end of the horizon.
        without, predicted: first-order change of the coming step without the bonus and with it.
        saturated: the target could not be planned for: a bound, or a response that turns back.
        reward: first-order change of mean reward that the bonus makes; NaN where it is not known.
    """

    alpha: float
    entropy: float
    standard_error: float
    own: float
    level: float
    bias: float
    target: float
    planned: float
    without: float
    predicted: float
    saturated: bool
    reward: float


@dataclass(frozen=True)
class StepToCome:
    """Attributes:
    step, last: steps of the optimizer taken so far, and of the run in all.
    max_norm: of clipping, None for none.
    reward_scale: what makes of minus the loss gradient that of mean reward; None where nothing does.
    """

    step: int
    last: int
    max_norm: float | None
    reward_scale: float | None = None


class EntropyController:
    """See the module's docstring. model: the policy without wrappers, its trained weights in float32 or float64."""

    def __init__(self, config: EntropyControllerConfig, model: nn.Module) -> None:
        self._config, self._model = config, model
        self._check = DerivativeCheck(
            model, Processes(), _warn, "The coefficient is solved for with it: train without the controller"
        )
        self._look = HeldOutLook(model, config.advantage_decay)
        self.level = EntropyLevel(config.level_gain, config.bias_gain, config.bias_limit, config.pool_age)
        self.target = TargetPath(config)
        self.missed = MissedDistance(config.horizon, config.horizon * config.bias_limit)
        self._last_alpha = 0.0
        self._usual: float | None = None
        self._own = math.nan
        self._bonus: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ one step
    def begin_step(self) -> None:
        """Forget the bonus of a step that is over, or was not taken."""
        self._bonus, self._own = {}, math.nan

    def add_bonus(self, entropy: Tensor) -> None:
        """Take the gradient of a micro-batch's part of the bonus's entropy; its graph stays for the loss."""
        parameters, part = trainable_parameters(self._model), float(entropy.detach())
        self._own = part if math.isnan(self._own) else self._own + part
        found = torch.autograd.grad(entropy, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                known = self._bonus.get(name)
                self._bonus[name] = gradient if known is None else known + gradient

    def act(
        self, optimizer: torch.optim.Optimizer, coming: StepToCome, watched: SequenceBatch, look: Any
    ) -> ControlledStep:
        """Add the bonus to the gradients of the coming step.

        Args:
            optimizer: AdamW. watched: held-out sequences.
            look: from the (N,) log-probabilities of `watched` today to those at their drawing.
        """
        seen, gradient = self._look(watched, look)
        found = seen.entropy()
        own = self._own
        level = self.level.see(found.value, found.standard_error, own)
        self.target.begin(level)
        parameters = trainable_parameters(self._model)
        states = read_adamw_state(optimizer, parameters, others=True)
        grads = {name: None if p.grad is None else p.grad.detach() for name, p in parameters.items()}
        response = BonusResponse(states, parameters, grads, self._bonus, coming.max_norm)
        solution = self._solve(response, gradient, level, coming)
        alpha, missed = solution.coefficient, self.missed.value
        self._sum_up(level, solution, coming)
        without = response.along(gradient, 0.0)
        predicted = without if alpha == 0.0 else response.along(gradient, alpha)
        self._check.hold(predicted, seen, lambda: self._look.coefficients(seen), response.step(alpha))
        reward = self._reward(response, grads, alpha, coming.reward_scale)
        if alpha != 0.0:
            self._last_alpha = alpha
            self._add(parameters, alpha)
        self._bonus = {}
        self.level.expect(predicted)
        return ControlledStep(
            alpha=alpha,
            entropy=found.value,
            standard_error=found.standard_error,
            own=own,
            level=level,
            bias=self.level.bias,
            target=self.target.at(coming.step + 1, coming.last),
            planned=level + missed + solution.change,
            without=without,
            predicted=predicted,
            saturated=solution.saturated,
            reward=reward,
        )

    # ------------------------------------------------------------------ pieces
    def _solve(
        self, response: BonusResponse, gradient: dict[str, Tensor], level: float, coming: StepToCome
    ) -> BonusSolution:
        config, steps = self._config, self._config.horizon
        goal = self.target.at(coming.step + steps, coming.last) - level - self.missed.value
        reach = steps * config.max_change
        later = self._of_later_gradients(response, gradient, steps)
        without = response.along(gradient, 0.0, steps) + later
        if coming.step < config.start_after or not math.isfinite(without) or abs(goal - without) <= config.band:
            return BonusSolution(0.0, without, without, False)
        found = solve_bonus(
            lambda alpha: without if alpha == 0.0 else response.along(gradient, alpha, steps) + later,
            min(reach, max(-reach, goal)),
            config.alpha_min,
            config.alpha_max,
            self._last_alpha or 0.1 * response.scale,
        )
        # A bonus raises entropy, so one that seems to lower it is noise of the gradient of h.
        if found.coefficient * (found.change - without) < 0:
            return BonusSolution(0.0, without, without, True)
        return found

    def _sum_up(self, level: float, solution: BonusSolution, coming: StepToCome) -> None:
        config = self._config
        goal = self.target.at(coming.step + config.horizon, coming.last) - level - self.missed.value
        free = coming.step >= config.start_after and not solution.saturated
        near = abs(goal) < config.horizon * config.max_change
        self.missed.sum_up(level - self.target.at(coming.step, coming.last), free and near)

    def _of_later_gradients(self, response: BonusResponse, gradient: dict[str, Tensor], steps: int) -> float:
        """f_N: what the loss gradients of the steps to come are expected to do beyond what this one would do in their place."""
        this = response.of_gradient(gradient)
        if not math.isfinite(this):
            return 0.0
        self._usual = this if self._usual is None else _KEEP * self._usual + (1 - _KEEP) * this
        in_all, own = response.weights(steps)
        return (in_all - own) * (self._usual - this)

    def _reward(
        self, response: BonusResponse, grads: dict[str, Tensor | None], alpha: float, scale: float | None
    ) -> float:
        if scale is None:
            return math.nan
        if alpha == 0.0:
            return 0.0
        of_reward = {name: g for name, g in grads.items() if g is not None}
        return -scale * (response.along(of_reward, alpha) - response.along(of_reward, 0.0))

    def _add(self, parameters: dict[str, nn.Parameter], alpha: float) -> None:
        for name, b in self._bonus.items():
            grad = parameters[name].grad
            if grad is not None:
                grad.add_(b.to(grad), alpha=-alpha)

    # ------------------------------------------------------------------ for a trainer's state
    def state(self) -> dict[str, Any]:
        """Numbers, for `load`: a run that goes on from them takes the same steps."""
        numbers = {"last_alpha": self._last_alpha, "usual": self._usual, "missed": self.missed.value}
        return {"level": self.level.state(), "target": self.target.state(), **numbers}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: what is not such a state.
        """
        try:
            numbers = [
                *state["level"].values(),
                *state["target"].values(),
                state["last_alpha"],
                state["usual"],
                state["missed"],
            ]
            if not all(v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in numbers):
                raise ValueError("a number is missing or not finite")
            self.level.load(state["level"])
            self.target.load(state["target"])
            self._last_alpha, self._usual = float(state["last_alpha"]), state["usual"]
            self.missed.value = float(state["missed"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete ({error!r})") from error
