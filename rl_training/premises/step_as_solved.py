"""Whether the optimizer takes the step that the entropy controller solved for.

The controller predicts a step from gradients, moments and rates as they are when gradients have been clipped. A callback that
changes gradients, weights or rates after that makes it another step. AdamW is elementwise, so that some elements of every
parameter tell (rl_training.probe.foretold_step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from entropy_core.adamw import AdamWParameterState, read_adamw_state, split_adamw_update
from entropy_core.gradients import trainable_parameters
from rl_training.probe.foretold_step import ForetoldStep, some_elements
from rl_training.probe.step_parts import opened


class StepAsSolved:
    """Call `watch` when training begins, `note` in every step when gradients are final, `end` when training ends.

    Args:
        model: the policy without wrappers, its weights whole in this process.
        tell: gets a sentence after a step that was another one.
    """

    def __init__(self, model: nn.Module, tell: Callable[[str], None]) -> None:
        self._model, self._tell = model, tell
        self._hook: Any = None
        self._foretold: ForetoldStep | None = None

    def watch(self, optimizer: Any) -> None:
        """Begin to watch an optimizer of torch's, accelerate's wrapper around it or not."""
        self.end()
        self._hook = opened(optimizer).register_step_post_hook(lambda *_: self._compare())

    def end(self) -> None:
        """Watch no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._foretold = None

    def note(self, optimizer: Any) -> None:
        """The coming step is that of AdamW with the gradients, moments, rates and weights as they are now.

        Raises:
            TypeError, ValueError: the optimizer is not AdamW.
        """
        parameters = trainable_parameters(self._model)
        states = {n: _cut(s) for n, s in read_adamw_state(optimizer, parameters, others=True).items()}
        before = {name: some_elements(parameters[name]) for name in states}
        gradients = {n: None if (g := parameters[n].grad) is None else some_elements(g) for n in states}
        self._foretold = ForetoldStep(before, split_adamw_update(states, gradients, before))

    def _compare(self) -> None:
        foretold, self._foretold = self._foretold, None
        off = None if foretold is None else foretold.off(dict(self._model.named_parameters()))
        if off is not None:
            self._tell(
                f"the optimizer took another step than the one that was solved for (relative difference {off:.2g}): a callback "
                "or a hook changes gradients, rates or weights between clipping and the optimizer's step, and what is logged as "
                "predicted is of the step without it; change gradients in the trainer's training_step, rates in on_step_begin, "
                "and weights in on_step_end"
            )


def _cut(state: AdamWParameterState) -> AdamWParameterState:
    """The state of these elements alone."""
    largest = state.max_exp_avg_sq
    return replace(
        state,
        exp_avg=some_elements(state.exp_avg),
        exp_avg_sq=some_elements(state.exp_avg_sq),
        max_exp_avg_sq=None if largest is None else some_elements(largest),
    )
