"""All training rows in memory, in every process; the evaluation side streams past them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from entropy_core.entropy import score_coefficients
from entropy_core.kernel import Columns
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.plan import BLOCK_ROWS
from entropy_experiments.kernel.row_passes import Rows
from entropy_experiments.kernel.store.row_storage import StoredRows
from entropy_experiments.kernel.strategy import KernelSetup, Piece, Preconditioner, TrainingRows


class InMemory(TrainingRows):
    """The only strategy that answers for other metrics than P. With a store in the plan, rows are stored as well."""

    columns: Rows

    def __init__(self, setup: KernelSetup) -> None:
        super().__init__(setup)
        self.columns = _gathered(setup)
        if setup.plan.disk:
            assert setup.store_folder is not None
            scores = StoredRows(setup.store_folder, "score", score_coefficients(setup.batch))
            self.store = setup.store(setup.batch, [scores], formed=self.columns)[0]

    def held(self, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """At hand: beside the rows they are small."""
        return dict(vectors)

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        def pieces(wanted: Wanted) -> list[Piece]:
            columns = [Columns(self.columns, p, wanted.numbers(wanted.kernel)), *wanted.step_columns]
            for other in wanted.others:
                columns.append(Columns(self.columns, other.metric, wanted.numbers(other.kinds)))
            width, passes = sum(one.count for one in columns), self.setup.passes
            return [Piece(width, lambda: lambda batch, objectives: passes.products(batch, objectives, columns))]

        return pieces


def _gathered(setup: KernelSetup) -> Rows:
    """All rows in every process, each block of sequences formed by one of them."""
    n, processes = len(setup.batch), setup.processes
    out = setup.passes.zeros(n)
    spans = [range(start, min(start + BLOCK_ROWS, n)) for start in range(0, n, BLOCK_ROWS)]
    for number in processes.mine(range(len(spans))):
        span = spans[number]
        there = {name: rows[span.start : span.stop] for name, rows in out.items()}
        setup.passes.score_rows(setup.batch, span, there)
    processes.meet()
    for number, span in enumerate(spans):
        for rows in out.values():
            processes.send_around(rows[span.start : span.stop], number % processes.size)
    return out
