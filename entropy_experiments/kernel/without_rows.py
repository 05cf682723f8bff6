"""No rows at all: where no matrix is wanted, every answer is a derivative along a few directions (entropy_core.directional)."""

from __future__ import annotations

from collections.abc import Callable

from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.row_passes import Rows
from entropy_experiments.kernel.strategy import Piece, Preconditioner, TrainingRows


class WithoutRows(TrainingRows):
    """Keeps nothing, forms nothing, and answers nothing that needs rows."""

    forms_rows = False

    def sample(self) -> tuple[range, Rows]:
        raise ValueError("this plan forms no rows")

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        def pieces(wanted: Wanted) -> list[Piece]:
            raise ValueError("this plan forms no rows")

        return pieces
