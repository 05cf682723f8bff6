"""What went wrong with a disk, in one line, whatever library raised it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_training.errors import ResumableError, UserError

# What torch says, without an errno, where a file could not be written to its end.
_TORCH_WRITING = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")


def disk_is_full(error: BaseException | None) -> bool:
    """True for an error of a full disk or of a file beyond a limit, or one caused by it; some writers only say it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded", *_TORCH_WRITING)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_errors_explained(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError inside into an error of one line.

    Args:
        path: what was being written or read.
        action: what was being done, e.g. "writing shard 3".

    Raises:
        ResumableError: (a UserError) where the disk is full.
        UserError: for every other OSError.
    """
    try:
        yield
    except OSError as error:
        where = f"{path}: {action}"
        if error.errno == errno.EFBIG:
            raise ResumableError(f"{where}: the file is larger than this file system or `ulimit -f` allows") from error
        if disk_is_full(error):
            raise ResumableError(
                f"{where}: no space left on this disk; free some and resume, or choose another"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{where}: not permitted ({error.strerror}); check the owner and mode of the folder"
            ) from error
        raise UserError(f"{where}: {error.strerror or error}") from error
