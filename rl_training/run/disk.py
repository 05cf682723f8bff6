"""Whether an error means that the disk is full, whatever library raised it."""

import errno


def disk_is_full(error: BaseException | None) -> bool:
    """True for an out-of-space error, or one that was caused by it; writers in other languages only say it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
