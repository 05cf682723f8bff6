"""Training rows in a gradient store; a chunk of evaluation rows is kept, and the store is read past it shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.kernel import Columns, products
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.row_passes import Rows
from entropy_experiments.kernel.store.row_storage import StoredRows
from entropy_experiments.kernel.store.store import GradientStore
from entropy_experiments.kernel.strategy import KernelSetup, Piece, Preconditioner, TrainingRows


class OnDisk(TrainingRows):
    """Rows have the store's precision."""

    store: GradientStore

    def __init__(self, setup: KernelSetup) -> None:
        super().__init__(setup)
        assert setup.store_folder is not None
        scores = StoredRows(setup.store_folder, "score", score_coefficients(setup.batch))
        self.store = setup.store(setup.batch, [scores])[0]

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        def pieces(wanted: Wanted) -> list[Piece]:
            width = len(self.setup.batch) + sum(one.count for one in wanted.step_columns)
            return [Piece(width, lambda: lambda batch, objectives: self._block(batch, objectives, p, wanted, width))]

        return pieces

    def _block(
        self,
        batch: SequenceBatch,
        objectives: Sequence[TokenCoefficients],
        p: Preconditioner,
        wanted: Wanted,
        width: int,
    ) -> Tensor:
        rows = self.setup.passes.kept(batch, objectives)
        out = torch.zeros((len(objectives), len(batch), width), device=batch.device)
        layout, numbers = self.store.layout, wanted.numbers(wanted.kernel)
        for shard in range(layout.shard_count):
            span = layout.shard_range(shard)
            _add(out[:, :, span.start : span.stop], rows, Columns(self.store.shard(shard), p, numbers))
        for steps in wanted.step_columns:
            _add(out[:, :, len(self.setup.batch) :], rows, steps)
        return out


def _add(out: Tensor, rows: Sequence[Rows], columns: Columns) -> None:
    for name in rows[0]:
        vectors = columns.vectors[name].to(rows[0][name])
        metric = None if columns.metric is None else columns.metric[name]
        for number in range(len(rows)) if columns.objectives is None else columns.objectives:
            out[number] += products(rows[number][name], vectors, metric).to(out.device)
