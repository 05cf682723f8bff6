"""Tensors that stay in their file until they are read, and the memory that reading them took given back.

`torch.load(mmap=True)` maps a file: what is read of it stays in memory, and counts as the process's, until it is let go of.
"""

from __future__ import annotations

import ctypes
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_training.errors import UserError

_DONT_NEED = 4  # MADV_DONTNEED of Linux, on every architecture
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s+(.*)")


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, mapped where the file can be: read from disk where and when it is used.

    Raises what `torch.load` raises, and UserError for a file that would unpack to more than its own size: an archive that is
    compressed, or a tensor that repeats its numbers.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_sound(path))
    for tensor in _tensors(content):
        plain = tensor.layout == torch.strided and not tensor.is_meta
        if plain and tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path} has a tensor of {tensor.numel():,} numbers and holds fewer of them, which no trainer saves: it is "
                "damaged or was tampered with; copy it again"
            )
    return content


def _is_sound(path: Path) -> bool:
    """Whether the file is one of those that can be mapped, and has the checksums that it says: mapped reads test none."""
    try:
        with zipfile.ZipFile(path) as file:
            _refuse_larger_inside(path, file.infolist())
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        return False


def _refuse_larger_inside(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raises UserError before anything is unpacked; torch.save stores everything as it is."""
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(
            f"{path} is compressed or claims to hold more than fits into it, which torch.save does not do: it is damaged or was "
            "tampered with; copy it again, or save it anew with torch.save"
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists; a container that holds itself is gone through once."""
    left, seen = [content], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


class MappedPages:
    """The pages of a file that this process has mapped; tensors of it must live as long as the object does."""

    def __init__(self, path: Path) -> None:
        self._ranges = _ranges(path)

    def forget(self) -> None:
        """Give their memory back. Nothing is lost: a page that is used again is read again."""
        if not self._ranges:
            return
        madvise = ctypes.CDLL(None).madvise
        for start, end in self._ranges:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_DONT_NEED))


def _ranges(path: Path) -> Sequence[tuple[int, int]]:
    """Addresses at which the file is mapped; none where the system does not tell."""
    if sys.platform != "linux":  # others let go of mapped pages by themselves
        return ()
    own = str(path.resolve())
    lines = (
        _LINE.fullmatch(line)
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return [(int(line[1], 16), int(line[2], 16)) for line in lines if line is not None and line[3] == own]
