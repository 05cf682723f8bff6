"""JSON, one object a line, of files that a person made: bad lines are named by number, and no file
can hang or overwhelm us.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl_training.errors import UserError

LONGEST_LINE = 16 << 20
"""Bytes of one line."""
LARGEST_FILE = 4 << 30
"""Bytes of a file."""
_DEEPEST = 32
_LARGEST_INTEGER = 1 << 63


def regular_file(path: str | Path, shown: str) -> Path:
    """The file of a path.

    Raises UserError, beginning with `shown`, where it has no end, is too large or is not there.
    """
    file = Path(path).expanduser()
    try:
        mode = file.stat()
    except FileNotFoundError:
        raise UserError(f"{shown} does not exist (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode.st_mode):
        what = "a folder" if stat.S_ISDIR(mode.st_mode) else "a pipe or a device"
        raise UserError(f"{shown} is {what}: name a file with one JSON object a line")
    if mode.st_size > LARGEST_FILE:
        raise UserError(
            f"{shown} has {mode.st_size / 2**30:.1f} GiB, allowed are {LARGEST_FILE >> 30}: take a part of it"
        )
    return file


def json_lines(path: str, setting: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, object or what is wrong with the line) of every line that is not blank.

    Args:
        setting: the key that named the file, for errors.

    Raises:
        UserError: it is no regular file, too large, or cannot be read.
    """
    shown = f"{setting}: {path}"
    file = regular_file(path, shown)
    try:
        with file.open("rb") as handle:
            number = 0
            while line := handle.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{shown}: line {number} is longer than {LONGEST_LINE >> 20} MiB: split it")
                if number == 1:
                    _refuse_other_encodings(line, shown)
                    line = line.removeprefix(b"\xef\xbb\xbf")  # some editors put it before UTF-8
                if line.strip():
                    yield number, parse_line(line)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from None


def _refuse_other_encodings(line: bytes, shown: str) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{shown} is not a text file in UTF-8 but in UTF-16: save it as UTF-8")


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it.

    Numbers are finite, integers fit 64 bits, texts are whole characters.
    """
    try:
        data = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if not isinstance(data, dict):
            return "not a JSON object"
        check_values(data)
    except UnicodeDecodeError as error:
        return f"not text in UTF-8 (byte {error.start + 1})"
    except RecursionError:
        return f"nested deeper than {_DEEPEST} levels"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except ValueError as error:
        return str(error)
    return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:40]!r} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON knows")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def check_values(value: Any, depth: int = 1) -> None:
    """Raises ValueError for nesting, integers and texts that no table could hold."""
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            check_values(key, depth)
            check_values(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_values(item, depth + 1)
    elif isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int) and not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise ValueError("an integer does not fit 64 bits: write it as text")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("a text holds the character NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text holds half a character (the lone surrogate \\u{ord(text[error.start]):04x})"
        ) from None
