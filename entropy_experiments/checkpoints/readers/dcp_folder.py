"""A folder of torch's distributed checkpoint (DCP): `.metadata` and `*.distcp`, read in one process
whatever wrote it.

`.metadata` says, by flattened name, where the chunks of each tensor lie: in which file, from which
byte on, at which offsets of the whole tensor. Every chunk is a file of torch.save of its own inside
the `.distcp`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.allowed_names import METADATA_NAMES, dtype_of, sizes
from entropy_experiments.checkpoints.readers.inert_pickle import MOST_BYTES, Damaged, Record, read_pickle
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file, unreadable
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor, reading
from rl_training.errors import UserError
from rl_training.run.sidecar import refuse_special_file

_TENSOR, _BYTES = "TensorStorageMetadata", "BytesStorageMetadata"


@dataclass(frozen=True)
class _Piece:
    """A chunk of a tensor, or an object: where it lies."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class DcpFolder:
    """tensors: By flattened name, e.g. "app.optimizers.state.model.norm.weight.exp_avg". objects:
    Names of everything else.
    """

    folder: Path
    tensors: Mapping[str, LazyTensor]
    objects: Mapping[str, _Piece]

    def value(self, name: str) -> Any:
        """A number, text or list that was saved as an object, or a tensor of one element as a
        number; None where absent.
        """
        if name in self.tensors:
            tensor = self.tensors[name]
            return tensor.read().item() if math.prod(tensor.shape) == 1 else None
        piece = self.objects.get(name)
        if piece is None:
            return None
        found = read_torch_file(self.folder / piece.file, piece.start, piece.length)
        return found.read().item() if isinstance(found, StoredTensor) and found.numel == 1 else found


def is_dcp_folder(folder: Path) -> bool:
    """Whether the folder holds the description of one."""
    return (folder / ".metadata").is_file()


def open_dcp(folder: Path) -> DcpFolder:
    """Look at every tensor of the folder; none is read.

    Raises:
        UserError: For a description that is damaged or holds more than a checkpoint's, chunks that
            do not make up their tensor, and files that are absent or cut short.
    """
    path = folder / ".metadata"
    try:
        refuse_special_file(path)
        if path.stat().st_size > MOST_BYTES:
            raise Damaged("it is larger than any checkpoint's description")
        content = read_pickle(path.read_bytes(), METADATA_NAMES)
        described, stored = _parts(content)
        pieces = _pieces(stored)
        tensors = {
            name: _tensor(folder, name, entry, pieces) for name, entry in described.items() if _is(entry, _TENSOR)
        }
        objects = {name: _object(name, pieces) for name, entry in described.items() if _is(entry, _BYTES)}
    except (Damaged, OSError) as error:
        raise unreadable(path, error) from error
    _check_files(folder, pieces)
    return DcpFolder(folder, tensors, objects)


def _is(entry: Any, kind: str) -> bool:
    return isinstance(entry, Record) and entry.kind.endswith(f" {kind}")


def _parts(content: Any) -> tuple[dict[str, Any], dict[Any, Any]]:
    described = content.get("state_dict_metadata") if isinstance(content, Record) else None
    stored = content.get("storage_data") if isinstance(content, Record) else None
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise Damaged("it is no description of a distributed checkpoint")
    if not all(
        isinstance(name, str) and (_is(entry, _TENSOR) or _is(entry, _BYTES)) for name, entry in described.items()
    ):
        raise Damaged("it describes something that is neither a tensor nor an object")
    return described, stored


