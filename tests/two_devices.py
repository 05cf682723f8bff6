"""A second device on a machine that has one: arithmetic runs on the CPU, and refuses tensors of two devices as CUDA does.

Inside `second_device()`, tensors sent to `FAR` carry its name. Every operation passes through here, factories, copies and
autograd's own among them: where tensors on FAR meet others, it raises. The CPU stands for another GPU here, so that its
numbers without dimensions are refused too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("lazy:0")  # a device type that autograd walks without a runtime of its own
_COPIES = ("_to_copy", "copy_")


class _Far(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
        inner = inner.inner if isinstance(inner, _Far) else inner.detach()
        if inner.device.type == "meta":  # accelerate makes a parameter of the old one's class
            return torch.nn.Parameter(inner, requires_grad)
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=FAR, requires_grad=requires_grad, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    far = [t for t in tensors if isinstance(t, _Far)]
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    if far and len(far) < len(tensors) and name not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {FAR} and cpu")
    if device is not None and torch.device(device).type == FAR.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, _Far) else t, (args, kwargs))
    out = func(*args, **kwargs)
    if name.endswith("_") and not name.startswith("_"):
        return tensors[0]  # in place
    goes_far = bool(far) if device is None else torch.device(device).type == FAR.type
    return tree_map(lambda t: _Far(t) if isinstance(t, torch.Tensor) else t, out) if goes_far else out


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    with _Devices():
        yield
