"""Adapters on a base model that accelerate has placed by a device map, with parts of it offloaded to the CPU or to disk.

An offloaded module's weights are read for its forward pass and dropped after it. Two things are added here. Adapters of such
modules lie on the device that computes (PEFT would put them where the weights are: nowhere, and write a copy of the base
model's files). And the graph keeps no offloaded weight until the backward pass, which would need memory for all of
them: it keeps which one it was, and reads it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

_MAP = "hf_device_map"


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook of a module whose weights are offloaded between calls; None for others."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


@contextmanager
def placement_hidden(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT does not see that the model was placed, and leaves every hook where it is."""
    placed = vars(model).pop(_MAP, None)
    try:
        yield
    finally:
        if placed is not None:
            setattr(model, _MAP, placed)


def place_adapters(model: PeftModel, folder: str) -> None:
    """Adapters of offloaded layers, which PEFT has left without values, on the device that computes; read from `folder`."""
    moved = False
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or (hook := offloading_hook(layer.get_base_layer())) is None:
            continue
        for adapters in (getattr(layer, name) for name in layer.adapter_layer_names):
            if isinstance(adapters, nn.Module) and any(p.device.type == "meta" for p in adapters.parameters()):
                adapters.to_empty(device=hook.execution_device)
                moved = True
    if moved:
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))


def read_again_in_backward(model: nn.Module) -> None:
    """Have graphs through `model` keep no weight of its offloaded modules."""
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None:
            module.forward = _forgetting(module, hook)


class _Offloaded(NamedTuple):
    """A saved tensor that is a view of an offloaded weight: which, and which view."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _forgetting(module: nn.Module, hook: AlignDevicesHook) -> Callable:
    aligned = module.forward

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        for name, weight in module._parameters.items():
            # between loading and dropping, when the graph is made, the weights are there
            if weight is not None and not weight.requires_grad and _root(tensor) is _root(weight):
                offset = tensor.storage_offset() - weight.storage_offset()
                return _Offloaded(name, tensor.size(), tensor.stride(), offset)
        return tensor

    def unpack(saved: Tensor | _Offloaded) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parameter = module._parameters[saved.name]
        assert parameter is not None and hook.weights_map is not None
        weight = hook.weights_map[saved.name].to(hook.execution_device, parameter.dtype)
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)

    @wraps(aligned)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return aligned(*args, **kwargs)

    return forward


def _root(tensor: Tensor) -> Tensor:
    """What a tensor is a view of; itself where it is no view."""
    return tensor if tensor._base is None else tensor._base
