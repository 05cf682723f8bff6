"""A safetensors file written one tensor at a time: of all the others only names and shapes are
held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from entropy_experiments.checkpoints.readers.trained_state import LazyTensor
from rl_training.errors import UserError
from rl_training.files import write_whole_by

_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], about: Mapping[str, str] | None = None) -> None:
    """Write them whole or not at all, in the order given: equal content is equal bytes, which safetensors itself, whose metadata
    have no order, does not promise.

    Args:
        path: The file.
        tensors: By name; each is read once, written, and let go.
        about: The file's metadata; by default its format alone.

    Raises:
        UserError: For a type that safetensors has not, and whatever reading raises.
    """
    header: dict[str, object] = {"__metadata__": dict(about or {"format": "pt"})}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(
                f"{tensor.origin}: {name!r} is {str(tensor.dtype).removeprefix('torch.')}, which safetensors has not"
            )
        end = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(part: Path) -> None:
        with part.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, tensor in tensors.items():
                values = tensor.read()
                if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                    raise UserError(
                        f"{tensor.origin}: {name!r} is not what its description says: it is damaged; copy it again"
                    )
                file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    write_whole_by(path, write)
