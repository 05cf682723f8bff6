"""How one side's gradient rows are stored in a folder.

gradients.bin        num_grads rows, one sequence each; a row holds all parameters side by side, in the order of grad_sizes
                     (`gradients.bin.part` until every shard is written)
info.json            num_grads, grad_sizes, base_dtype and dtype as bergson's users know them; below them what this program
                     adds: format_version, kind, stored_dtype, shapes, shard_rows, fingerprint
shards/00000.json    one record a finished shard (shard_rows consecutive rows): its rows, bytes, checksum, rounding error

numpy has no bfloat16: such values are kept as their bit patterns, which info.json calls uint16; stored_dtype says what they
are. Source of the layout: docs/guides/gradient-store.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
import torch

from entropy_experiments.kernel.store.fingerprint import Fingerprint
from rl_training.errors import UserError

FORMAT_VERSION = 1
INFO_NAME, DATA_NAME, SHARDS_NAME = "info.json", "gradients.bin", "shards"

RowKind = Literal["score", "entropy"]
StoredDtype = Literal["float32", "float16", "bfloat16"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NUMPY_NAMES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_BFLOAT16_NOTE = "bit patterns of bfloat16, the upper half of a float32: (rows.astype('uint32') << 16).view('float32')"


@dataclass(frozen=True)
class StoreLayout:
    """Sizes and identity of one side; see the module's docstring.

    shapes: parameter -> shape, in the order in which they stand in a row. shard_rows: sequences in a shard; the last shard
    may have fewer. Raises ValueError for sizes that make no store.
    """

    shapes: dict[str, tuple[int, ...]]
    num_grads: int
    kind: RowKind
    base_dtype: StoredDtype
    shard_rows: int
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        if self.num_grads < 1 or self.shard_rows < 1:
            raise ValueError(f"num_grads {self.num_grads} and shard_rows {self.shard_rows} must be at least 1")
        if not self.shapes or not all(self.sizes.values()):
            raise ValueError("a gradient store needs at least one parameter, and none without values")
        if self.base_dtype not in TORCH_DTYPES:
            raise ValueError(f"unknown base_dtype {self.base_dtype!r}: choose one of {', '.join(TORCH_DTYPES)}")
        if self.kind not in get_args(RowKind):
            raise ValueError(f"unknown kind of rows {self.kind!r}: choose one of {', '.join(get_args(RowKind))}")

    @property
    def sizes(self) -> dict[str, int]:
        """Values of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def row_values(self) -> int:
        return sum(self.sizes.values())

    @property
    def row_bytes(self) -> int:
        return self.row_values * self.torch_dtype.itemsize

    @property
    def total_bytes(self) -> int:
        """The size of gradients.bin."""
        return self.num_grads * self.row_bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.base_dtype]

    @property
    def shard_count(self) -> int:
        return -(-self.num_grads // self.shard_rows)

    def shard_range(self, number: int) -> range:
        """The rows of a shard. Raises ValueError where there is no such shard."""
        if not 0 <= number < self.shard_count:
            raise ValueError(f"there is no shard {number}: the store has {self.shard_count}, numbered from 0")
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_grads))

    def columns(self) -> dict[str, slice]:
        """Where each parameter stands in a row."""
        sizes = self.sizes
        return {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True)
        }

    def to_info(self) -> dict[str, Any]:
        """The content of info.json."""
        numpy_name = _NUMPY_NAMES[self.base_dtype]
        code, sizes = np.dtype(numpy_name).str, self.sizes
        info: dict[str, Any] = {
            "num_grads": self.num_grads,
            "grad_sizes": sizes,
            "base_dtype": numpy_name,
            "dtype": {
                "names": list(sizes),
                "formats": [f"({size},){code}" for size in sizes.values()],
                "itemsize": self.row_bytes,
            },
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "stored_dtype": self.base_dtype,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shard_rows": self.shard_rows,
            "fingerprint": self.fingerprint.to_json(),
        }
        return info | ({"stored_dtype_note": _BFLOAT16_NOTE} if self.base_dtype == "bfloat16" else {})

    @classmethod
    def from_info(cls, info: Mapping[str, Any], where: str) -> StoreLayout:
        """Read back what `to_info` gave; `where` names the file in messages.

        Raises UserError for another format version, or where keys are missing, broken or contradict each other.
        """
        version = info.get("format_version")
        if version is None and "grad_sizes" in info:
            raise UserError(f"{where} has no format_version: it was not written by this program")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{where} has format version {version}, this program reads version {FORMAT_VERSION}: compute the gradients "
                "again, or read them with the program that wrote them"
            )
        try:
            layout = cls(
                shapes={str(name): tuple(int(n) for n in shape) for name, shape in info["shapes"].items()},
                num_grads=int(info["num_grads"]),
                kind=info["kind"],
                base_dtype=info["stored_dtype"],
                shard_rows=int(info["shard_rows"]),
                fingerprint=Fingerprint.from_json(info["fingerprint"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} is damaged ({type(error).__name__}: {error}): compute the gradients again"
            ) from error
        again = layout.to_info()
        odd = [key for key in ("grad_sizes", "base_dtype", "dtype") if info.get(key) != again[key]]
        if odd or list(info["grad_sizes"]) != list(again["grad_sizes"]):
            raise UserError(
                f"{where} contradicts itself ({odd[0] if odd else 'the order of grad_sizes'} does not follow from shapes): "
                "it was edited; compute the gradients again"
            )
        return layout

    def difference(self, other: StoreLayout) -> str | None:
        """One clause that names how `other`, a layout found on disk, differs from this one; None where it does not."""
        found = self.fingerprint.difference(other.fingerprint, "now", "in the store")
        if found:
            return found
        if self.shapes != other.shapes or list(self.shapes) != list(other.shapes):
            return _shapes_difference(self.shapes, other.shapes)
        for name in ("num_grads", "kind", "base_dtype", "shard_rows"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                return f"{name} is {here} now, {there} in the store"
        return None


def _shapes_difference(mine: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str:
    for name, shape in mine.items():
        if name not in others:
            return f"the parameter {name!r} is not in the store"
        if shape != others[name]:
            return f"the parameter {name!r} is {list(shape)} now, {list(others[name])} in the store"
    more = [name for name in others if name not in mine]
    return f"the store's parameter {more[0]!r} is not there now" if more else "its parameters stand in another order"
