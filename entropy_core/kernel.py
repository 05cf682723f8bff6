"""The cross Fisher kernel between an evaluation batch and a training batch.

    K1(t, i) = dS_t^T diag(P) dS_i          score against score
    KH(t, i) = E_t^T  diag(P) dS_i          entropy against score; the mean of E_t over t estimates the entropy gradient

    dH_i = lr (1 - beta1)/(1 - beta1^t) c w_i (1/n) sum_t KH(t, i)         training sequence i's share of the entropy change

P stands on one side only. Rows are raw: no advantage, length or P inside. Only one side's rows are
stored (n times the trainable parameters): of K1 alone the smaller side's, with KH the training
side's. The other side streams by, module by module, in one forward and one backward pass a kernel.
Sums in float32. Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import total
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import per_sequence_gradients, stream_rows, trainable_parameters
from entropy_core.graph_passes import CoefficientsOf
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.scores import TokenStatistics

# Numbers of a side that are multiplied with a metric at a time: on a CPU they stay in its cache.
_CPU_PIECE, _DEVICE_PIECE = 2**18, 2**24


@dataclass(frozen=True)
class Columns:
    """Vectors that the rows of a stream are multiplied with.

    Attributes:
        vectors: name -> (n, *shape).
        metric: name -> tensor of the parameter's shape, the diagonal that stands between row and
            vector (P); None: 1.
        objectives: numbers of those whose products are wanted, None: all; the products of others
            are 0.
    """

    vectors: Mapping[str, Tensor]
    metric: Mapping[str, Tensor] | None = None
    objectives: Sequence[int] | None = None

    @property
    def count(self) -> int:
        """n"""
        return len(next(iter(self.vectors.values())))


@dataclass(frozen=True)
class CrossKernels:
    """`fisher` K1 and `entropy_fisher` KH, both (n_eval, n_train) float32.

    Examples:
        >>> kernels = compute_kernels(model, batch, other_batch)
        >>> kernels.fisher.shape == kernels.entropy_fisher.shape == (4, 2)
        True
    """

    fisher: Tensor
    entropy_fisher: Tensor


def compute_cross_fisher_kernel(
    model: nn.Module,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    preconditioner: Mapping[str, Tensor] | None = None,
    passes: PassSettings = DEFAULT_PASSES,
) -> Tensor:
    """K1, (n_eval, n_train) float32.

    Args:
        preconditioner: name -> P over all trainable parameters; None means P = 1.

    Raises:
        ValueError: P does not cover the trainable parameters or holds values that are not positive
            and finite, and as `stream_rows` does.

    Examples:
        >>> p = adam_preconditioner(optimizer, model.named_parameters())
        >>> kernel = compute_cross_fisher_kernel(model, batch, other_batch, p)
        >>> kernel.shape, kernel.dtype
        (torch.Size([4, 2]), torch.float32)
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
    """K1 and KH from one forward pass over each side; `statistics` are the evaluation batch's,
    where known.

    Examples:
        >>> kernels = compute_kernels(model, batch, other_batch)
        >>> alone = compute_cross_fisher_kernel(model, batch, other_batch)
        >>> torch.allclose(kernels.fisher, alone, atol=1e-5)
        True
    """
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
) -> Columns:
    """Score rows of the side that is stored, under P."""
    check_preconditioner(preconditioner, trainable_parameters(model))
    return Columns(per_sequence_gradients(model, batch, passes), preconditioner)


def inner_products(
    model: nn.Module,
    batch: SequenceBatch,
    objectives: Sequence[TokenCoefficients] | CoefficientsOf,
    columns: Sequence[Columns],
    passes: PassSettings = DEFAULT_PASSES,
    kinds: int = 1,
) -> list[Tensor]:
    """For each objective the (N, n_columns) float32 matrix of products of rows and columns, the
    rows streamed.

    Args:
        objectives, passes: as in `stream_rows`; as many as `kinds` where a function gives them.
        columns: sets of columns that stand side by side in the result, in this order. They lie on
            their parameters' devices; products are added up on the batch's.

    Raises:
        ValueError: where columns name other parameters than the trainable ones; and as
            `stream_rows` does.
    """
    parameters = trainable_parameters(model)
    if any(one.vectors.keys() != parameters.keys() for one in columns):
        raise ValueError("the stored rows do not name the model's trainable parameters: they belong to another model")
    count = kinds if callable(objectives) else len(objectives)
    ends = list(accumulate(one.count for one in columns))
    out = [torch.zeros((len(batch), ends[-1]), dtype=torch.float32, device=batch.device) for _ in range(count)]

    def contract(number: int, name: str, indices: Tensor, rows: Tensor) -> None:
        at = indices.to(batch.device)
        for start, end, one in zip([0, *ends], ends, columns, strict=False):
            if one.objectives is None or number in one.objectives:
                metric = None if one.metric is None else one.metric[name]
                found = products(rows, one.vectors[name], metric)
                out[number][:, start:end].index_add_(0, at, found.to(out[number]))

    def restart() -> None:
        for matrix in out:
            matrix.zero_()

    stream_rows(model, batch, objectives, contract, passes, restart)
    return [total(matrix) for matrix in out]


def products(rows: Tensor, vectors: Tensor, metric: Tensor | None = None) -> Tensor:
    """(m, n) of rows (m, *shape) and vectors (n, *shape), with the diagonal `metric` (*shape)
    between them.

    Both sides stay as they are: what a metric is multiplied into is a copy of a few columns of the
    smaller side at a time.
    """
    left, right = rows.flatten(1).to(vectors.dtype), vectors.flatten(1)
    if metric is None:
        return left @ right.T
    weights, turned = metric.flatten().to(left), len(right) < len(left)
    small, large = (right, left) if turned else (left, right)
    out = torch.zeros((len(small), len(large)), dtype=left.dtype, device=left.device)
    step = max(1, (_CPU_PIECE if left.device.type == "cpu" else _DEVICE_PIECE) // len(small))
    for start in range(0, left.shape[1], step):
        piece = slice(start, start + step)
        out.addmm_(small[:, piece] * weights[piece], large[:, piece].T)
    return out.T if turned else out


def check_preconditioner(preconditioner: Mapping[str, Tensor] | None, parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where P (None means 1) lacks a parameter, has another shape, or is not
    positive and finite.
    """
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
