"""The cross Fisher kernel between an evaluation batch and a training batch.

    K1(t, i) = dS_t^T diag(P) dS_i          score against score
    KH(t, i) = E_t^T  diag(P) dS_i          entropy against score; the mean of E_t over t estimates the entropy gradient

    dH_i = lr (1 - beta1)/(1 - beta1^t) c w_i (1/n) sum_t KH(t, i)         training sequence i's share of the entropy change

P stands on one side only. Rows are raw: no advantage, length or P inside. Only one side's rows are stored (n times the
trainable parameters): of K1 alone the smaller side's, with KH the training side's. The other side streams by, module by
module, in one forward and one backward pass a kernel. Sums in float32. Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import per_sequence_gradients, stream_rows, trainable_parameters
from entropy_core.graph_passes import CoefficientsOf
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.scores import TokenStatistics


@dataclass(frozen=True)
class OtherMetric:
    """A further block against the first column set, with rows times `factor` (name -> tensor of the parameter's shape), for these
    objectives by number; 0 for the others.
    """

    factor: Mapping[str, Tensor]
    objectives: tuple[int, ...]


@dataclass(frozen=True)
class CrossKernels:
    """`fisher` K1 and `entropy_fisher` KH, both (n_eval, n_train) float32."""

    fisher: Tensor
    entropy_fisher: Tensor


def compute_cross_fisher_kernel(
    model: nn.Module,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    preconditioner: Mapping[str, Tensor] | None = None,
    passes: PassSettings = DEFAULT_PASSES,
) -> Tensor:
    """K1, (n_eval, n_train) float32. preconditioner: name -> P over all trainable parameters; None means P = 1.

    Raises ValueError where P does not cover the trainable parameters or
    holds values that are not positive and finite, and as `stream_rows` does.
    """
    passes = passes.remembering()
    turned = len(eval_batch) < len(train_batch)
    stored, streamed = (eval_batch, train_batch) if turned else (train_batch, eval_batch)
    columns = _columns(model, stored, preconditioner, passes)
    objectives = [score_coefficients(streamed)]
    found = inner_products(model, streamed, objectives, [columns], passes)[0]
    return found.T.contiguous() if turned else found


def compute_kernels(
    model: nn.Module,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    preconditioner: Mapping[str, Tensor] | None = None,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    statistics: TokenStatistics | None = None,
    passes: PassSettings = DEFAULT_PASSES,
) -> CrossKernels:
    """K1 and KH from one forward pass over each side; `statistics` are the evaluation batch's, where known."""
    passes = passes.remembering()
    columns = _columns(model, train_batch, preconditioner, passes)

    def objectives(known: TokenStatistics) -> list[TokenCoefficients]:
        return [score_coefficients(eval_batch), entropy_coefficients(known, eval_batch, estimator, per_token)]

    wanted = objectives if statistics is None else objectives(statistics)
    found = inner_products(model, eval_batch, wanted, [columns], passes, kinds=2)
    return CrossKernels(*found)


def _columns(
    model: nn.Module,
    batch: SequenceBatch,
    preconditioner: Mapping[str, Tensor] | None,
    passes: PassSettings,
) -> dict[str, Tensor]:
    """Score rows of the side that is stored, times P."""
    check_preconditioner(preconditioner, trainable_parameters(model))
    columns = per_sequence_gradients(model, batch, passes)
    if preconditioner is not None:
        for name, rows in columns.items():
            rows.mul_(preconditioner[name])
    return columns


def inner_products(
    model: nn.Module,
    batch: SequenceBatch,
    objectives: Sequence[TokenCoefficients] | CoefficientsOf,
    column_sets: Sequence[Mapping[str, Tensor]],
    passes: PassSettings = DEFAULT_PASSES,
    kinds: int = 1,
    other_metric: OtherMetric | None = None,
) -> list[Tensor]:
    """For each objective the (N, n_columns) float32 matrix  row_t^T column_i , rows of `batch` streamed.

    column_sets: each name -> (n, *shape), stored rows of the other side times P, or any other vectors; the columns of all
    sets stand side by side in the result, in order. objectives, passes: as in `stream_rows`; one RowFormation for all calls
    checks what is new to it. kinds: how many objectives there are, where a function gives them. other_metric: a last block
    of columns, as many as the first set has. Columns lie on their parameters' devices; products are added up on the batch's.
    """
    parameters = trainable_parameters(model)
    if any(columns.keys() != parameters.keys() for columns in column_sets):
        raise ValueError("the stored rows do not name the model's trainable parameters: they belong to another model")
    count = kinds if callable(objectives) else len(objectives)
    ends = list(accumulate(len(next(iter(columns.values()))) for columns in column_sets))
    width = ends[-1] + (ends[0] if other_metric is not None else 0)
    out = [torch.zeros((len(batch), width), dtype=torch.float32, device=batch.device) for _ in range(count)]

    def contract(number: int, name: str, indices: Tensor, rows: Tensor) -> None:
        for start, end, columns in zip([0, *ends], ends, column_sets, strict=False):
            other = columns[name].flatten(1)
            products = rows.flatten(1).to(other.dtype) @ other.T
            out[number][:, start:end].index_add_(0, indices.to(batch.device), products.to(out[number]))
        if other_metric is not None and number in other_metric.objectives:
            other = column_sets[0][name].flatten(1)
            products = (rows.flatten(1).to(other.dtype) * other_metric.factor[name].flatten().to(other)) @ other.T
            out[number][:, ends[-1] :].index_add_(0, indices.to(batch.device), products.to(out[number]))

    def restart() -> None:
        for products in out:
            products.zero_()

    stream_rows(model, batch, objectives, contract, passes, restart)
    return out


def check_preconditioner(preconditioner: Mapping[str, Tensor] | None, parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where P (None means 1) lacks a parameter, has another shape, or is not positive and finite."""
    if preconditioner is None:
        return
    missing = [name for name in parameters if name not in preconditioner]
    if missing:
        raise ValueError(
            f"the preconditioner lacks {len(missing)} of {len(parameters)} trainable parameters, e.g. {missing[0]!r}: it "
            "belongs to another model, or optimizer names were mapped wrongly"
        )
    for name, parameter in parameters.items():
        p = preconditioner[name]
        if p.shape != parameter.shape:
            raise ValueError(
                f"the preconditioner of {name!r} is {tuple(p.shape)}, the parameter {tuple(parameter.shape)}"
            )
        if not bool(((p > 0) & torch.isfinite(p)).all()):
            raise ValueError(f"the preconditioner of {name!r} holds values that are not positive and finite")
