"""What a long computation tells whoever waits for it: one interface from the kernel's blocks up to a sweep's checkpoints."""

from __future__ import annotations


class Reporter:
    """Receives progress; every method does nothing, and whoever listens overrides those of interest."""

    def stage(self, name: str) -> None:
        """A stage begins; the one before it is done."""

    def note(self, line: str) -> None:
        """One line to show beside the current stage, such as the strategy that was chosen."""

    def block(self, matrix: str, done: int, total: int) -> None:
        """`done` of `total` blocks of a kernel or a gradient store are finished."""

    def checkpoint(self, name: str, place: int, count: int) -> None:
        """The analysis of a sweep's checkpoint begins, number `place` (from 1) of `count` in this process."""


SILENT = Reporter()
