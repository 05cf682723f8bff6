"""P in a file of its own: rows are stored without it, so that another one can be tried without forming them again.

preconditioner.safetensors: parameter -> P in the parameter's shape; metadata: text, a checksum (crc32) among it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rl_training.errors import UserError, first_line
from rl_training.files import write_whole
from rl_training.run.disk import disk_errors_explained

PRECONDITIONER_NAME = "preconditioner.safetensors"
_CHECKSUM = "crc32"


def write_preconditioner(
    folder: Path | str, preconditioner: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = False
) -> Path:
    """Write P (name -> tensor) as `<folder>/preconditioner.safetensors`, whole or not at all; its path is returned.

    metadata: what P is, e.g. {"formula": ..., "epsilon": ..., "step": ...}. Raises UserError where the file is there already
    (unless `overwrite`) or cannot be written.
    """
    path = Path(folder) / PRECONDITIONER_NAME
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: remove it, or write into another folder")
    tensors = {name: p.detach().cpu().contiguous() for name, p in preconditioner.items()}
    content = {str(key): str(value) for key, value in metadata.items()}
    content[_CHECKSUM] = _crc32(tensors, content)
    with disk_errors_explained(path, "writing the preconditioner"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(tensors, metadata=content))
    return path


def read_preconditioner(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """P and its metadata. Raises UserError where the file is missing, damaged, or not one that `write_preconditioner` wrote."""
    path = Path(folder) / PRECONDITIONER_NAME
    if not path.is_file():
        raise UserError(f"no preconditioner at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({first_line(error)})") from error
    expected = metadata.pop(_CHECKSUM, None)
    if expected is None:
        raise UserError(f"{path} has no checksum in its metadata: it was not written by this program")
    if expected != _crc32(tensors, metadata):
        raise UserError(f"{path} is damaged (its checksum is not {expected}): write it again from the checkpoint")
    return tensors, metadata


def _crc32(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of all tensors, their names, and the metadata without the checksum itself."""
    value = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), value)
        value = zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), value)
    return f"{value:08x}"
