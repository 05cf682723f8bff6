"""The record of one finished shard, and what storing did to all rows of a store.

rounding error = ||stored - given|| / ||given||,  Euclidean over all values; sums in float64
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entropy_experiments.kernel.store.data import StoredPiece


@dataclass(frozen=True)
class ShardRecord:
    """The content of shards/00000.json.

    shard: its number; start, end: its rows; bytes: of data; crc32: their checksum, 8 hexadecimal digits; squared_norm and
    squared_error: ||given||^2 and ||stored - given||^2; rounded_to_zero: values that were not zero and are now; worst_row: the
    sequence with the largest rounding error, worst_row_error.
    """

    shard: int
    start: int
    end: int
    bytes: int
    crc32: str
    squared_norm: float
    squared_error: float
    rounded_to_zero: int
    worst_row: int
    worst_row_error: float

    @classmethod
    def of(cls, shard: int, span: range, size: int, crc: int, pieces: Iterable[StoredPiece]) -> ShardRecord:
        """From what was written; the pieces' values are not looked at."""
        norms, errors, zeros = zip(*((p.squared_norm, p.squared_error, p.rounded_to_zero) for p in pieces), strict=True)
        norm, error = torch.cat(norms), torch.cat(errors)
        relative = (error / norm.where(norm > 0, torch.ones_like(norm))).sqrt()
        worst = int(relative.argmax())
        return cls(
            shard=shard,
            start=span.start,
            end=span.stop,
            bytes=size,
            crc32=f"{crc:08x}",
            squared_norm=float(norm.sum()),
            squared_error=float(error.sum()),
            rounded_to_zero=sum(zeros),
            worst_row=span.start + worst,
            worst_row_error=float(relative[worst]),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ShardRecord:
        """Raises ValueError where `content` is not what `to_json` gave."""
        numbers = {name for name, field in cls.__dataclass_fields__.items() if field.type in ("int", "float")}
        if set(content) != set(cls.__dataclass_fields__):
            raise ValueError("keys are missing or unknown")
        if not isinstance(content["crc32"], str) or not all(isinstance(content[name], int | float) for name in numbers):
            raise ValueError("a value has another type")
        return cls(**content)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StorageError:
    """What storing did to the rows; `str` gives the line to print.

    relative: the rounding error over all finished shards; worst: the largest of a single row, worst_row the sequence;
    rounded_to_zero: the share of values that were not zero and are now.
    """

    base_dtype: str
    relative: float
    worst: float
    worst_row: int
    rounded_to_zero: float

    @classmethod
    def over(cls, records: list[ShardRecord], base_dtype: str, row_values: int) -> StorageError:
        norm, error = sum(r.squared_norm for r in records), sum(r.squared_error for r in records)
        worst = max(records, key=lambda record: record.worst_row_error)
        values = sum(r.end - r.start for r in records) * row_values
        return cls(
            base_dtype=base_dtype,
            relative=(error / norm) ** 0.5 if norm else 0.0,  # rows of zeros are stored as they are
            worst=worst.worst_row_error,
            worst_row=worst.worst_row,
            rounded_to_zero=sum(r.rounded_to_zero for r in records) / values,
        )

    def __str__(self) -> str:
        if not self.relative:
            return f"gradients stored as {self.base_dtype}: exact"
        return (
            f"gradients stored as {self.base_dtype}: rounding error {self.relative:.1e} of the rows' norm (worst row "
            f"{self.worst:.1e}, sequence {self.worst_row}); {self.rounded_to_zero:.2%} of the values became zero"
        )
