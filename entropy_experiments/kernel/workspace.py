"""Finished pieces of a kernel on disk, so that a run that was killed goes on where it stood.

<folder>/manifest.json            what the pieces belong to: configuration, model, batches, plan
<folder>/<matrix>/<piece>.npz     one block: (objectives, rows of a chunk, columns of a tile), with zip's checksum

A block is written under another name, flushed and renamed: it is whole or not there. A resumed run that differs in anything
the manifest names is refused; the same run repeats only the blocks that are missing, and ends with the same bits.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_training.errors import UserError
from rl_training.files import read_json_object, write_json_whole, write_whole
from rl_training.run.disk import disk_errors_explained

_MANIFEST = "manifest.json"


class KernelWorkspace:
    """Blocks under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Begin, or go on with, the work that `identity` (JSON-able) describes. Call in one process.

        Raises UserError where the folder holds other work, naming the first difference.
        """
        path, identity = self.folder / _MANIFEST, dict(identity)
        if path.exists():
            found = read_json_object(path, "start anew with --overwrite")
            difference = first_difference(identity, found)
            if difference is not None:
                raise UserError(
                    f"{self.folder.parent} holds unfinished work of another analysis ({difference}): start it as it was, or "
                    "anew with --overwrite"
                )
            return
        with disk_errors_explained(self.folder, "beginning the work"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_whole(path, identity)

    def path(self, matrix: str, piece: str) -> Path:
        return self.folder / matrix / f"{piece}.npz"

    def has(self, matrix: str, piece: str) -> bool:
        return self.path(matrix, piece).exists()

    def write(self, matrix: str, piece: str, block: Tensor) -> None:
        """Raises UserError where the disk is full or not writable."""
        buffer = io.BytesIO()
        np.savez(buffer, block=block.detach().float().cpu().numpy())
        path = self.path(matrix, piece)
        with disk_errors_explained(path, "writing a block of the kernel"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, buffer.getvalue())

    def read(self, matrix: str, piece: str) -> Tensor:
        """Raises UserError for a block that is missing or damaged, naming it."""
        path = self.path(matrix, piece)
        try:
            with np.load(path) as content:
                return torch.from_numpy(content["block"])
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing: do all processes see the same results folder? If so, run again with --resume"
            ) from error
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): remove it and run again with --resume") from error


def first_difference(new: Any, old: Any, where: str = "") -> str | None:
    """The first place at which two JSON-able values differ, in words; None where they are equal."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            found = first_difference(new.get(key), old.get(key), f"{where}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(new, list | tuple) and isinstance(old, list | tuple) and len(new) == len(old):
        pairs = enumerate(zip(new, old, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}[{i}]")) is not None), None)
    if new == old:
        return None
    was, now = (repr(v) if len(repr(v)) <= 80 else repr(v)[:77] + "..." for v in (old, new))
    return f"{where} was {was}, now it is {now}"
