"""What the two sides of a kernel are multiplied with: kinds of rows on the evaluation side, vectors beside the training rows.

Estimators whose coefficients are equal over a sequence's tokens are combinations of `score` and `own_tokens`, so that four
backward passes serve every estimator in both units (entropy_experiments.step.evaluation_products).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from entropy_core.kernel import Columns

RowKind = Literal["score", "own_tokens", "per_token", "per_completion"]
"""score: dS_t. own_tokens: the gradient of sum_k H_k with the tokens as they are. per_token, per_completion: Rao-Blackwell terms
of the gradient of h and of H."""
ROW_KINDS: tuple[RowKind, ...] = get_args(RowKind)

PARTS = ("total", "batch", "momentum", "weight_decay")
"""The step, and what it is made of."""
STEP_VECTORS = (*PARTS, "without_preconditioner")
"""Vectors that every row is multiplied with: the parts, and the step without P and momentum."""


@dataclass(frozen=True)
class OtherMetric:
    """Training rows once more, with another diagonal than P in between, for these kinds of rows."""

    metric: Mapping[str, Tensor]
    kinds: tuple[RowKind, ...]


@dataclass(frozen=True)
class Products:
    """Inner products of one side's rows, kind -> (N, columns) float32.

    kernel: with the training rows under P; steps: with vectors as they are; others: with the training rows under each other
    metric. A kind that was not asked for is missing.
    """

    kernel: Mapping[RowKind, Tensor]
    steps: Mapping[RowKind, Tensor]
    others: tuple[Mapping[RowKind, Tensor], ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which products are wanted of `kinds` of rows.

    kernel: of which kinds with the training rows; steps: name -> (n_steps, *shape), for all kinds.
    """

    kinds: tuple[RowKind, ...]
    kernel: tuple[RowKind, ...] = ()
    steps: Mapping[str, Tensor] | None = None
    others: tuple[OtherMetric, ...] = ()

    def numbers(self, kinds: tuple[RowKind, ...]) -> tuple[int, ...]:
        """Where these kinds stand among all."""
        return tuple(self.kinds.index(kind) for kind in kinds)

    @property
    def step_columns(self) -> list[Columns]:
        """The steps, without a metric; empty where there are none."""
        return [] if self.steps is None else [Columns(self.steps)]
