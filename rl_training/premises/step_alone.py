"""Whether the optimizer alone moved the policy between the probe's look before a step and its look after it.

The probe looks in `on_pre_optimizer_step` and in `on_optimizer_step`. A callback whose `on_pre_optimizer_step` comes later, or
whose `on_optimizer_step` comes earlier, may clip, decay or average weights in between, and that would count as the step's.
Weights are compared at the optimizer's own hooks, and only where such a callback is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from rl_training.probe.sharded_weights import is_spread
from rl_training.probe.step_parts import takes_hooks
from rl_training.probe.still_weights import StillWeights

_BEFORE, _AFTER = "on_pre_optimizer_step", "on_optimizer_step"


class StepAlone(TrainerCallback):
    """Warns once of another callback that moves the policy between the probe's two looks at a step.

    Add it right behind the probe's callback.

    Args:
        trainer: its callbacks are looked at when training begins.
        model: the policy without wrappers.
        probe: the probe's callback.
    """

    def __init__(self, trainer: Any, model: nn.Module, probe: TrainerCallback) -> None:
        self._trainer, self._probe = trainer, probe
        self._weights, self._spread = StillWeights(model), is_spread(model)
        self._hooks: list[Any] = []
        self._suspects: dict[str, list[str]] = {}

    def on_train_begin(self, *_args: Any, optimizer: Any = None, **_kwargs: Any) -> None:
        self._end()
        callbacks = list(self._trainer.callback_handler.callbacks)
        place, inner = callbacks.index(self._probe), getattr(optimizer, "optimizer", optimizer)
        self._suspects = {
            _BEFORE: _with(_BEFORE, [c for c in callbacks[place + 1 :] if c is not self]),
            _AFTER: _with(_AFTER, callbacks[:place]),
        }
        if self._spread or not any(self._suspects.values()) or not takes_hooks(inner):
            return
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: self._compare(_BEFORE)),
            inner.register_step_post_hook(lambda *_: self._weights.note()),
        ]

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        if self._hooks:
            self._weights.note()

    def on_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        if self._hooks:
            self._compare(_AFTER)
            self._weights.forget()

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _compare(self, event: str) -> None:
        if (
            not self._suspects[event] or not self._weights.moved()
        ):  # an optimizer may be wrapped, and move more by itself
            return
        self._end()
        where = "after" if event == _AFTER else "before"
        order = "after the probe was attached" if event == _AFTER else "before the probe is attached"
        warnings.warn(
            f"the entropy probe: {' or '.join(self._suspects[event])} moves the policy in {event}, between the "
            f"probe's look {where} the optimizer's step and that step: `measured` and `predicted` hold what it does as well; add "
            f"that callback {order}, and they are of the optimizer's steps alone",
            RuntimeWarning,
            stacklevel=3,
        )


def _with(event: str, callbacks: Sequence[TrainerCallback]) -> list[str]:
    """Names of the callbacks that do something at an event."""
    return [type(c).__name__ for c in callbacks if getattr(type(c), event) is not getattr(TrainerCallback, event)]
