"""Whether the policy is, before a step of the optimizer, what it was after the last one.

A pass after one step stands for the pass before the next (rl_training.integrations.known_pass), and a change over several steps
is laid to these steps alone. Both hold as long as nothing else moves the policy in between: no callback that clips or averages
weights, prunes, merges adapters or gives them another scale, or balances a router by its buffer. Trained weights are added up as
the whole numbers that their bits are, so that the least change of one shows, at the cost of reading them once. Of frozen weights
and of the buffers that a checkpoint holds some elements are compared, within rounding (adapters that are merged for another
engine and taken out again leave that).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.gradients import trainable_parameters

_ELEMENTS = 256  # of a tensor that is not trained
_ROUNDING = 4  # units in the last place of its largest element


class StillWeights:
    """`note` after a step, `moved` before the next.

    Args:
        model: the policy, whose weights lie whole in this process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted: tuple[list[Tensor], list[Any], list[Tensor]] | None = None

    def note(self) -> None:
        """The policy is as a step has left it."""
        self._noted = _sums(self._model), _adapters(self._model), _frozen(self._model)

    def forget(self) -> None:
        """What it was is not known."""
        self._noted = None

    def moved(self) -> bool:
        """Whether it is another since `note`; False where nothing was noted."""
        if self._noted is None:
            return False
        sums, adapters, frozen = self._noted
        now = _sums(self._model)
        same = len(sums) == len(now) and all(
            a.device == b.device and torch.equal(a, b) for a, b in zip(sums, now, strict=True)
        )
        return not same or adapters != _adapters(self._model) or _differ(frozen, _frozen(self._model))


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


def _frozen(model: nn.Module) -> list[Tensor]:
    """Some elements of everything that is saved and not trained."""
    found = [p for p in model.parameters() if not p.requires_grad]
    for module in model.modules():
        kept = module._non_persistent_buffers_set
        buffers = [b for name, b in module._buffers.items() if b is not None and name not in kept]
        found += [b for b in buffers if b.is_floating_point()]  # counters are no part of the policy
    return [_some(t) for t in found if t.device.type != "meta"]


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _ELEMENTS)].clone()


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    if [(t.shape, t.dtype, t.device) for t in before] != [(t.shape, t.dtype, t.device) for t in after]:
        return True
    by_device: dict[torch.device, list[Tensor]] = {}
    for a, b in zip(before, after, strict=True):
        if a.numel():
            exact = not a.is_floating_point()
            allowed = 0.0 if exact else _ROUNDING * torch.finfo(a.dtype).eps * a.double().abs().max()
            gap = (a != b).double().max() if exact else (a.double() - b.double()).abs().max()
            by_device.setdefault(a.device, []).append(~(gap <= allowed))
    return any(bool(torch.stack(flags).any()) for flags in by_device.values())


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters peft's layers use, and their scales, in the order of the layers."""
    return [
        (list(getattr(m, "active_adapters", ())), bool(getattr(m, "disable_adapters", False)), dict(scaling))
        for m in model.modules()
        if isinstance(scaling := getattr(m, "scaling", None), dict)
    ]
