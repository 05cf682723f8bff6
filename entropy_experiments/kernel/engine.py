"""Kernels block by block, inside a memory plan, over any number of processes, resumable.

    block (chunk I, piece J) = rows of I (every objective) times diag(P) times columns of J

Chunks cut one side in the order of passes, pieces the training side as its strategy says. A block depends on its own sequences
alone: whichever process computes it, after whatever interruption, its bits are the same.

    engine = KernelEngine(setup);  engine.settle(evaluation)      before any row
    rows = engine.prepare()                                       raw training rows, kept as the plan's strategy does
    kernel = Kernel(rows, P)                                      products with any other rows, as often as one likes

Every process makes the same calls. Source: docs/theory/fisher-kernel.md, docs/guides/large-kernels.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, pass_order
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.formed import Formed
from entropy_core.kernel import Columns
from entropy_core.scores import TokenStatistics
from entropy_experiments.kernel.contraction import OtherMetric, Products, RowKind, Wanted
from entropy_experiments.kernel.factored import Factored
from entropy_experiments.kernel.in_memory import InMemory
from entropy_experiments.kernel.on_disk import OnDisk
from entropy_experiments.kernel.plan import Strategy
from entropy_experiments.kernel.shared_statistics import shared_statistics
from entropy_experiments.kernel.sketched import Sketched
from entropy_experiments.kernel.strategy import KernelSetup, Piece, Preconditioner, TrainingRows
from entropy_experiments.kernel.tiled import Tiled
from entropy_experiments.kernel.without_rows import WithoutRows

STRATEGIES: dict[Strategy, type[TrainingRows]] = {
    "memory": InMemory,
    "disk": OnDisk,
    "factored": Factored,
    "tiles": Tiled,
    "sketch": Sketched,
    "directions": WithoutRows,
}
"""entropy_experiments.kernel.plan chooses."""


class KernelEngine:
    """A planned kernel, of which no row is formed yet."""

    def __init__(self, setup: KernelSetup) -> None:
        self.setup = setup

    def settle(self, other: SequenceBatch) -> None:
        """RowPasses.settle of both sides; other: the evaluation side. Rows that have no factors get another plan."""
        setup = self.setup
        if not STRATEGIES[setup.plan.strategy].forms_rows:
            return
        factored = setup.plan.strategy == "factored"
        setup.passes.settle(setup.batch, other, factored=factored)
        if not factored or setup.without_factors is None:
            return
        # One process may have run out of memory where the others have not: they plan anew together.
        if setup.processes.any(setup.passes.formation.looping, torch.device("cpu")):
            self.setup = replace(setup, plan=setup.without_factors())

    def statistics(self, batch: SequenceBatch, with_variances: bool = False) -> TokenStatistics:
        """`shared_statistics` of this model and these processes."""
        passes = self.setup.passes
        return shared_statistics(passes.model, batch, passes.settings, with_variances, self.setup.processes)

    def prepare(self) -> TrainingRows:
        """Form and keep, or store, the training rows; tiles form theirs when they are needed."""
        return STRATEGIES[self.setup.plan.strategy](self.setup)


class Kernel:
    """Training rows under a preconditioner, to be multiplied with other rows."""

    def __init__(self, rows: TrainingRows, preconditioner: Preconditioner) -> None:
        self.rows, self.preconditioner = rows, preconditioner
        self._cut = rows.cut(preconditioner)

    @property
    def setup(self) -> KernelSetup:
        """What was settled before any row was formed."""
        return self.rows.setup

    def contract(
        self,
        matrix: str,
        batch: SequenceBatch,
        rows: Mapping[RowKind, TokenCoefficients],
        kernel: Sequence[RowKind] = (),
        steps: Mapping[str, Tensor] | None = None,
        others: Sequence[OtherMetric] = (),
    ) -> Products | None:
        """Rows of `batch`, of every kind in `rows`, multiplied with the training rows and with `steps`.

        Args:
            matrix: the name its blocks are kept under.
            kernel: kinds whose products with the training rows are wanted.
            steps: name -> (n_steps, *shape) over all trainable parameters, or those of the kernel; P has no part in it.
            others: answered where training rows are kept in memory and `kernel` is not empty.

        Returns:
            The products in the root process, None in the others.
        """
        setup = self.setup
        if steps is not None:
            steps = self.rows.held(Formed(setup.passes.names, lambda name, steps=steps: steps[name]))
        if not kernel or self.rows.columns is None:
            others = ()
        held = tuple(OtherMetric(self.rows.held(other.metric), other.kinds) for other in others)
        wanted = Wanted(tuple(rows), tuple(kernel), steps, held)
        found = self._blocks(matrix, batch, list(rows.values()), self._cut(wanted))
        if found is None:
            return None
        n = len(setup.batch) if kernel else 0
        end = n + sum(one.count for one in wanted.step_columns)
        return Products(
            {kind: found[number][:, :n] for kind, number in zip(kernel, wanted.numbers(wanted.kernel), strict=True)},
            {kind: one[:, n:end] for kind, one in zip(rows, found, strict=True)},
            tuple(
                {
                    kind: found[number][:, end + place * n : end + (place + 1) * n]
                    for kind, number in zip(other.kinds, wanted.numbers(other.kinds), strict=True)
                }
                for place, other in enumerate(held)
            ),
        )

    def exact_tile(self, batch: SequenceBatch, count: int = 16) -> Tensor:
        """K1 of the first `count` sequences on both sides, without sketch or store."""
        setup, passes = self.setup, self.setup.passes
        part = batch.select(list(range(min(count, len(batch)))))
        columns = passes.score_rows(setup.batch, range(min(count, len(setup.batch))))
        return passes.products(part, [score_coefficients(part)], [Columns(columns, self.preconditioner)])[0]

    def _blocks(
        self, matrix: str, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], pieces: Sequence[Piece]
    ) -> list[Tensor] | None:
        """(N, columns) for each objective in the root process, every block computed by one process or read back."""
        setup, workspace, processes = self.setup, self.setup.workspace, self.setup.processes
        chunks = list(pass_order(batch).split(setup.plan.chunk))
        out = torch.zeros((len(objectives), len(batch), sum(piece.columns for piece in pieces)), device=batch.device)
        places, start = [], 0
        for number, piece in enumerate(pieces):
            place = slice(start, start := start + piece.columns)
            places.append(place)
            block = None
            for k, rows in enumerate(chunks):
                if (number if piece.whole else k) % processes.size != processes.rank:
                    continue
                name = _block_name(number, k)
                if workspace is not None and workspace.has(matrix, name):
                    out[:, rows, place] = workspace.read(matrix, name).to(out)
                    continue
                block = block or piece.open()
                chosen = [TokenCoefficients(c.entropy[rows], c.logprob[rows]) for c in objectives]
                found = block(batch.select(rows), chosen)
                if workspace is not None:
                    workspace.write(matrix, name, found)
                out[:, rows, place] = found.to(out)
                setup.reporter.block(matrix, number * len(chunks) + k + 1, len(pieces) * len(chunks))
        if processes.size == 1:
            return list(out)
        processes.meet()
        if not processes.is_root:
            return None
        assert workspace is not None
        for number, place in enumerate(places):
            for k, rows in enumerate(chunks):
                out[:, rows, place] = workspace.read(matrix, _block_name(number, k)).to(out)
        return list(out)


def _block_name(piece: int, chunk: int) -> str:
    return f"tile-{piece:05d}-rows-{chunk:05d}"
