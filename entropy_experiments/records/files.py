"""Reading a JSON file of records: whole and of this format, or refused in one line with a remedy. Nothing here loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from entropy_experiments.records.record import REMEDY, validated
from rl_training.errors import UserError, first_line

T = TypeVar("T")


def read_record(path: Path, kind: type[T], *, version: int | None = None, remedy: str = REMEDY) -> T:
    """The content of a JSON file as a record.

    Args:
        path: The file.
        kind: The record, or a list or mapping of records.
        version: The file's "format_version", where it has one.
        remedy: What to do about a file that cannot be used.

    Raises:
        UserError: The file cannot be read, is not JSON, is of another version, or a field of it is not of the format.
    """
    content = _read_json(path, remedy)
    if version is not None and isinstance(content, dict):
        _refuse_other_versions(path, content.get("format_version", 1), version, remedy)
    return validated(kind, content, path, remedy)


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{path} is not valid JSON ({where}): {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {remedy}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{path} is not valid JSON ({first_line(error)[:200]}): {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a results file: {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _refuse_other_versions(path: Path, found: object, version: int, remedy: str) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{path}: format_version is {str(found)[:40]!r}, not a whole number from 1: {remedy}")
    if found > version:
        raise UserError(
            f"{path} has results format {found}, and this version of entropy-experiments reads {version}: upgrade "
            f"entropy-experiments, or {remedy}"
        )
    if found < version:
        raise UserError(f"{path} is of an older version of entropy-experiments (results format {found}): {remedy}")
