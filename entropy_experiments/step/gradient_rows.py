"""The training side's rows dS_i, for what is asked of them beside the kernel: other weights' gradients, and products.

    weighted gradient   g(w) = -sum_i w_i dS_i            products   <dS_i, u>

Kept rows answer by a matrix product, stored ones shard by shard; where rows were not kept, the first is a backward pass with
these weights and the second one pass in forward mode (entropy_core.directional).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import open_cut
from entropy_core.cut_weights import total as total_over_parameters
from entropy_core.directional import SequenceDerivatives, sequence_derivatives
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.processes import Processes


class TrainingRows(Protocol):
    """Rows of n_train sequences over all trainable parameters."""

    sequences: int

    def weighted_gradient(self, weights: Tensor) -> dict[str, Tensor]:
        """g(w) for (n_train,) weights, name -> tensor."""
        ...

    def gradient_of(self, sequences: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The part of g(w) that these (m,) sequences make, of (n_train,) weights; one process asks alone."""
        ...

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """(n_train,) float64 <dS_i, direction> on the CPU."""
        ...


class KeptRows:
    """name -> (n_train, *shape) rows in memory."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self._columns = columns
        self.sequences = len(next(iter(columns.values())))

    def weighted_gradient(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: -torch.einsum("n,n...->...", weights.to(rows), rows) for name, rows in self._columns.items()}

    def gradient_of(self, sequences: Tensor, weights: Tensor) -> dict[str, Tensor]:
        some = {name: rows[sequences.to(rows.device)] for name, rows in self._columns.items()}
        return KeptRows(some).weighted_gradient(weights[sequences.to(weights.device)])

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(self.sequences, dtype=torch.float64)
        for name, rows in self._columns.items():
            total += (rows.flatten(1) @ direction[name].flatten().to(rows)).double().cpu()
        return total_over_parameters(total)


class RecomputedRows:
    """Rows that are not kept: every question costs a pass over the training sequences.

    processes: who share the gradients' passes, all calling at once; products are everyone's own. as_trained: by torch's rule
    for padding embeddings, as in the training step; False: the true derivatives, of which kernels are made. sharing: what is
    known of prompts that pass once for all their completions, as gradients let them.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: SequenceBatch,
        passes: PassSettings = DEFAULT_PASSES,
        processes: Processes | None = None,
        as_trained: bool = True,
    ) -> None:
        self._model, self._batch, self._passes = model, batch, passes
        self._as_trained = as_trained
        self._processes = processes or Processes()
        self.sequences = len(batch)
        self.sharing = PrefixSharing(model)

    def weighted_gradient(self, weights: Tensor) -> dict[str, Tensor]:
        mine = self._processes.mine(range(self.sequences))
        if mine:
            part = self._batch.select(mine)
            objective = score_coefficients(part, -weights[mine].to(part.device))
            own = self._gradient(part, objective)
        else:  # more processes than sequences
            own = {name: torch.zeros_like(p) for name, p in trainable_parameters(self._model).items()}
        return {name: self._processes.sum(gradient) for name, gradient in own.items()}

    def gradient_of(self, sequences: Tensor, weights: Tensor) -> dict[str, Tensor]:
        part = self._batch.select(sequences.tolist())
        objective = score_coefficients(part, -weights[sequences.to(weights.device)].to(part.device))
        return self._gradient(part, objective)

    def _gradient(self, part: SequenceBatch, objective: TokenCoefficients) -> dict[str, Tensor]:
        if open_cut(self._model) is None:
            self.sharing.shares(self._batch)  # tried on its longest sequences, once for all parts
        return batch_gradients(self._model, part, [objective], self._passes, self._as_trained, self.sharing)[0]

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.along(direction).sequences.double().cpu()

    def along(self, direction: Mapping[str, Tensor]) -> SequenceDerivatives:
        """`products`, and every token's part of them."""
        return sequence_derivatives(self._model, self._batch, direction, self._passes, hold_padding=self._as_trained)
