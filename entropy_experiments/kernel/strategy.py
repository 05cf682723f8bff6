"""What a way of keeping the training rows must do: form them, answer for some of them, and cut the kernel into pieces.

    KernelEngine.prepare() -> TrainingRows        rows as they are, formed, stored, or to be formed when they are needed
    Kernel(TrainingRows, P)                       products with other rows (entropy_experiments.kernel.engine)

P is never multiplied into rows: it stands in the products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.processes import ALONE, Processes
from entropy_core.sketch import ModuleSketch
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.modules import only_trainable
from entropy_experiments.kernel.plan import BLOCK_ROWS, KernelPlan
from entropy_experiments.kernel.row_passes import RowPasses, Rows
from entropy_experiments.kernel.store.row_storage import StoredRows, store_rows
from entropy_experiments.kernel.store.store import GradientStore
from entropy_experiments.kernel.workspace import KernelWorkspace
from entropy_experiments.run.reporter import SILENT, Reporter

Preconditioner = Mapping[str, Tensor] | None
"""name -> P of the parameter's shape; None: 1."""
Block = Callable[[SequenceBatch, Sequence[TokenCoefficients]], Tensor]
"""(sequences of a chunk, their objectives) -> (objectives, sequences, columns)."""


@dataclass(frozen=True)
class KernelSetup:
    """Everything that is settled before any row is formed.

    batch: the training sequences. workspace: where finished blocks go; None keeps them in memory (one process only).
    store_folder: where the gradient store lies, for plans that have one, in the precision `storage`. sketch: of the plan
    "sketch". without_factors: another plan, for a model whose rows a loop forms; None: there is none. Raises ValueError where
    several processes have no workspace to meet in.
    """

    passes: RowPasses
    batch: SequenceBatch
    plan: KernelPlan
    processes: Processes = ALONE
    workspace: KernelWorkspace | None = None
    store_folder: Path | None = None
    storage: str = "float32"
    sketch: ModuleSketch | None = None
    reporter: Reporter = SILENT
    without_factors: Callable[[], KernelPlan] | None = None

    def __post_init__(self) -> None:
        if self.processes.size > 1 and self.workspace is None:
            raise ValueError("several processes need a workspace to meet in")

    def store(
        self, batch: SequenceBatch, wanted: Sequence[StoredRows], formed: Rows | None = None
    ) -> list[GradientStore]:
        """Rows of `batch` in gradient stores, one for each of `wanted`, the shards shared by the processes.

        formed: the rows, where they are at hand.
        """
        with only_trainable(self.passes.model, self.passes.names):
            return store_rows(
                self.passes.model,
                batch,
                wanted,
                storage=self.storage,
                shard_rows=min(self.plan.tile, BLOCK_ROWS),
                processes=self.processes,
                formed=formed,
                passes=self.passes.settings,
                reporter=self.reporter,
            )


class Piece(NamedTuple):
    """Columns that are computed at a time.

    columns: how many. open: forms or loads what their blocks need. whole: all blocks in one process, since `open` is expensive.
    """

    columns: int
    open: Callable[[], Block]
    whole: bool = False


class TrainingRows(ABC):
    """Rows dS_i of the training side, as they are. A strategy is a subclass; making an instance forms the rows.

    columns: name -> (n_train, *shape) in every process; None where they are not kept. store: on disk, or None. forms_rows: False
    where only derivatives along directions are asked for.
    """

    forms_rows: ClassVar[bool] = True
    columns: Rows | None = None
    store: GradientStore | None = None

    def __init__(self, setup: KernelSetup) -> None:
        self.setup = setup

    def sample(self) -> tuple[range, Mapping[str, Tensor]]:
        """Rows of some training sequences, for checks: all of them where they are kept."""
        n = len(self.setup.batch)
        if self.columns is not None:
            return range(n), self.columns
        some = range(min(n, self.setup.plan.tile, BLOCK_ROWS))
        return some, self.setup.passes.score_rows(self.setup.batch, some)

    def held(self, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Vectors that every pass is multiplied with: as they are, formed anew in each pass where they are formed when read."""
        return vectors

    def cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        """How a matrix is cut into pieces under this P; side by side, their columns are those of `Wanted`."""

        def pieces(wanted: Wanted) -> list[Piece]:
            if wanted.kernel:
                return with_rows(wanted)
            return [self._steps(wanted)] if wanted.steps is not None else []

        with_rows = self._cut(p)
        return pieces

    @abstractmethod
    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        """`cut` where products with the training rows are wanted."""

    def _steps(self, wanted: Wanted) -> Piece:
        columns = wanted.step_columns
        return Piece(
            columns[0].count, lambda: lambda batch, objectives: self.setup.passes.products(batch, objectives, columns)
        )
