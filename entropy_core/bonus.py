"""How much of an entropy bonus makes AdamW's next steps change entropy by a wanted amount.

    g_a  = c (g - a b)                       gradient with a bonus of coefficient a, clipped: c = min(1, M / |g - a b|)
    v_a  = beta2 v + (1 - beta2) g_a^2       P_a = 1 / (sqrt(v_a / (1 - beta2^(t+1))) + eps)
    m_n  = beta1^n m + (1 - beta1^n) g_a     first moment after n more steps with this gradient

    d(a) = sum_{n=1..N} [ -lr P_a m_n / (1 - beta1^(t+n)) - lr lambda theta ]
    dh(a) = <q, d(a)>                        q = grad h

g is the loss gradient before clipping, b the gradient of the entropy in the bonus, m, v, t the optimizer's state. N = 1 is the
very step that AdamW takes, clipping, both moments and P included. Beyond it P is that of the coming step, and the gradient is
taken to persist: of a bonus in one step's gradient (1 - beta1) comes at once, and the rest through momentum later.

a* solves dh(a) = wanted. dh is smooth and nearly a line; it bends where P or clipping answer to the bonus, and need not be
monotone beyond. The search goes from 0 towards the wanted change and stops where that is reached, where dh turns back, or at the
bound. Source: docs/theory/entropy-control.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState, after_gradient, preconditioner
from entropy_core.formed import Formed

_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_
_ENOUGH = 1e-3  # part of the distance at no bonus that may remain
_MOST_TRIES = 40


@dataclass(frozen=True)
class BonusSolution:
    """Attributes:
    coefficient: a*, 0 where no bonus helps.
    change: dh(a*), nats per token. without: dh(0).
    saturated: the wanted change was not reached: at a bound, or where dh turns back.
    """

    coefficient: float
    change: float
    without: float
    saturated: bool


class BonusResponse:
    """Steps of AdamW as a function of the bonus's coefficient. Nothing is stepped or changed.

    Args:
        states: name -> state before the step (entropy_core.adamw.read_adamw_state).
        parameters: name -> value before the step.
        gradients: name -> loss gradient before clipping; None where a parameter has none, and does not move.
        bonus: name -> gradient of the bonus's entropy; a name that is missing counts as zeros.
        max_norm: clipping's; None, 0 or infinite for none.

    Raises:
        ValueError: gradients or bonus that are not finite.
    """

    def __init__(
        self,
        states: Mapping[str, AdamWParameterState],
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
        bonus: Mapping[str, Tensor],
        max_norm: float | None = None,
    ) -> None:
        self._states, self._parameters, self._bonus = states, parameters, bonus
        self._gradients = {name: g for name, g in gradients.items() if g is not None and name in states}
        self._limit = max_norm if max_norm and math.isfinite(max_norm) else None
        own, both, of_bonus = 0.0, 0.0, 0.0
        for name, g in self._gradients.items():
            b = self._bonus_of(name, g)
            own, both, of_bonus = own + _dot(g, g), both + _dot(g, b), of_bonus + _dot(b, b)
        if not (math.isfinite(own) and math.isfinite(of_bonus)):
            raise ValueError("the loss gradient, or that of the entropy bonus, is not finite")
        self._squares = own, both, of_bonus

    @property
    def scale(self) -> float:
        """Coefficient at which the bonus's gradient is as large as the loss's; infinite without a bonus."""
        own, _, of_bonus = self._squares
        return math.sqrt(own / of_bonus) if of_bonus > 0 else math.inf

    def clip(self, coefficient: float) -> float:
        """What clipping multiplies the gradient by."""
        if self._limit is None:
            return 1.0
        own, both, of_bonus = self._squares
        norm = math.sqrt(max(0.0, own - 2 * coefficient * both + coefficient**2 * of_bonus))
        return min(1.0, self._limit / (norm + _CLIP_EPSILON))

    def along(self, direction: Mapping[str, Tensor], coefficient: float, steps: int = 1) -> float:
        """<direction, d(coefficient)> over so many steps."""
        step = self.step(coefficient, steps)
        return sum((_dot(direction[name], step[name]) for name in self._gradients), 0.0)

    def step(self, coefficient: float, steps: int = 1) -> Mapping[str, Tensor]:
        """d(coefficient) over so many steps, each parameter's formed when it is read."""
        clip = self.clip(coefficient)
        return Formed(self._parameters, lambda name: self._move(name, clip, coefficient, steps))

    def _move(self, name: str, clip: float, coefficient: float, steps: int) -> Tensor:
        if name not in self._gradients:
            return torch.zeros_like(self._parameters[name])
        before, g = self._states[name], self._gradients[name]
        seen = clip * (g - coefficient * self._bonus_of(name, g)) if coefficient else clip * g
        of_moment, of_gradient = _persisting(before, steps)
        moving = preconditioner(after_gradient(before, seen)) * (of_moment * before.exp_avg + of_gradient * seen)
        moved = moving.mul_(-before.lr)
        if before.weight_decay:
            moved.sub_(self._parameters[name].detach(), alpha=steps * before.lr * before.weight_decay)
        return moved

    def of_gradient(self, direction: Mapping[str, Tensor]) -> float:
        """<direction, -lr P c g>: what the loss gradient of this step does by itself, in this step and by momentum later."""
        clip, total = self.clip(0.0), 0.0
        for name, g in self._gradients.items():
            before, seen = self._states[name], clip * g
            total -= before.lr * _dot(direction[name], preconditioner(after_gradient(before, seen)) * seen)
        return total

    def weights(self, steps: int) -> tuple[float, float]:
        """(all, own): how often `of_gradient` is in the change over so many steps if all their gradients are this one, and what
        of it is this step's own; by the betas of the first parameter that moves.
        """
        state = next((self._states[name] for name in self._gradients), None)
        if state is None:
            return 0.0, 0.0
        corrections = [1.0 - state.beta1 ** (state.step + n) for n in range(1, steps + 1)]
        own = sum((1 - state.beta1) * state.beta1 ** (n - 1) / c for n, c in enumerate(corrections, 1))
        return _persisting(state, steps)[1], own

    def _bonus_of(self, name: str, gradient: Tensor) -> Tensor:
        found = self._bonus.get(name)
        return torch.zeros_like(gradient) if found is None else found.to(gradient)


