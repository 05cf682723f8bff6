"""Whether the policy is, before a step of the optimizer, what it was after the last one.

A pass after one step stands for the pass before the next (rl_training.integrations.known_pass), and a change over several steps
is laid to these steps alone. Both hold as long as nothing else moves the policy in between: no callback that clips or averages
weights, prunes, merges adapters or gives them another scale. Weights are added up as the whole numbers that their bits are, so
that the least change of one shows, at the cost of reading them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.gradients import trainable_parameters


class StillWeights:
    """`note` after a step, `moved` before the next.

    Args:
        model: the policy, whose weights lie whole in this process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted: tuple[list[Tensor], list[Any]] | None = None

    def note(self) -> None:
        """The policy is as a step has left it."""
        self._noted = _sums(self._model), _adapters(self._model)

    def forget(self) -> None:
        """What it was is not known."""
        self._noted = None

    def moved(self) -> bool:
        """Whether it is another since `note`; False where nothing was noted."""
        if self._noted is None:
            return False
        sums, adapters = self._noted
        now = _sums(self._model)
        same = len(sums) == len(now) and all(
            a.device == b.device and torch.equal(a, b) for a, b in zip(sums, now, strict=True)
        )
        return not same or adapters != _adapters(self._model)


def _sums(model: nn.Module) -> list[Tensor]:
    """For each device the sums of the trained parameters on it, in order."""
    found: dict[torch.device, list[Tensor]] = {}
    for parameter in trainable_parameters(model).values():
        found.setdefault(parameter.device, []).append(_bits(parameter.detach()))
    return [torch.stack(sums) for sums in found.values()]


def _bits(weights: Tensor) -> Tensor:
    """Sum of a tensor's bits, eight bytes a number; it may wrap around."""
    whole = weights.contiguous().flatten()
    size = whole.element_size()
    if whole.data_ptr() % 8 or whole.storage_offset() * size % 8:
        whole = whole.clone()
    octets = whole.view(torch.uint8)
    end = len(octets) - len(octets) % 8
    return octets[:end].view(torch.int64).sum() + octets[end:].sum(dtype=torch.int64)


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters peft's layers use, and their scales, in the order of the layers."""
    return [
        (list(getattr(m, "active_adapters", ())), bool(getattr(m, "disable_adapters", False)), dict(scaling))
        for m in model.modules()
        if isinstance(scaling := getattr(m, "scaling", None), dict)
    ]
