"""How much memory of tensors is alive at a time, counted operation by operation rather than measured."""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Inside, `peak` is the most bytes of storages that were made inside and alive at one time, on the CPU.

    Storages that operations are given (the model's, a mapped file's) are not counted; nor is what an operation allocates and
    frees by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            # a tensor that is set to a storage which somebody has opened, as those of a file are
            self._meet(tensor, 0 if "set_" in func.__name__ else tensor.untyped_storage().nbytes())
        return out

    def _meet(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(values) if type(v) in (torch.Tensor, torch.nn.Parameter) and v.device.type == "cpu"]