def _pieces(stored: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], _Piece]:
    """(name, offsets; None for objects) -> where it lies."""
    pieces = {}
    for index, info in stored.items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise Damaged("it does not say where its tensors lie")
        name, offset = index.get("fqn"), index.get("offset")
        file, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or type(start) is not int or type(length) is not int or start < 0 or length < 0:
            raise Damaged("it does not say where its tensors lie")
        if (
            not isinstance(file, str)
            or not 0 < len(file) < 256
            or "\0" in file
            or "/" in file
            or "\\" in file
            or file.startswith(".")
        ):
            raise Damaged("it names a file outside its folder")
        if info.get("transform_descriptors"):
            raise Damaged("its tensors are compressed or encrypted, which is not read")
        pieces[name, None if offset is None else sizes(offset)] = _Piece(file, start, length)
    return pieces


def _object(name: str, pieces: dict[tuple[str, tuple[int, ...] | None], _Piece]) -> _Piece:
    if (name, None) not in pieces:
        raise Damaged(f"it does not say where {name[:80]!r} lies")
    return pieces[name, None]


def _tensor(
    folder: Path, name: str, entry: Record, pieces: dict[tuple[str, tuple[int, ...] | None], _Piece]
) -> LazyTensor:
    properties, shape = entry.get("properties"), sizes(entry.get("size"))
    state = properties.state if isinstance(properties, Record) else None
    dtype = dtype_of(state[0] if isinstance(state, tuple) and state else None)
    listed = entry.get("chunks")
    if not isinstance(listed, list) or not all(isinstance(chunk, Record) for chunk in listed):
        raise Damaged(f"{name[:80]!r} has no chunks")
    chunks = [(sizes(chunk.get("offsets")), sizes(chunk.get("sizes"))) for chunk in listed]
    _check_cover(name, shape, chunks)
    places = []
    for offset, size in chunks:
        if (name, offset) not in pieces:
            raise Damaged(f"it does not say where a part of {name[:80]!r} lies")
        places.append((offset, size, pieces[name, offset]))
    files = ", ".join(sorted({piece.file for _, _, piece in places}))

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for offset, size, piece in places:
            part = read_torch_file(folder / piece.file, piece.start, piece.length)
            if not isinstance(part, StoredTensor) or part.shape != size or part.dtype != dtype:
                raise Damaged(f"a part of {name[:80]!r} is not what its description says")
            whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] = part.read()
        return whole

    return reading(f"{folder} ({files})", shape, dtype, read)


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Raises Damaged unless the chunks make up the tensor, without gap and overlap."""
    inside = all(
        len(offset) == len(size) == len(shape)
        and all(o + n <= whole for o, n, whole in zip(offset, size, shape, strict=True))
        for offset, size in chunks
    )
    full = [chunk for chunk in chunks if 0 not in chunk[1]]
    if not inside or sum(math.prod(size) for _, size in full) != math.prod(shape) or _overlap(full):
        raise Damaged(f"the parts of {name[:80]!r} do not make up the whole: a process's part is missing")


def _overlap(chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether two chunks share an element. Along one axis, as nearly all are cut, neighbours
    suffice.
    """
    if not chunks or not chunks[0][0]:
        return len(chunks) > 1
    if len(chunks) > 2000:  # a comparison of all pairs would take for ever
        ordered = sorted(chunks)
        return any(_meet(a, b) for a, b in itertools.pairwise(ordered))
    return any(_meet(a, b) for a, b in itertools.combinations(chunks, 2))


def _meet(a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return all(max(oa, ob) < min(oa + na, ob + nb) for oa, na, ob, nb in zip(a[0], a[1], b[0], b[1], strict=True))


def _check_files(folder: Path, pieces: Mapping[Any, _Piece]) -> None:
    """Raises UserError where a file is absent or ends before its last chunk."""
    ends: dict[str, int] = {}
    for piece in pieces.values():
        ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.exists():
            others = f"{len(ends)} files" if len(ends) > 1 else "one file"
            raise UserError(f"{path} is missing: the checkpoint is of {others}, one for each process; copy it again")
        refuse_special_file(path)
        if path.stat().st_size < end:
            raise UserError(f"{path} has {path.stat().st_size} bytes of {end}: it was cut short; copy it again")
