"""Tensors that stay in their file until they are read, and the memory that reading them took given back.

`torch.load(mmap=True)` maps a file: what is read of it stays in memory, and counts as the process's, until it is let go of.
"""

from __future__ import annotations

import ctypes
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_DONT_NEED = 4  # MADV_DONTNEED of Linux, on every architecture
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s+(.*)")


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, mapped where the file can be: read from disk where and when it is used.

    Raises what `torch.load` raises.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_sound(path))


def _is_sound(path: Path) -> bool:
    """Whether the file is one of those that can be mapped, and has the checksums that it says: mapped reads test none."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        return False


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
