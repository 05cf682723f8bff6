"""A limit on how long a case may take, by an alarm: in the main thread, and nowhere but on POSIX."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class OverTime(BaseException):
    """No Exception: what is tried may catch these."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise OverTime in the block after so many seconds."""

    def over(*_: Any) -> None:
        raise OverTime

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
