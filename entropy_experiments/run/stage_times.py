"""How long each stage of an analysis took; what one leaves in the C library's heap is given back before the next."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from entropy_experiments.run.free_memory import give_back_memory
from entropy_experiments.run.reporter import Reporter


@dataclass
class StageTimes(Reporter):
    """Seconds per stage, in order; a stage lasts until the next begins, and so does a note. Both are passed on."""

    listener: Reporter
    stages: list[dict[str, Any]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def stage(self, name: str) -> None:
        self._begin(name)
        self.listener.stage(name)

    def note(self, line: str) -> None:
        self._begin(line)
        self.listener.note(line)

    def block(self, matrix: str, done: int, total: int) -> None:
        self.listener.block(matrix, done, total)

    def _begin(self, name: str) -> None:
        self._end()
        give_back_memory()
        self.stages.append({"name": name, "seconds": 0.0})

    def _end(self) -> None:
        now = time.perf_counter()
        if self.stages:
            self.stages[-1]["seconds"] = round(now - self._since, 3)
        self._since = now

    def finished(self) -> list[dict[str, Any]]:
        self._end()
        return self.stages
