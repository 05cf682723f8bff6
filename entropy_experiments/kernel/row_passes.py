"""Passes over one model that form rows of some of its trainable parameters: the only place where a kernel meets the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, pass_order
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.factored_rows import KeptFactors
from entropy_core.formed import Formed
from entropy_core.gradients import emptied, keeping, stream_rows, trainable_parameters
from entropy_core.kernel import Columns, inner_products
from entropy_core.passes.row_formation import RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.row_stream import RowSink
from entropy_experiments.kernel.modules import only_trainable
from entropy_experiments.kernel.plan import BLOCK_ROWS

Rows = dict[str, Tensor]
"""name -> (n, *shape)"""


@dataclass(frozen=True)
class RowPasses:
    """names: parameters that rows are formed of. settings: how; all passes share what is learnt of the model's rows."""

    model: nn.Module
    names: tuple[str, ...]
    settings: PassSettings

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", self.settings.remembering())

    @property
    def formation(self) -> RowFormation:
        """By hooks or a loop."""
        return self.settings.formation()

    @property
    def restricted(self) -> bool:
        """Whether rows leave out some of the trainable parameters."""
        return any(p.requires_grad and name not in set(self.names) for name, p in self.model.named_parameters())

    def restrict(self, vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`vector` with zeros for parameters that rows leave out, formed when it is read."""
        own = set(self.names)
        return Formed(vector, lambda name: vector[name] if name in own else torch.zeros_like(vector[name]))

    def zeros(self, count: int) -> Rows:
        """Rows of `count` sequences on their parameters' devices, float32."""
        parameters = trainable_parameters(self.model)
        return {
            name: torch.zeros((count, *parameters[name].shape), device=parameters[name].device) for name in self.names
        }

    def stream(
        self,
        batch: SequenceBatch,
        objectives: Sequence[TokenCoefficients],
        sink: RowSink,
        restart: Callable[[], None] = lambda: None,
    ) -> None:
        """As entropy_core.gradients.stream_rows."""
        with only_trainable(self.model, self.names):
            stream_rows(self.model, batch, objectives, sink, self.settings, restart)

    def factors(self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients]) -> KeptFactors:
        """Factors of the rows of every objective."""
        kept = KeptFactors()
        with only_trainable(self.model, self.names):
            stream_rows(self.model, batch, objectives, kept.add, self.settings, kept.clear, factored=True)
        return kept

    def products(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], columns: Sequence[Columns]
    ) -> Tensor:
        """(objectives, N, columns) of rows, which are streamed, and columns."""
        with only_trainable(self.model, self.names):
            found = inner_products(self.model, batch, objectives, columns, self.settings)
        return torch.stack(found)

    def kept(self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients]) -> list[Rows]:
        """Rows of every objective."""
        rows = [self.zeros(len(batch)) for _ in objectives]
        self.stream(batch, objectives, keeping(rows), lambda: emptied(rows))
        return rows

    def score_rows(self, batch: SequenceBatch, span: range, out: Rows | None = None) -> Rows:
        """dS_i of these sequences, formed where they stay: in `out` (zeros) where it is given."""
        found, whole = out or self.zeros(len(span)), batch.select(list(span))
        # A pass holds its sequences' rows of one parameter beside these: of a block's, whatever the lengths.
        for places in pass_order(whole).split(BLOCK_ROWS):
            part = whole.select(places)
            sink = keeping([found], places)
            self.stream(part, [score_coefficients(part)], sink, lambda places=places: emptied([found], places))
        return found

    def settle(self, *batches: SequenceBatch, factored: bool = False) -> None:
        """Find out on the shortest and the longest sequences of each batch whether hooks will do, before any row is kept: every
        process comes to the same answer, and finished blocks are of one method. factored: by passes that form no row.
        """
        for batch in batches:
            lengths = batch.scored_lengths
            few = batch.select(sorted({int(lengths.argmin()), int(lengths.argmax())}))
            if factored:
                self.factors(few, [score_coefficients(few)])
            else:
                self.stream(few, [score_coefficients(few)], lambda *_: None)
