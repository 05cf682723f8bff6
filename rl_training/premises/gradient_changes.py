"""Whether the gradient that the optimizer steps with is the one that the backward pass left, but
for a factor (clipping).

A callback or a hook of the optimizer may add noise, project, or clip value by value; the recorded
weights of sequences then say nothing of the step. A few elements of every parameter's gradient are
kept from the last backward pass of a step and checked against those at the optimizer's call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rl_training.premises.loss_reading import LossReader
from rl_training.probe.step_parts import takes_hooks

_ELEMENTS = 256  # of a parameter
_SAME = 1e-3  # of the gradient's norm, over these elements: the rounding of a factor, also of half precision's scaler


class GradientChanges:
    """Watches the steps 1, 2, 4, 8, ... of a run.

    Args:
        tell: gets a sentence before the optimizer steps with another gradient.
    """

    def __init__(self, trainer: Any, reader: LossReader, tell: Callable[[str], None]) -> None:
        self._trainer, self._tell = trainer, tell
        self._model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        self._kept: dict[str, Tensor] = {}
        self._steps = 0
        self._hooked: Any = None
        reader.after_micro_batch.append(self._keep)
        reader.after_addition.append(self._keep_again)

    def watch(self, optimizer: Any) -> None:
        """Begin to watch an optimizer.

        Args:
            optimizer: of the run that begins, accelerate's wrapper or not.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not self._hooked and takes_hooks(inner):
            self._hooked = inner
            inner.register_step_pre_hook(lambda *_: self._compare())

    def _keep(self, _readings: Any) -> None:
        if self._trainer.accelerator.sync_gradients:
            self._steps += 1
            watched = not self._steps & (self._steps - 1)
            self._kept = self._some() if watched else {}

    def _keep_again(self) -> None:
        self._kept = self._some() if self._kept else {}

    def _some(self) -> dict[str, Tensor]:
        found = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
        return {n: g.flatten()[:: max(1, g.numel() // _ELEMENTS)].double() for n, g in found.items()}

    def _rounding(self) -> float:
        """What a factor leaves at most of gradients in their own precision: half a unit in the last place, 0.4% in bfloat16."""
        types = {p.grad.dtype for p in self._model.parameters() if p.grad is not None}
        return max((torch.finfo(dtype).eps / 2 for dtype in types), default=0.0)

    def _compare(self) -> None:
        before, self._kept = self._kept, {}
        if not before:
            return
        after = self._some()
        gone = [name for name in before if name not in after]
        old = torch.cat([g.cpu() for name, g in before.items() if name not in gone] or [torch.zeros(1)])
        new = torch.cat([after[name].cpu() for name in before if name not in gone] or [torch.zeros(1)])
        size = float(old @ old)
        if not gone and (size == 0.0 or not bool(torch.isfinite(torch.stack([old.sum(), new.sum()])).all())):
            return  # nothing to compare, or for others to complain of
        factor = float(new @ old) / size if size else 0.0
        left = float((new - factor * old).norm() / new.norm().clamp(min=1e-300))
        if gone or left > max(_SAME, self._rounding()) or factor < 0:
            where = f"that of {gone[0]!r} is gone" if gone else f"{left:.1%} of it is no multiple of what that left"
            self._tell(
                f"the gradient is changed between the backward pass and the optimizer's step ({where}): a callback or an "
                "optimizer hook adds to it, projects it, or clips it value by value, and the recorded weights say nothing of "
                "such a step; take that out"
            )
