"""The factors of one side's rows on disk: written shard by shard, read block by block.

<folder>/00003.bin    the shard's arrays, one after the other; layers that read the same tensor share it
<folder>/00003.json   its passes: which sequences, which arrays a parameter's uses are made of; every array's place, shape and
                      the checksums of its pieces

Cotangents lie with the parameter's rows first, (out, sequences, tokens), so that a block of rows is read and nothing else. A
record is written after its data were flushed: a shard is whole or does not count. Every piece that is read is held against its
checksum. The folder lies in the work folder, whose manifest says what it belongs to.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.factored_rows import KeptFactors, add_uses, one_row
from entropy_core.passes.factors import PlainRows, RowFactors, Some, as_matrices, from_tensors, matrix_shape
from entropy_experiments.kernel.store.data import checksum, opened, read_at, write_at
from rl_training.errors import UserError
from rl_training.files import read_json_object, remove_leftovers, write_json_whole, write_whole_by
from rl_training.run.disk import disk_errors_explained

PIECE_BYTES = 2**22
_OF = ": "
CACHE_BYTES = 2**28
"""Of arrays that are kept for the next block: inputs, which every block of a layer needs."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int64": torch.int64}


@dataclass(frozen=True)
class _Array:
    """offset: in the file. step: entries along the first axis in a piece, of which each has a checksum."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    step: int
    checksums: tuple[str, ...]

    @property
    def entry_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _StoredPass:
    """sequences: of the batch. uses: objective and parameter -> for each use, name of a tensor -> number of its array."""

    shard: int
    sequences: Tensor
    uses: dict[str, list[dict[str, int]]]


class FactorStore:
    """Factors of a batch's rows, of any number of objectives, in a folder.

    Args:
        folder: Where shards lie.
        shapes: Parameter -> shape.
        shards: For each shard the numbers of its sequences.
        devices: Parameter -> where its rows are formed; None: on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, torch.Size],
        shards: Sequence[Tensor],
        devices: Mapping[str, torch.device] | None = None,
    ) -> None:
        self.folder, self._shapes, self.shards = folder, dict(shapes), list(shards)
        self._devices = {} if devices is None else dict(devices)
        self._passes: list[_StoredPass] = []
        self._arrays: dict[int, list[_Array]] = {}
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def unfinished(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [number for number in range(len(self.shards)) if not self._record_path(number).exists()]

    def write(self, number: int, factors: KeptFactors) -> None:
        """Write a shard: factors of its sequences, numbered within the shard. Raises UserError where the disk is full."""
        arrays: list[dict[str, Any]] = []
        passes: list[dict[str, Any]] = []
        known: dict[tuple, int] = {}
        with disk_errors_explained(self.folder, f"writing factors of gradients, shard {number}"):
            self.folder.mkdir(parents=True, exist_ok=True)

            def fill(path: Path) -> None:
                with opened(path, os.O_WRONLY) as descriptor:
                    for one in factors.passes:
                        uses = {
                            _key(objective, name): [
                                {key: _put(descriptor, arrays, known, key, t, use) for key, t in use.tensors.items()}
                                for use in found
                            ]
                            for (objective, name), found in one.uses.items()
                        }
                        passes.append({"sequences": self.shards[number][one.indices].tolist(), "uses": uses})

            write_whole_by(self._data_path(number), fill)
            write_json_whole(self._record_path(number), {"passes": passes, "arrays": arrays})

    def open(self) -> None:
        """Read the records; all shards must be there. Raises UserError where one is missing or damaged, naming it."""
        remedy = f"remove {self.folder} and run again with --resume"
        remove_leftovers(self.folder)
        self._passes = []
        for number in range(len(self.shards)):
            content = read_json_object(self._record_path(number), remedy)
            try:
                self._arrays[number] = [
                    _Array(a["offset"], tuple(a["shape"]), _DTYPES[a["dtype"]], a["step"], tuple(a["checksums"]))
                    for a in content["arrays"]
                ]
                for one in content["passes"]:
                    self._passes.append(_StoredPass(number, torch.tensor(one["sequences"]), one["uses"]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{self._record_path(number)} is damaged ({error!r}): {remedy}") from error
        if self.order.sort().values.tolist() != torch.cat(self.shards).sort().values.tolist():
            raise UserError(f"{self.folder} holds factors of other sequences: {remedy}")

    @property
    def order(self) -> Tensor:
        """As FactoredSide.order."""
        return torch.cat([one.sequences for one in self._passes])

    def form(self, number: int, name: str, some: Some, out: Tensor) -> bool:
        """As FactoredSide.form. Raises UserError where what is read is not what was written."""
        key = _key(number, name)
        if not any(key in one.uses for one in self._passes):
            return False
        ends = list(accumulate(len(one.sequences) for one in self._passes))
        for one, start, end in zip(self._passes, [0, *ends], ends, strict=False):
            uses = [self._block(one.shard, use, name, some) for use in one.uses.get(key, [])]
            add_uses(uses, some, out[start:end])
        return True

    def device(self, name: str) -> torch.device | None:
        """As KeptFactors.device."""
        used = any(name == key.rpartition(_OF)[2] for one in self._passes for key in one.uses)
        return self._devices.get(name, torch.device("cpu")) if used else None

    def reached(self, name: str) -> Tensor | None:
        """As KeptFactors.reached."""
        found = []
        for one in self._passes:
            for use in (use for key, uses in one.uses.items() if key.rpartition(_OF)[2] == name for use in uses):
                if "tokens" not in use:
                    return None
                found.append(self._whole(one.shard, use["tokens"]).unique())
        return torch.cat(found).unique() if found else None

    def row(self, name: str, sequence: int) -> Tensor | None:
        """As FactoredSide.row."""
        one = next(one for one in self._passes if bool((one.sequences == sequence).any()))
        whole = [self._block(one.shard, use, name, slice(None)) for use in one.uses.get(name, [])]
        return one_row(whole, int((one.sequences == sequence).nonzero()[0, 0]))

    # ---- inside

    def _block(self, shard: int, use: Mapping[str, int], name: str, some: Some) -> RowFactors:
        """A use's factors, of the parameter's rows `some` alone where they lie that way."""
        outer, _ = matrix_shape(self._shapes[name])
        device = self._devices.get(name, torch.device("cpu"))
        if "tokens" in use:
            return from_tensors({key: self._whole(shard, array).to(device) for key, array in use.items()}, outer)
        if isinstance(some, slice):
            start, stop, _ = some.indices(outer)
        else:
            start, stop = int(some[0]), int(some[-1]) + 1
        if "rows" in use:
            rows = self._read(shard, use["rows"], start, stop).transpose(0, 1)
            return from_tensors({"rows": rows.to(device)}, outer, start)
        cotangents = self._read(shard, use["cotangents"], start, stop).movedim(0, -1).to(device)
        inputs = self._whole(shard, use["inputs"]).to(device)
        return from_tensors({"inputs": inputs, "cotangents": cotangents}, outer, start)

    def _whole(self, shard: int, number: int) -> Tensor:
        key = (shard, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        found = self._read(shard, number, 0, self._arrays[shard][number].shape[0])
        self._cache[key] = found
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return found

    def _read(self, shard: int, number: int, start: int, stop: int) -> Tensor:
        """Entries start … stop - 1 along the first axis, each piece held against its checksum."""
        array, path = self._arrays[shard][number], self._data_path(shard)
        first, last = start // array.step, -(-stop // array.step)
        begin, end = first * array.step, min(last * array.step, array.shape[0])
        found = torch.empty((end - begin, *array.shape[1:]), dtype=array.dtype)
        with disk_errors_explained(path, "reading factors of gradients"), opened(path, os.O_RDONLY) as descriptor:
            for piece in range(first, last):
                part = found[piece * array.step - begin : (piece + 1) * array.step - begin]
                read_at(descriptor, part, array.offset + piece * array.step * array.entry_bytes, path)
                if f"{checksum(part):08x}" != array.checksums[piece]:
                    raise UserError(
                        f"{path} is damaged (bytes that are not those written): delete {self._record_path(shard)} and run "
                        "again with --resume"
                    )
        return found[start - begin : stop - begin]

    def _data_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.bin"

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def _key(objective: int, name: str) -> str:
    """Of a parameter's uses in a record."""
    return name if objective == 0 else f"{objective}{_OF}{name}"


def _put(
    descriptor: int, arrays: list[dict[str, Any]], known: dict[tuple, int], key: str, tensor: Tensor, use: RowFactors
) -> int:
    """Write a tensor of a use at the end, unless it is there; the number of its array."""
    identity = (key, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    if identity in known:
        return known[identity]
    if isinstance(use, PlainRows):
        tensor = as_matrices(tensor).transpose(0, 1)
    elif key == "cotangents" and "tokens" not in use.tensors:
        tensor = tensor.movedim(-1, 0)
    last = arrays[-1] if arrays else None
    offset = 0 if last is None else last["offset"] + last["bytes"]
    entry = torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
    step, checksums, at = max(1, PIECE_BYTES // max(1, entry)), [], offset
    for part in tensor.detach().split(step):
        content = part.contiguous().cpu()
        checksums.append(f"{checksum(content):08x}")
        at += write_at(descriptor, content, at)
    known[identity] = len(arrays)
    arrays.append(
        {
            "offset": offset, "bytes": at - offset, "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."), "step": step, "checksums": checksums,
        }
    )  # fmt: skip
    return known[identity]
