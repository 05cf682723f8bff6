"""The rows of dump files, JSONL or parquet, one after another in bounded memory; bad files and lines are named.

Nothing but JSON and parquet is read: no pickle, no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rl_training.errors import UserError
from rl_training.tasks.json_lines import regular_file

LONGEST_LINE = 256 << 20
"""Bytes of one line; an episode of many turns with its token ids takes some MiB."""
LARGEST_TABLE = 64 << 30
"""Bytes that a parquet file may have when it is unpacked."""
_ROWS_AT_ONCE = 256

Row = tuple[int, dict[str, Any] | str]
"""(number of the line or row, from 1; its keys and values, or what is wrong with it)."""


def is_parquet(path: Path) -> bool:
    """Whether a file says of itself that it is parquet."""
    with path.open("rb") as handle:
        return handle.read(4) == b"PAR1"


def unit_of(path: Path) -> str:
    """What the rows of a file are called: line or row."""
    return "row" if is_parquet(path) else "line"


def rows_of(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[Row]:
    """Every row of a file. columns: of parquet, the ones to read where they are there.

    Raises UserError where the file is not regular, too large, or cannot be read.
    """
    regular_file(path, str(path))
    try:
        yield from _parquet_rows(path, columns) if is_parquet(path) else _json_rows(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def parquet_names(path: Path) -> list[str]:
    """Column names of a parquet file. Raises UserError where it is damaged."""
    return list(_open(path).schema_arrow.names)


def parquet_note(path: Path, key: str) -> dict[str, Any]:
    """A JSON object among the file's own remarks; {} where there is none."""
    said = (_open(path).schema_arrow.metadata or {}).get(key.encode())
    try:
        found = json.loads(said) if said else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:160]}): copy it again") from None


def _parquet_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    file = _open(path)
    unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if unpacked > LARGEST_TABLE:
        raise UserError(
            f"{path} unpacks to {unpacked / 2**30:.0f} GiB, allowed are {LARGEST_TABLE >> 30}: take a part of it"
        )
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    number = 0
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged after row {number} ({' '.join(str(error).split())[:160]}): copy it again"
        ) from None


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as handle:
        number = 0
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MiB: split it")
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path} is not a text file in UTF-8 but in UTF-16: save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors put it before UTF-8
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | str:
    # NaN passes here (Python's json writes it): whoever reads a value says whether it may stand there.
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not text in UTF-8 (byte {error.start + 1})"
    except RecursionError:
        return "nested too deeply"
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends here, was it cut short?"
        return f"not JSON ({error.msg} at column {error.colno}{cut})"
    except ValueError as error:
        return f"not JSON ({str(error)[:80]})"
    return data if isinstance(data, dict) else "not a JSON object"
