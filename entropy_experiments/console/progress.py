"""Progress of an analysis on the terminal: its stages weighted by how long they take, with rate and time left.

A bar where there is a terminal; a line per stage where there is none (a log, a pipe); nothing when quiet. The time
left is the seconds so far scaled by the shares still to come: stages differ too much for the speed of the last one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from entropy_experiments.run.reporter import Reporter

_ENOUGH = 0.02  # of the whole, below which nothing is predicted: the seconds of loading say little about the rest
_NARROW = 90  # columns below which the bar leaves rate and elapsed time out


def progress_console(quiet: bool) -> Console:
    """Where progress and tables go: stderr, so that stdout stays for results."""
    return Console(stderr=True, highlight=False, quiet=quiet)


def duration(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:07:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StageProgress(Reporter):
    """A context in which `stage(name)` is called as each stage begins.

    shares: expected time of each stage relative to the others, in their order; stages that are left out were done before, and
    a name that is not among them is shown without moving the bar. runs: how many times the stages are gone through
    (checkpoints of a sweep); `checkpoint(name, …)` starts the next. label: what plain lines begin with.
    """

    def __init__(
        self, console: Console, shares: Mapping[str, float], *, runs: int = 1, label: str = "analysis"
    ) -> None:
        self._console, self._shares, self._names = console, shares, list(shares)
        self._total_of_run = sum(shares.values())
        self._total = runs * self._total_of_run
        self._runs, self._run, self._label = runs, 0, label
        self._completed, self._current, self._begun = 0.0, 0.0, False
        self._start = self._stage_start = time.monotonic()
        self._bar = Progress(
            *self._columns(),
            console=console,
            disable=console.quiet or not console.is_interactive,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=self._total)

    def _columns(self) -> list[ProgressColumn]:
        width = self._console.width
        columns: list[ProgressColumn] = [SpinnerColumn()] if width >= _NARROW else []
        named = Column(ratio=3, no_wrap=True, overflow="ellipsis", min_width=12)
        columns.append(TextColumn("{task.description}", markup=False, table_column=named))
        columns.append(BarColumn(bar_width=None if width >= _NARROW else 12))
        columns.append(TextColumn("{task.percentage:>3.0f}%"))
        return [*columns, _Timing(self, brief=width < _NARROW)]

    def __enter__(self) -> StageProgress:
        self._start = self._stage_start = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def checkpoint(self, name: str, place: int, count: int) -> None:
        """The next of several runs begins; `name` stands on the bar and in plain lines."""
        self._run += self._begun
        self._completed, self._current = self._run * self._total_of_run, 0.0
        self._label, self._begun = name, False

    def note(self, line: str) -> None:
        """A line that moves no bar."""
        self.stage(line)

    def stage(self, name: str) -> None:
        """A stage begins; those before it are done."""
        place = self._names.index(name) if name in self._shares else None
        if place is not None:
            done = sum(self._shares[earlier] for earlier in self._names[:place])
            self._completed, self._current = self._run * self._total_of_run + done, self._shares[name]
            self._stage_start, self._begun = time.monotonic(), True
        shown = name if self._runs == 1 else f"{self._label}: {name}"
        self._bar.update(self._task, description=shown, completed=self._completed)
        if not self._console.is_interactive:
            line = name if name.startswith(f"{self._label}: ") else f"{self._label}: {name}"
            self._console.print(line + self._count(place), markup=False, soft_wrap=True)

    def _count(self, place: int | None) -> str:
        if place is None:
            return ""
        parts, left = [f"stage {place + 1} of {len(self._names)}"], self.seconds_left()
        if left is not None:
            parts.append(f"{duration(self.elapsed)} so far, about {duration(left)} left")
        return f" ({'; '.join(parts)})"

    def rate(self) -> float | None:
        """Share of the whole that is done in a minute, in percent; None before the first stage is done."""
        until = self._stage_start - self._start
        return 6000.0 * self._completed / self._total / until if self._completed > 0 and until > 0 else None

    def seconds_left(self) -> float | None:
        """Seconds until the end, if the stages to come take their expected share; None before 2% of the whole is done."""
        until = self._stage_start - self._start
        if self._completed < _ENOUGH * self._total or until <= 0:
            return None
        seconds_a_share = until / self._completed
        of_this_stage = seconds_a_share * self._current - (time.monotonic() - self._stage_start)
        return seconds_a_share * (self._total - self._completed - self._current) + max(0.0, of_this_stage)

    @property
    def elapsed(self) -> float:
        """Seconds since the context was entered."""
        return time.monotonic() - self._start


class _Timing(ProgressColumn):
    """Rate, elapsed time and time left of the whole; on a narrow terminal the time left alone."""

    def __init__(self, owner: StageProgress, brief: bool) -> None:
        super().__init__(Column(no_wrap=True))
        self._owner, self._brief = owner, brief

    def render(self, task: object) -> Text:
        rate, left = self._owner.rate(), self._owner.seconds_left()
        remaining = "left –" if left is None else f"left {duration(left)}"
        if self._brief:
            return Text(remaining)
        speed = "– %/min" if rate is None else f"{rate:.3g} %/min"
        return Text(f"{speed}  {duration(self._owner.elapsed)}  {remaining}")
