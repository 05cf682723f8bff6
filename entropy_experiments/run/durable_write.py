"""Files that are whole or not there, whatever kills the process; and disk trouble told in one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_training.errors import ResumableError, UserError
from rl_training.files import flush, write_whole
from rl_training.run.disk import disk_is_full


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, give it its name, and flush the name.

    A file of this name is replaced.
    """
    write_whole(path, content)


def rename_durably(part: Path, path: Path) -> None:
    """Rename within a folder, and flush the folder: after a power cut the file has the new name or the old one."""
    os.replace(part, path)
    flush(path.parent)


def write_json_durably(path: Path, content: dict[str, Any]) -> None:
    """`write_durably` of an object; floats keep every bit. Raises ValueError for NaN and infinity."""
    write_durably(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, ending in `remedy`, where it is missing, unreadable or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object: {remedy}")
    return content


@contextmanager
def disk_errors_explained(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError inside into a UserError of one line. action: what was being done, e.g. "writing shard 3"."""
    try:
        yield
    except OSError as error:
        where = f"{path}: {action}"
        if disk_is_full(error):
            raise ResumableError(
                f"{where}: no space left on this disk; free some and resume, or choose another"
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(f"{where}: the file is larger than this file system or `ulimit -f` allows") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{where}: not permitted ({error.strerror}); check the owner and mode of the folder"
            ) from error
        raise UserError(f"{where}: {error.strerror or error}") from error
