"""gradients.bin: bytes in and out of it at given places, conversion to the stored precision, and checksums.

Data are written by positioned writes and read by positioned reads, never through a memory map: on a full disk or a file that
was cut short a memory map kills the process (SIGBUS), a write or a read says what is wrong.

The checksum is CRC-32: it finds every burst of up to 32 flipped bits for certain, anything else but once in 4 billion, and
at 4 GB/s on one core it costs less than the disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_experiments.kernel.store.layout import StoreLayout
from rl_training.errors import UserError

PIECE_BYTES = 4 * 2**20
_ADVICE = {
    "float16": "float16 reaches to 65504: store as bfloat16 or float32",
    "bfloat16": "bfloat16 ends where float32 ends: store as float32",
}


class StoredPiece(NamedTuple):
    """Consecutive rows as they are stored, and what storing did to them; float64 sums, one entry a row."""

    values: Tensor
    """(n, row_values) in the stored dtype, on the CPU."""
    squared_norm: Tensor
    """||given||^2, (n,)"""
    squared_error: Tensor
    """||stored - given||^2, (n,)"""
    rounded_to_zero: int
    """Values that were not zero, and are now."""


def stored_pieces(layout: StoreLayout, rows: Mapping[str, Tensor], first: int) -> Iterator[StoredPiece]:
    """Convert rows (name -> (n, *shape), sequences first … first + n - 1) to the stored precision, some 4 MiB at a time.

    Raises UserError for a value that is not finite or does not fit, naming the sequence and the parameter.
    """
    count = len(next(iter(rows.values())))
    step = max(1, PIECE_BYTES // (4 * layout.row_values))
    for start in range(0, count, step):
        end = min(start + step, count)
        given = torch.cat([rows[name][start:end].detach().reshape(end - start, -1) for name in layout.shapes], dim=1)
        if given.dtype.itemsize < 4:
            given = given.float()  # sums of squares need its range and precision
        squared_norm = _squared_norms(given)
        stored = given.to(layout.torch_dtype)
        if stored.dtype == given.dtype:
            squared_error, lost = torch.zeros_like(squared_norm), 0
        else:
            error = stored.to(given.dtype).sub_(given)
            squared_error = _squared_norms(error)
            lost = int(((stored == 0) & (given != 0)).sum())
        fits = torch.isfinite(squared_norm) & torch.isfinite(squared_error)
        if not bool(fits.all()):
            _refuse(layout, given, stored, int((~fits).nonzero()[0, 0]), first + start)
        yield StoredPiece(stored.cpu().contiguous(), squared_norm.cpu(), squared_error.cpu(), lost)


def _squared_norms(values: Tensor) -> Tensor:
    """(n,) float64. In float32 forty times as fast, and as good, unless squares leave its range."""
    norms = torch.linalg.vector_norm(values, dim=1)
    if bool(((norms > 1e-12) & torch.isfinite(norms)).all()):
        return norms.double().square()
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()


def _refuse(layout: StoreLayout, given: Tensor, stored: Tensor, row: int, first: int) -> None:
    for name, columns in layout.columns().items():
        values = given[row, columns]
        if not bool(torch.isfinite(values).all()):
            kind = "NaN" if bool(values.isnan().any()) else "infinite values"
            raise UserError(
                f"sequence {first + row}: its gradient of {name!r} has {kind}; look at this sequence's text and length, and "
                "load the model in float32"
            )
        if not bool(torch.isfinite(stored[row, columns]).all()):
            raise UserError(
                f"sequence {first + row}: its gradient of {name!r} reaches {float(values.abs().max()):.3g}, too large for "
                f"{layout.base_dtype}. {_ADVICE.get(layout.base_dtype, 'Scale the objective down')}"
            )
    raise UserError(f"sequence {first + row}: the norm of its gradient overflows; load the model in float32")


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor that is closed again."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(descriptor: int, values: Tensor, offset: int) -> int:
    """Write a contiguous CPU tensor's bytes at `offset`, all of them; their number is returned. Raises OSError."""
    content = _bytes_of(values)
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)
    return done


def checksum(values: Tensor, start: int = 0) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes, continuing from `start`."""
    return zlib.crc32(_bytes_of(values), start)


def read_rows(
    path: Path,
    layout: StoreLayout,
    rows: range,
    columns: slice | None = None,
    out: Tensor | None = None,
    with_checksum: bool = False,
) -> tuple[Tensor, int]:
    """Rows as (len(rows), len(columns)) float32, and where asked for the CRC-32 of their bytes on disk (0 otherwise).

    columns: of the flat row, None for all of it. out: a contiguous tensor to read into; beside it at most some 4 MiB are
    needed. Raises UserError where the file ends before the data do, OSError where it cannot be read.
    """
    first, end = (0, layout.row_values) if columns is None else (columns.start, columns.stop)
    if out is None:
        out = torch.empty((len(rows), end - first))
    size, crc = layout.torch_dtype.itemsize, 0
    step = max(1, PIECE_BYTES // layout.row_bytes) if end - first == layout.row_values else 1
    with opened(path, os.O_RDONLY) as descriptor:
        for start in range(0, len(rows), step):
            target = out[start : start + step]
            stored = target if layout.torch_dtype == out.dtype else torch.empty_like(target, dtype=layout.torch_dtype)
            _read_at(descriptor, _bytes_of(stored), rows[start] * layout.row_bytes + first * size, path)
            if with_checksum:
                crc = checksum(stored, crc)
            if stored is not target:
                target.copy_(stored)
    return out, crc


def read_checksum(path: Path, layout: StoreLayout, rows: range) -> int:
    """CRC-32 of whole rows on disk, read some 4 MiB at a time."""
    step, crc = max(1, PIECE_BYTES // layout.row_bytes), 0
    with opened(path, os.O_RDONLY) as descriptor:
        for start in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - start) * layout.row_bytes
            piece = torch.empty(count, dtype=torch.uint8)
            _read_at(descriptor, _bytes_of(piece), start * layout.row_bytes, path)
            crc = checksum(piece, crc)
    return crc


def read_at(descriptor: int, target: Tensor, offset: int, path: Path) -> None:
    """Fill a contiguous CPU tensor with the bytes at `offset`. Raises UserError where the file ends before, OSError."""
    _read_at(descriptor, _bytes_of(target), offset, path)


def _read_at(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise UserError(
                f"{path} ends at byte {offset + done}, before its rows do: it was cut short; compute it again"
            )
        done += count


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())
