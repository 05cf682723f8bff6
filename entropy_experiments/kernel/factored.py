"""Training rows kept as factors, in memory or on disk; a chunk of the evaluation side's factors at a time is multiplied with
them.

Both sides' rows of a block of one parameter are formed, multiplied and dropped (entropy_core.factored_rows). All factors of the
training side are read once for every chunk, and its rows formed anew, which costs about a backward pass's weight gradients. So
chunks are as large as may be: where there is disk, their factors go there too, a few sequences' at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, pass_order
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.factored_rows import FactoredSide, StreamedSide, factored_products
from entropy_core.formed import Formed
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.plan import sample_rows
from entropy_experiments.kernel.store.factor_store import FactorStore
from entropy_experiments.kernel.strategy import KernelSetup, Piece, Preconditioner, TrainingRows


class Factored(TrainingRows):
    """Factors on disk lie in the work folder: they go when the analysis is whole, and an interrupted one finds its shards again.

    In memory every process forms all of them.
    """

    def __init__(self, setup: KernelSetup) -> None:
        super().__init__(setup)
        parameters = dict(setup.passes.model.named_parameters())
        self._shapes = {name: parameters[name].shape for name in setup.passes.names}
        self._devices = {name: parameters[name].device for name in setup.passes.names}
        self._side: FactoredSide = self._stored() if setup.plan.disk else self._factors(setup.batch)

    def sample(self) -> tuple[range, Mapping[str, Tensor]]:
        """Rows of the first training sequences, each parameter's formed of its factors when it is read."""
        some = range(min(len(self.setup.batch), sample_rows(max(shape.numel() for shape in self._shapes.values()))))
        return some, Formed(self._shapes, lambda name: torch.stack([self._row(name, sequence) for sequence in some]))

    def _row(self, name: str, sequence: int) -> Tensor:
        found = self._side.row(name, sequence)
        device = self._devices[name]
        return (
            torch.zeros(self._shapes[name], device=device)
            if found is None
            else found.view(self._shapes[name]).to(device)
        )

    def _factors(self, batch: SequenceBatch) -> FactoredSide:
        return self.setup.passes.factors(batch, [score_coefficients(batch)])

    def _stored(self) -> FactorStore:
        setup = self.setup
        assert setup.workspace is not None
        shards = list(pass_order(setup.batch).cpu().split(setup.plan.tile))
        store = FactorStore(setup.workspace.folder / "factors", self._shapes, shards, self._devices)
        for number in setup.processes.mine(store.unfinished()):
            part = setup.batch.select(shards[number])
            store.write(number, setup.passes.factors(part, [score_coefficients(part)]))
            setup.reporter.block("factors", number + 1, len(shards))
        setup.processes.meet()
        store.open()
        return store

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        def pieces(wanted: Wanted) -> list[Piece]:
            width = len(self.setup.batch) + sum(one.count for one in wanted.step_columns)
            return [Piece(width, lambda: lambda batch, objectives: self._block(batch, objectives, p, wanted))]

        return pieces

    def _block(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], p: Preconditioner, wanted: Wanted
    ) -> Tensor:
        numbers, at_once = wanted.numbers(wanted.kernel), self.setup.plan.at_once
        with self._streamed(batch, objectives, at_once or len(batch)) as rows:
            found = factored_products(rows, len(objectives), self._side, numbers, self._shapes, p, wanted.steps)
        return found.to(batch.device)

    @contextmanager
    def _streamed(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], at_once: int
    ) -> Iterator[StreamedSide]:
        """Factors of a chunk: in memory where it is formed at once, else in a folder of its own that is gone afterwards."""
        passes, workspace = self.setup.passes, self.setup.workspace
        if at_once >= len(batch) or workspace is None:
            yield passes.factors(batch, objectives)
            return
        folder = workspace.folder / f"streamed-{self.setup.processes.rank}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        shards = list(pass_order(batch).cpu().split(at_once))
        store = FactorStore(folder, self._shapes, shards, self._devices)
        try:
            for number, some in enumerate(shards):
                part = batch.select(some)
                chosen = [TokenCoefficients(c.entropy[some], c.logprob[some]) for c in objectives]
                store.write(number, passes.factors(part, chosen))
            store.open()
            yield store
        finally:
            shutil.rmtree(folder, ignore_errors=True)