def solve_bonus(
    change: Callable[[float], float], wanted: float, lowest: float, highest: float, guess: float
) -> BonusSolution:
    """The coefficient nearest to 0 with change(coefficient) = wanted.

    Args:
        change: dh of a coefficient, nats per token.
        wanted: nats per token.
        lowest, highest: bounds, lowest <= 0 <= highest.
        guess: a coefficient of the size to be expected, of either sign.

    Raises:
        ValueError: bounds that leave out 0.
    """
    if not lowest <= 0.0 <= highest:
        raise ValueError(f"bounds {lowest:g} and {highest:g} leave out 0, which is no bonus")
    without = change(0.0)
    start = without - wanted
    bound = highest if start < 0 else lowest
    if start == 0.0 or bound == 0.0:
        return BonusSolution(0.0, without, without, start != 0.0)

    def left(coefficient: float) -> float:
        """Distance to go: 1 without a bonus, 0 at the wanted change, below it beyond."""
        return (change(coefficient) - wanted) / start

    found, remains, reached = _search(left, bound, guess)
    return BonusSolution(found, wanted + remains * start, without, not reached)


def _search(left: Callable[[float], float], bound: float, guess: float) -> tuple[float, float, bool]:
    """(coefficient, what is left there, whether that is next to nothing)."""
    size = min(abs(bound), abs(guess)) if guess and math.isfinite(guess) else abs(bound) / 16
    near, near_left, far = 0.0, 1.0, math.copysign(size, bound)
    for _ in range(_MOST_TRIES):
        far_left = left(far)
        if abs(far_left) <= _ENOUGH:
            return far, far_left, True
        if far_left < 0:
            return _between(left, (near, near_left), (far, far_left))
        if not far_left < near_left:  # turned back, or no response: no further
            return near, near_left, False
        if abs(far) >= abs(bound):
            return far, far_left, False
        ahead = far + (far - near) * far_left / (near_left - far_left)
        near, near_left = far, far_left
        far = math.copysign(min(abs(bound), max(1.05 * abs(ahead), 1.5 * abs(far))), bound)
    return near, near_left, False


def _between(
    left: Callable[[float], float], near: tuple[float, float], far: tuple[float, float]
) -> tuple[float, float, bool]:
    """Regula falsi with halving (Illinois), and bisection where that is slow."""
    (a, at_a), (b, at_b), side = near, far, 0
    for turn in range(_MOST_TRIES):
        middle = (a + b) / 2 if turn % 8 == 7 else a + (b - a) * at_a / (at_a - at_b)
        value = left(middle)
        if abs(value) <= _ENOUGH:
            return middle, value, True
        if value > 0:
            a, at_a = middle, value
            at_b, side = (at_b / 2, 1) if side == 1 else (at_b, 1)
        else:
            b, at_b = middle, value
            at_a, side = (at_a / 2, -1) if side == -1 else (at_a, -1)
    middle = (a + b) / 2
    return middle, left(middle), False


def _persisting(state: AdamWParameterState, steps: int) -> tuple[float, float]:
    """What multiplies m and g in the sum of the first moments, bias-corrected, of so many steps with one gradient."""
    of_moment = of_gradient = 0.0
    for n in range(1, steps + 1):
        corrected = 1.0 - state.beta1 ** (state.step + n)
        of_moment += state.beta1**n / corrected
        of_gradient += (1.0 - state.beta1**n) / corrected
    return of_moment, of_gradient


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.detach() * b.detach()).sum(dtype=torch.float64))
