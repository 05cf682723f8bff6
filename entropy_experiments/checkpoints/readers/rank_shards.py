"""One tensor out of the parts that its processes saved, each a DTensor: cut along one axis, or the
same everywhere.

A DTensor of process r holds, for n rows over w processes, rows r c .. (r + 1) c with c = ceil(n /
w), the last ones less or none. Source: torch.distributed.tensor, placement_types.Shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.allowed_names import DTENSOR, dtype_of, sizes
from entropy_experiments.checkpoints.readers.inert_pickle import Damaged, Record
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor, reading
from rl_training.errors import UserError


def join(what: str, paths: Sequence[Path], parts: Sequence[Any]) -> Any:
    """The whole of what each process saved: a lazy tensor for tensors, else the value on which all
    agree.

    Args:
        what: Its name, for messages.
        paths: The processes' files, by rank.
        parts: What each of them holds.

    Raises:
        UserError: Where the parts do not make up one tensor, name the file.
    """
    try:
        if all(isinstance(part, Record) and part.kind == DTENSOR for part in parts):
            return _join_parts(what, paths, [_Part(part) for part in parts])
        if all(isinstance(part, StoredTensor) for part in parts):
            return _same(what, paths, parts)
    except Damaged as error:
        raise UserError(f"{paths[0].parent}: {what}: {error}; copy the checkpoint again") from error
    return parts[0]


class _Part:
    """A process's part: its values, the whole's shape, and the place of the process along the axis
    that is cut.
    """

    def __init__(self, record: Record) -> None:
        local, spec = record.get("_local_tensor"), record.get("_spec")
        if not isinstance(local, StoredTensor) or not isinstance(spec, Record):
            raise Damaged("a part of it has no values")
        placements, mesh, meta = spec.get("placements"), spec.get("mesh"), spec.get("tensor_meta")
        fields = meta.arguments if isinstance(meta, Record) and meta.arguments else ()
        if not isinstance(mesh, Record) or len(fields) < 3 or not isinstance(placements, list | tuple):
            raise Damaged("a part of it does not say how it was cut")
        self.local, self.shape, self.dtype = local, sizes(fields[0]), dtype_of(fields[2])
        self.mesh = _mesh_shape(mesh)
        coordinate = mesh.get("_coordinate_on_dim")
        if len(placements) != len(self.mesh) or coordinate is None or len(coordinate) != len(self.mesh):
            raise Damaged("a part of it does not say how it was cut")
        self.coordinate = sizes(coordinate)
        kinds = [p.kind.rpartition(" ")[2] if isinstance(p, Record) else "" for p in placements]
        odd = [kind for kind in kinds if kind not in ("Shard", "Replicate")]
        if odd or kinds.count("Shard") > 1:
            raise Damaged(
                f"it is cut over two axes of processes ({odd[0] if odd else 'Shard'}), as by tensor parallelism, not read"
            )
        self.mesh_axis = kinds.index("Shard") if "Shard" in kinds else None
        shard = None if self.mesh_axis is None else placements[self.mesh_axis]
        self.axis = None if shard is None else (shard.get("dim") if shard.state else shard.arguments[0])
        if self.axis is not None and (type(self.axis) is not int or not 0 <= self.axis < len(self.shape)):
            raise Damaged("a part of it does not say how it was cut")

    @property
    def place(self) -> int:
        """Number of this part along the axis that is cut."""
        return 0 if self.mesh_axis is None else self.coordinate[self.mesh_axis]

    @property
    def count(self) -> int:
        """Parts along the axis that is cut."""
        return 1 if self.mesh_axis is None else self.mesh[self.mesh_axis]

    def expected(self) -> tuple[int, ...]:
        """Shape that this part must have."""
        if self.axis is None:
            return self.shape
        n = self.shape[self.axis]
        chunk = -(-n // max(self.count, 1))
        rows = max(0, min(n, (self.place + 1) * chunk) - self.place * chunk)
        return (*self.shape[: self.axis], rows, *self.shape[self.axis + 1 :])


def _mesh_shape(mesh: Record) -> tuple[int, ...]:
    """Processes along each axis, as releases of torch from 2.4 on write it."""
    ranks, layout = mesh.get("mesh"), mesh.get("_layout")
    if isinstance(ranks, StoredTensor):
        return ranks.shape
    if isinstance(layout, Record):
        axes = layout.get("axes")
        if isinstance(axes, list | tuple) and all(isinstance(axis, Record) for axis in axes):
            return tuple(math.prod(sizes(axis.get("shape"))) for axis in axes)
        shape = layout.get("shape", layout.arguments[0] if layout.arguments else None)
        return sizes((shape,) if type(shape) is int else shape)
    raise Damaged("a part of it does not say how it was cut")


def _join_parts(what: str, paths: Sequence[Path], parts: list[_Part]) -> LazyTensor:
    first = parts[0]
    if any((p.shape, p.dtype, p.mesh, p.mesh_axis, p.axis) != (first.shape, first.dtype, first.mesh, first.mesh_axis, first.axis)
           for p in parts):  # fmt: skip
        raise Damaged("the processes' files are of two checkpoints: they do not cut it alike")
    if math.prod(first.mesh) != len(parts):
        raise Damaged(f"it was cut for {math.prod(first.mesh)} processes, and there are files of {len(parts)}")
    if len({p.coordinate for p in parts}) < len(parts):
        raise Damaged("two files are of the same process: one was copied over another")
    chosen: dict[int, tuple[Path, _Part]] = {}
    for path, part in zip(paths, parts, strict=True):
        if part.local.shape != part.expected() or part.local.dtype != part.dtype:
            raise Damaged(f"{path.name} holds {part.local.shape} where its part is {part.expected()}")
        chosen.setdefault(part.place, (path, part))
    if sorted(chosen) != list(range(first.count)):
        raise Damaged("a process's part is missing")
    files = ", ".join(path.name for path, _ in (chosen[n] for n in sorted(chosen)))

    def read() -> Tensor:
        values = [chosen[n][1].local.read() for n in sorted(chosen)]
        return values[0] if first.axis is None else torch.cat(values, first.axis)

    return reading(f"{paths[0].parent} ({files})", first.shape, first.dtype, read)


def _same(what: str, paths: Sequence[Path], parts: Sequence[StoredTensor]) -> LazyTensor:
    """A tensor that every process holds whole."""
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        raise Damaged(
            "the processes hold it in two shapes: their files are of two checkpoints, or it is cut in a way not read"
        )
    if first.numel <= 1 and len({part.read().item() for part in parts}) > 1:
        raise Damaged("the processes hold two values of it: their files are of two checkpoints")
    return reading(paths[0], first.shape, first.dtype, first.read)
