"""A tile of training rows at a time, formed when it is needed; the evaluation side streams past it, and again for the next."""

from __future__ import annotations

from collections.abc import Callable

from entropy_core.kernel import Columns
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.strategy import Block, Piece, Preconditioner, TrainingRows


class Tiled(TrainingRows):
    """Keeps nothing."""

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        def pieces(wanted: Wanted) -> list[Piece]:
            n, size = len(self.setup.batch), self.setup.plan.tile
            tiles = [range(start, min(start + size, n)) for start in range(0, n, size)]
            found = [Piece(len(tile), lambda tile=tile: self._open(tile, p, wanted), whole=True) for tile in tiles]
            return found if wanted.steps is None else [*found, self._steps(wanted)]

        return pieces

    def _open(self, tile: range, p: Preconditioner, wanted: Wanted) -> Block:
        passes = self.setup.passes
        columns = [Columns(passes.score_rows(self.setup.batch, tile), p, wanted.numbers(wanted.kernel))]
        return lambda batch, objectives: passes.products(batch, objectives, columns)
