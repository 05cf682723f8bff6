"""Kernels block by block, inside a memory plan, over any number of processes, resumable.

    block (chunk I, tile J) = rows of I (every objective) times diag(P) times columns of J

Chunks cut one side in the order of passes, tiles the training side in its own. A block depends on its own sequences alone:
whichever process computes it, after whatever interruption, its bits are the same.

Source: docs/theory/fisher-kernel.md, docs/guides/large-kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, pass_order
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.gradients import emptied, keeping, stream_rows
from entropy_core.kernel import OtherMetric, inner_products
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics
from entropy_core.sketch import ModuleSketch
from entropy_experiments.kernel.contraction import Products, RowKind
from entropy_experiments.kernel.modules import only_trainable
from entropy_experiments.kernel.plan import BLOCK_ROWS, KernelPlan
from entropy_experiments.kernel.shared_statistics import shared_statistics
from entropy_experiments.kernel.sketch import sketch_rows
from entropy_experiments.kernel.store.row_storage import StoredRows, store_rows
from entropy_experiments.kernel.store.store import GradientStore
from entropy_experiments.kernel.workspace import KernelWorkspace
from entropy_experiments.run.processes import Processes
from entropy_experiments.run.reporter import SILENT, Reporter


class KernelEngine:
    """The training side as columns of kernels. Model and batch stay as they are.

    names: parameters that rows are formed of. passes: how they are formed and passes are cut.
    workspace: where finished blocks go; None keeps them in memory (one process only). store_folder: where the gradient store
    lies, for plans that have one.

    Call `settle` first, then `prepare`, `precondition`, and `contract` for each side; every process makes the same calls.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: SequenceBatch,
        plan: KernelPlan,
        names: Sequence[str],
        *,
        passes: PassSettings,
        workspace: KernelWorkspace | None = None,
        processes: Processes | None = None,
        store_folder: Path | None = None,
        storage: str = "float32",
        sketch: ModuleSketch | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self._model, self._batch, self.plan, self.names = model, batch, plan, list(names)
        self._passes, self._workspace = passes.remembering(), workspace
        self._processes, self._storage, self._reporter = processes or Processes(), storage, reporter
        self._store_folder, self._sketch = store_folder, sketch
        self._sketched: Tensor | None = None
        self._columns: dict[str, Tensor] | None = None
        self._preconditioner: Mapping[str, Tensor] | None = None
        self.formation = self._passes.formation()
        self.store: GradientStore | None = None
        if self._processes.size > 1 and workspace is None:
            raise ValueError("several processes need a workspace to meet in")

    @property
    def processes(self) -> Processes:
        return self._processes

    @property
    def columns(self) -> dict[str, Tensor] | None:
        """name -> (n_train, *shape), times P once it was given; None where they are not kept."""
        return self._columns

    @property
    def restricted(self) -> bool:
        """Whether rows leave out some of the trainable parameters."""
        return any(p.requires_grad and name not in set(self.names) for name, p in self._model.named_parameters())

    def restrict(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`vector` with zeros for parameters that rows leave out."""
        own = set(self.names)
        return {name: part if name in own else torch.zeros_like(part) for name, part in vector.items()}

    def settle(self, other: SequenceBatch) -> None:
        """Find out on the shortest and the longest sequences of both sides whether hooks will do, before any row is kept:
        every process comes to the same answer, and finished blocks are of one method. other: the evaluation side.
        """
        for batch in (self._batch, other):
            lengths = batch.scored_lengths
            few = batch.select(sorted({int(lengths.argmin()), int(lengths.argmax())}))
            with only_trainable(self._model, self.names):
                stream_rows(
                    self._model, few, [score_coefficients(few)], lambda *_: None, self._passes, restart=lambda: None
                )

    def prepare(self) -> None:
        """Form and keep, or store, the training rows; tiles form theirs when they are needed."""
        if self.plan.strategy == "memory":
            self._columns = self._gather_columns()
        if self.plan.disk:
            assert self._store_folder is not None
            scores = StoredRows(self._store_folder, "score", score_coefficients(self._batch))
            self.store = self.store_rows(self._batch, [scores])[0]

    def sample_rows(self) -> tuple[range, dict[str, Tensor]]:
        """Raw rows of some training sequences, for checks: all of them where they are kept. Before `precondition`."""
        if self._columns is not None:
            return range(len(self._batch)), self._columns
        some = range(min(len(self._batch), self.plan.tile, 32))
        return some, self._rows(some)

    def precondition(self, preconditioner: Mapping[str, Tensor] | None) -> None:
        """Take P into the columns (one side of the kernel only)."""
        self._preconditioner = preconditioner
        if self._columns is not None and preconditioner is not None:
            for name, rows in self._columns.items():
                rows.mul_(preconditioner[name])
        if self._sketch is not None:
            self._sketched = self._sketch_columns(self._sketch)

    def statistics(self, batch: SequenceBatch, with_variances: bool = False) -> TokenStatistics:
        """`shared_statistics` of this model and these processes."""
        return shared_statistics(self._model, batch, self._passes, with_variances, self._processes)

    def contract(
        self,
        matrix: str,
        batch: SequenceBatch,
        rows: Mapping[RowKind, TokenCoefficients],
        kernel: Sequence[RowKind] = (),
        steps: Mapping[str, Tensor] | None = None,
        other_metric: OtherMetric | None = None,
    ) -> Products | None:
        """Rows of `batch`, of every kind in `rows`, multiplied with the columns, and with `steps`.

        matrix: the name its blocks are kept under. kernel: kinds whose products with the columns are wanted. steps: name ->
        (n_steps, *shape), not multiplied by P. other_metric: the columns once more, only where they are kept in memory. The root
        process gets the result, the others None.
        """
        found = self._contract(matrix, batch, list(rows.values()), steps, bool(kernel), other_metric)
        if found is None:
            return None
        kinds, n = list(rows), len(self._batch) if kernel else 0
        width = n + (0 if steps is None else len(next(iter(steps.values()))))
        other = () if other_metric is None or found[0].shape[1] == width else other_metric.objectives
        return Products(
            {kind: found[kinds.index(kind)][:, :n] for kind in kernel},
            {kind: one[:, n:width] for kind, one in zip(kinds, found, strict=True)},
            {kinds[number]: found[number][:, width:] for number in other},
        )

    def _contract(
        self,
        matrix: str,
        batch: SequenceBatch,
        objectives: Sequence[TokenCoefficients],
        steps: Mapping[str, Tensor] | None,
        with_columns: bool,
        other_metric: OtherMetric | None,
    ) -> list[Tensor] | None:
        pieces = self._pieces(steps, with_columns, other_metric)
        width = max((piece.place.stop for piece in pieces), default=0)
        out = [torch.zeros((len(batch), width), device=batch.device) for _ in objectives]
        chunks = self._chunks(batch)
        for piece in pieces:
            self._contract_piece(matrix, batch, objectives, chunks, piece, len(pieces), out)
        if self._processes.size == 1:
            return out
        self._processes.meet()
        if not self._processes.is_root:
            return None
        assert self._workspace is not None
        for piece in pieces:
            for number, rows in enumerate(chunks):
                _place(out, rows, piece.place, self._workspace.read(matrix, piece.name(number)))
        return out

    def _contract_piece(
        self,
        matrix: str,
        batch: SequenceBatch,
        objectives: Sequence[TokenCoefficients],
        chunks: Sequence[Tensor],
        piece: _Piece,
        pieces: int,
        out: list[Tensor],
    ) -> None:
        sets: list[Mapping[str, Tensor]] | None = None
        for number, rows in enumerate(chunks):
            done = piece.number * len(chunks) + number + 1
            owner = piece.number if piece.whole else number
            if owner % self._processes.size != self._processes.rank:
                continue
            name = piece.name(number)
            if self._workspace is not None and self._workspace.has(matrix, name):
                _place(out, rows, piece.place, self._workspace.read(matrix, name))
                continue
            if sets is None:
                sets = piece.load()
            chosen = [TokenCoefficients(c.entropy[rows], c.logprob[rows]) for c in objectives]
            compute = self._block_past_the_store if piece.stored else self._block
            if self._sketched is not None and piece.sketched:
                compute = self._sketched_block
            more = {} if piece.other_metric is None else {"other_metric": piece.other_metric}
            block = compute(batch.select(rows), chosen, sets, **more)
            if self._workspace is not None:
                self._workspace.write(matrix, name, block)
            _place(out, rows, piece.place, block)
            self._reporter.block(matrix, done, pieces * len(chunks))

    def _pieces(
        self, steps: Mapping[str, Tensor] | None, with_columns: bool, other_metric: OtherMetric | None = None
    ) -> list[_Piece]:
        n = len(self._batch) if with_columns else 0
        sets = [] if steps is None else [{name: steps[name] for name in self.names}]
        n_steps = len(next(iter(sets[0].values()))) if sets else 0
        if with_columns and self.plan.strategy == "tiles":
            tiles = [range(start, min(start + self.plan.tile, n)) for start in range(0, n, self.plan.tile)]
            found = [
                _Piece(k, slice(t.start, t.stop), lambda t=t: [self._times_p(self._rows(t))], whole=True)
                for k, t in enumerate(tiles)
            ]
            return [*found, _Piece(len(found), slice(n, n + n_steps), lambda: sets)] if sets else found
        if with_columns and self._sketched is not None:
            return [_Piece(0, slice(0, n + n_steps), lambda: sets, sketched=True)]
        if with_columns and self.plan.strategy == "disk":
            return [_Piece(0, slice(0, n + n_steps), lambda: sets, stored=True)]
        kept = [self._columns] if with_columns and self._columns is not None else []
        other_metric, width = (other_metric, 2 * n + n_steps) if other_metric and kept else (None, n + n_steps)
        return [_Piece(0, slice(0, width), lambda: [*kept, *sets], other_metric=other_metric)] if width else []

    def _block(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], sets: Sequence[Mapping[str, Tensor]],
        other_metric: OtherMetric | None = None,
    ) -> Tensor:  # fmt: skip
        """(objectives, rows, columns) of one chunk against column sets, the rows streamed."""
        with only_trainable(self._model, self.names):
            found = inner_products(self._model, batch, objectives, sets, self._passes, other_metric=other_metric)
        return torch.stack(found)

    def _block_past_the_store(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], sets: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """The same with the chunk's rows kept, and the store read past them shard by shard."""
        assert self.store is not None
        n = len(batch)
        parameters = {name: q for name, q in self._model.named_parameters() if name in self.names}
        rows = [
            {name: torch.zeros((n, *q.shape), device=q.device) for name, q in parameters.items()} for _ in objectives
        ]
        with only_trainable(self._model, self.names):
            stream_rows(self._model, batch, objectives, keeping(rows), self._passes, restart=lambda: emptied(rows))
        layout = self.store.layout
        spans = [layout.shard_range(k) for k in range(layout.shard_count)]
        width = len(self._batch) + sum(len(next(iter(s.values()))) for s in sets)
        out = torch.zeros((len(objectives), n, width), device=batch.device)
        places = [slice(span.start, span.stop) for span in spans]
        for number, place in enumerate(places):
            self._add_products(out[:, :, place], rows, self._times_p(self.store.shard(number)))
        if sets:
            self._add_products(out[:, :, len(self._batch) :], rows, sets[0])
        return out

    def _sketch_columns(self, sketch: ModuleSketch) -> Tensor:
        """(n_train, size) sketches of the training rows in every process, each chunk made by one."""
        out = torch.zeros((len(self._batch), sketch.size), device=self._batch.device)
        chunks = self._chunks(self._batch)
        for number in self._processes.mine(range(len(chunks))):
            part = self._batch.select(chunks[number])
            with only_trainable(self._model, self.names):
                found, _ = sketch_rows(
                    self._model, part, [score_coefficients(part)], sketch, self._preconditioner, None,
                    self._passes,
                )  # fmt: skip
            out[chunks[number]] = found[0]
        return self._processes.sum(out)

    def _sketched_block(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], sets: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """The same with both sides sketched; steps are contracted exactly."""
        assert self._sketch is not None and self._sketched is not None
        with only_trainable(self._model, self.names):
            rows, products = sketch_rows(
                self._model, batch, objectives, self._sketch, self._preconditioner, sets[0] if sets else None,
                self._passes,
            )  # fmt: skip
        return torch.cat([rows @ self._sketched.T, products], 2)

    def exact_tile(self, batch: SequenceBatch, count: int = 16) -> Tensor:
        """K1 of the first `count` sequences on both sides, without sketch or store."""
        rows, columns = range(min(count, len(batch))), range(min(count, len(self._batch)))
        part = batch.select(list(rows))
        return self._block(part, [score_coefficients(part)], [self._times_p(self._rows(columns))])[0]

    def _add_products(self, out: Tensor, rows: Sequence[Mapping[str, Tensor]], columns: Mapping[str, Tensor]) -> None:
        for name in self.names:
            right = columns[name].flatten(1).to(rows[0][name]).T
            for number, one in enumerate(rows):
                out[number] += (one[name].flatten(1) @ right).to(out.device)

    def _rows(self, span: range, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Raw rows of these training sequences, formed where they stay: in `out` (zeros) where it is given."""
        parameters = {name: q for name, q in self._model.named_parameters() if name in self.names}
        found = (
            {name: torch.zeros((len(span), *q.shape), device=q.device) for name, q in parameters.items()}
            if out is None
            else dict(out)
        )
        whole = self._batch.select(list(span))
        # A pass holds its sequences' rows of one parameter beside these: of a block's, whatever the lengths.
        for places in pass_order(whole).split(BLOCK_ROWS):
            part = whole.select(places)
            with only_trainable(self._model, self.names):
                stream_rows(
                    self._model, part, [score_coefficients(part)], keeping([found], places), self._passes,
                    restart=lambda places=places: emptied([found], places),
                )  # fmt: skip
        return found

    def _times_p(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._preconditioner is not None:
            for name, part in rows.items():
                part.mul_(self._preconditioner[name].to(part.device))
        return rows

    def _chunks(self, batch: SequenceBatch) -> list[Tensor]:
        return list(pass_order(batch).split(self.plan.chunk))

    def _gather_columns(self) -> dict[str, Tensor]:
        """All rows in every process, each chunk formed (or read from the store) by one of them."""
        n = len(self._batch)
        parameters = dict(self._model.named_parameters())
        out = {name: torch.zeros((n, *parameters[name].shape), device=parameters[name].device) for name in self.names}
        spans = [range(start, min(start + BLOCK_ROWS, n)) for start in range(0, n, BLOCK_ROWS)]
        for number in self._processes.mine(range(len(spans))):
            span = spans[number]
            self._rows(span, {name: rows[span.start : span.stop] for name, rows in out.items()})
        self._processes.meet()
        for number, span in enumerate(spans):
            for rows in out.values():
                self._processes.send_around(rows[span.start : span.stop], number % self._processes.size)
        return out

    def store_rows(self, batch: SequenceBatch, wanted: Sequence[StoredRows]) -> list[GradientStore]:
        """Rows of `batch` in gradient stores, one for each of `wanted`, the shards shared by the processes."""
        with only_trainable(self._model, self.names):
            return store_rows(
                self._model,
                batch,
                wanted,
                storage=self._storage,
                shard_rows=min(self.plan.tile, BLOCK_ROWS),
                passes=self._passes,
                processes=self._processes,
                formed=self._columns if batch is self._batch else None,
                reporter=self._reporter,
            )


class _Piece(NamedTuple):
    """Columns that are contracted at a time. place: where in the result; load: gives their sets; whole: one process forms
    them and does all their blocks; stored: the training rows are read from the store; sketched: both sides are projected.
    """

    number: int
    place: slice
    load: Callable[[], list[Mapping[str, Tensor]]]
    whole: bool = False
    stored: bool = False
    sketched: bool = False
    other_metric: OtherMetric | None = None

    def name(self, chunk: int) -> str:
        return f"tile-{self.number:05d}-rows-{chunk:05d}"


def _place(out: Sequence[Tensor], rows: Tensor, columns: slice, block: Tensor) -> None:
    for matrix, part in zip(out, block, strict=True):
        matrix[rows, columns] = part.to(matrix)
