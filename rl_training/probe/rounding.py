"""Whether a measured change is more than the rounding of weights or passes in half precision."""

from __future__ import annotations

import torch
from torch import nn

from rl_training.probe.change import EntropyChange

_HALF = (torch.bfloat16, torch.float16)
# Of a small step the measured change is its own derivative on the same tokens (`same_tokens`) but for higher orders.
_FAR_OFF = 0.5


class RoundingNoise:
    """Of one model: says once where its precision makes measured changes noise."""

    def __init__(self, model: nn.Module) -> None:
        coarse = [p for p in model.parameters() if p.dtype in _HALF]
        self._trained = any(p.requires_grad for p in coarse)
        self._dtype = coarse[0].dtype if coarse else None

    def word(self, change: EntropyChange) -> str | None:
        """What to say of a step, None where there is nothing to say, or it was said."""
        if self._dtype is None or change.measured_change is None:
            return None
        if not self._trained and not _is_noise(change, torch.finfo(self._dtype).eps):
            return None
        name, self._dtype = str(self._dtype).removeprefix("torch."), None
        what = (
            f"weights are trained in {name}, which rounds much of a step away"
            if self._trained
            else f"passes run in {name}, and the measured change is not that of its own derivative on the same tokens"
        )
        return (
            f"{what}: `measured` is mostly rounding noise where steps are small. Load the model in float32 (and set bf16=True "
            "for the training's own passes, if they are to be in half precision: the probe's are then in float32)"
        )


def _is_noise(change: EntropyChange, eps: float) -> bool:
    """Far from its derivative, by no more than rounding explains: larger steps have higher orders in any precision."""
    measured, derivative = change.measured_change, change.same_tokens
    assert measured is not None
    off = abs(measured - derivative)
    return _FAR_OFF * max(abs(measured), abs(derivative)) < off <= eps
