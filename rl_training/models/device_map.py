"""Where the parts of a base model go that is too large for one device: accelerate's device map,
checked before it is used.

Modules on a device stay there, and hidden states travel between them. Modules on "disk", and those
on "cpu" beside an accelerator, are offloaded: their weights are read whenever they are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from rl_training.errors import UserError

_OFFLOADED = ("cpu", "disk")


class PlacementError(UserError):
    """A device map that does not fit the model or the machine."""


@dataclass(frozen=True)
class DeviceMap:
    """Where a model's modules are placed.

    Attributes:
        modules: "auto", "balanced" or "sequential" (accelerate chooses), or module name -> device
            ("" names the whole model).
        max_memory: device -> bytes, for maps that accelerate chooses.
        offload_folder: where weights go that are offloaded to disk and cannot be read from the
            model's own files (those that are no safetensors, or are converted while loading).
    """

    modules: str | Mapping[str, int | str]
    max_memory: Mapping[int | str, int] | None = None
    offload_folder: str | None = None

    def arguments(self, config: Any) -> dict[str, Any]:
        """Keywords of `from_pretrained` for a model of this configuration.

        Raises:
            PlacementError: a module that is not in the model or in no part of the map, and a device
                that is not there.
        """
        devices = [] if isinstance(self.modules, str) else list(self.modules.values())
        for device in [*devices, *(self.max_memory or {})]:
            _check_device(device)
        modules = self.modules
        if not isinstance(modules, str):
            with init_empty_weights():
                empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            modules = _without_nesting(empty, _places(empty, modules))
        return {
            "device_map": modules,
            "max_memory": None if self.max_memory is None else {d: int(n) for d, n in self.max_memory.items()},
            "offload_folder": self.offload_folder,
        }


def _check_device(device: int | str) -> None:
    if device == "disk":
        return
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise PlacementError(
            f"device_map: {device!r} is no device: write 0 (a GPU's number), cuda:0, cpu or disk"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PlacementError(
            f"device_map: no device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )


def _places(model: nn.Module, modules: Mapping[str, int | str]) -> dict[str, int | str]:
    """Weight or buffer -> device, that of the longest name in the map that it lies under."""
    weights, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    known = [name for name, _ in model.named_modules() if name] + weights
    for name in modules:
        if name and name not in known:
            near = get_close_matches(name, known, n=1) or ["model.layers.0"]
            raise PlacementError(f"device_map: the model has no module {name!r}; did you mean {near[0]!r}?")
    found: dict[str, int | str] = {}
    for tensor in dict.fromkeys([*weights, *buffers]):
        parts = tensor.split(".")
        names = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
        name = next((name for name in names if name in modules), None)
        if name is None and tensor in weights:
            raise PlacementError(
                f"device_map gives no device for {tensor!r}: name its module, or give all the rest one by the name ''"
            )
        found[tensor] = _main_device(modules) if name is None else modules[name]  # small tables: of angles, say
    return found


def _main_device(modules: Mapping[str, int | str]) -> int | str:
    """Where what is offloaded is computed."""
    return next((device for device in modules.values() if device not in _OFFLOADED), "cpu")


def _without_nesting(model: nn.Module, places: Mapping[str, int | str]) -> dict[str, int | str]:
    """The map in the largest modules that lie on one device: accelerate knows no names inside one
    another.
    """
    whole, main = set(getattr(model, "_no_split_modules", None) or ()), _main_device(places)
    out: dict[str, int | str] = {}

    def walk(module: nn.Module, name: str) -> None:
        inside = {place for tensor, place in places.items() if not name or f"{tensor}.".startswith(f"{name}.")}
        if len(inside) <= 1:
            out.update(dict.fromkeys([name] if inside else [], *inside))
            return
        if type(module).__name__ in whole and len({main if place in _OFFLOADED else place for place in inside}) > 1:
            raise PlacementError(f"device_map cuts {name} over several devices, which cannot run: give it one device")
        own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
        names = (f"{name}.{key}".lstrip(".") for key in own)
        out.update({tensor: places[tensor] for tensor in names if tensor in places})
        for key, child in module.named_children():
            walk(child, f"{name}.{key}".lstrip("."))

    walk(model, "")
    return out
