"""Gradients of sums over completion tokens: for a whole batch, and one row per sequence.

    objective(c) = sum_t sum_k [ c.entropy_tk H_tk + c.logprob_tk log pi_tk ]       (c frozen, entropy_core.entropy)
    row_t        = d/dtheta of sequence t's own terms of it                          so  sum_t row_t = d objective / dtheta

Rows come out of ordinary batched backward passes. In a module y = f(x; w) that treats the sequences of a batch separately,
row_t of w needs only x_t and the cotangent dObjective/dy_t; a tap behind every module that owns trainable parameters reads
both while the backward passes by. For y = x W^T + b that is  row_t(W) = sum_l dy_tl x_tl^T  and  row_t(b) = sum_l dy_tl;
for any other module (norms, GPT-2's transposed Conv1D, scaled embeddings) it is the module's own vector-Jacobian product,
sequence by sequence. A parameter used in several places (tied weights) sums its uses.

Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_core.batch import DEFAULT_TOKEN_BATCH_SIZE, Bucket, SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.forward import evaluation_mode, true_embedding_gradients
from entropy_core.passes import CoefficientsOf, GraphPasses
from entropy_core.row_sums import RowSums
from entropy_core.row_taps import RowTaps
from entropy_core.scores import TokenStatistics, token_statistics

RowSink = Callable[[int, str, Tensor, Tensor], None]
"""Takes (number of the objective, parameter name, (n,) indices into the batch, (n, *shape) rows), both tensors on the device
of the parameter; may be called more than once for the same name and sequences: contributions add up."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require a gradient, in `named_parameters` order (tied weights once).

    Raises ValueError when there are none.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "the model has no trainable parameter: load the adapter with is_trainable=True, or unfreeze some"
        )
    return found


def dot(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """<left, right> over all parameters, summed in float64. Raises ValueError when the names differ."""
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise ValueError(f"the two gradients cover different parameters ({len(odd)} names, e.g. {odd[0]!r})")
    return sum(float(torch.dot(left[name].double().flatten(), right[name].double().flatten())) for name in left)


def batch_gradients(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
) -> list[dict[str, Tensor]]:
    """One gradient (name -> tensor of the parameter's shape) for each objective, by plain autograd, from one forward pass.

    coefficients: as in `stream_rows`. A trainable parameter that the model did not use has a gradient of zeros. `p.grad` is
    not touched.
    """
    parameters = trainable_parameters(model)
    totals: list[dict[str, Tensor]] = []
    passes = GraphPasses(model, batch, coefficients, token_batch_size)
    with evaluation_mode(model), torch.enable_grad():
        for _, objectives in passes.run():
            for number, objective in enumerate(objectives):
                if number == len(totals):
                    totals.append({name: torch.zeros_like(p) for name, p in parameters.items()})
                gradients = torch.autograd.grad(
                    objective, list(parameters.values()), retain_graph=number + 1 < len(objectives), allow_unused=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        totals[number][name] += gradient
            del objectives, objective
    return totals


def entropy_gradient(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    statistics: TokenStatistics | None = None,
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
) -> dict[str, Tensor]:
    """Estimate of the gradient of h (per_token) or H, name -> tensor; see entropy_core.entropy for the estimators.

    statistics: the batch's token statistics under this very model, where they are known already; saves a forward pass.
    """

    def coefficients(known: TokenStatistics) -> list[TokenCoefficients]:
        return [entropy_coefficients(known, batch, estimator, per_token).scaled(1.0 / len(batch))]

    with true_embedding_gradients(model):
        wanted = coefficients if statistics is None else coefficients(statistics)
        return batch_gradients(model, batch, wanted, token_batch_size)[0]


def stream_rows(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
    sink: RowSink,
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    verify: bool = True,
) -> None:
    """Send every sequence's row of every parameter and objective to `sink`, module by module, as the backward passes by.

    coefficients: or a function of the batch's statistics under this model, which saves the pass that finds these, in whole or
    in part (entropy_core.passes). verify: check in the bucket that passes first (the smallest, where coefficients are no
    function) that rows add up to autograd's gradient over all trainable parameters (entropy_core.row_sums).

    Raises
    ------
    ValueError: a parameter whose rows cannot be formed (its module mixes sequences, takes several tensors, or is used
        other than by being called), naming the parameter and the module; method="loop" covers such models.
    """
    parameters = trainable_parameters(model)
    passes = GraphPasses(model, batch, coefficients, token_batch_size, smallest_first=verify)
    with evaluation_mode(model), torch.enable_grad(), RowTaps(model, parameters) as taps:
        for bucket, objectives in passes.run(taps.begin):
            for number, objective in enumerate(objectives):
                sums = RowSums(parameters) if verify else None

                def receive(
                    name: str,
                    rows: Tensor,
                    number: int = number,
                    bucket: Bucket = bucket,
                    sums: RowSums | None = sums,
                ) -> None:
                    if sums is not None:
                        sums.add(name, rows)
                    sink(number, name, bucket.indices.to(rows.device), rows)

                more = number + 1 < len(objectives)
                found = taps.backward(objective, receive, more, () if sums is None else sums.parameters)
                if sums is not None:
                    verify = not sums.errors(found)
            del objectives, objective, found  # the graph, before the next bucket makes its own


def keeping(rows: Sequence[Mapping[str, Tensor]], places: Tensor | None = None) -> RowSink:
    """A sink that keeps the rows of one stream: for each objective name -> (N, *shape), zeros at first, in their dtypes.

    places: (batch,) where in `rows` each sequence of the batch belongs; None: where it is in the batch.
    """
    latest: dict[tuple[int, str], Tensor] = {}

    def keep(number: int, name: str, indices: Tensor, part: Tensor) -> None:
        kept, before = rows[number][name], latest.get((number, name))
        latest[number, name] = indices
        again = before is not None and (before is indices or torch.equal(before, indices))
        at = indices if places is None else places.to(indices.device)[indices]
        part = part.to(kept.dtype)
        if again:  # a parameter that is used twice in a pass
            kept.index_add_(0, at, part)
        else:  # cheaper than to add them to zeros
            kept[at] = part

    return keep


def gradient_rows(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: TokenCoefficients,
    method: Literal["hooks", "loop"] = "hooks",
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    verify: bool = True,
) -> dict[str, Tensor]:
    """All rows at once: name -> (N, *parameter.shape). The memory is N times the trainable parameters.

    method: "hooks" forms rows in batched backward passes; "loop" runs one backward pass a sequence, for any model.
    """
    parameters = trainable_parameters(model)
    rows = {name: torch.zeros((len(batch), *p.shape), dtype=p.dtype, device=p.device) for name, p in parameters.items()}
    if method == "hooks":
        stream_rows(model, batch, [coefficients], keeping([rows]), token_batch_size, verify)
    elif method == "loop":
        for index in range(len(batch)):
            one = TokenCoefficients(coefficients.entropy[index : index + 1], coefficients.logprob[index : index + 1])
            for name, gradient in batch_gradients(model, batch.select([index]), [one])[0].items():
                rows[name][index] = gradient
    else:
        raise ValueError(f"unknown method {method!r}: choose 'hooks' or 'loop'")
    return rows


def per_sequence_gradients(
    model: nn.Module,
    batch: SequenceBatch,
    method: Literal["hooks", "loop"] = "hooks",
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    verify: bool = True,
) -> dict[str, Tensor]:
    """Rows of the score, dS(t)/dtheta: name -> (N, *parameter.shape). No advantage, no length, no preconditioner inside."""
    return gradient_rows(model, batch, score_coefficients(batch), method, token_batch_size, verify)


def entropy_rows(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    method: Literal["hooks", "loop"] = "hooks",
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    verify: bool = True,
) -> dict[str, Tensor]:
    """Each sequence's term E_t of an entropy-gradient estimate: name -> (N, *shape). Their mean over N is the estimate."""
    statistics = token_statistics(model, batch, token_batch_size)
    coefficients = entropy_coefficients(statistics, batch, estimator, per_token)
    return gradient_rows(model, batch, coefficients, method, token_batch_size, verify)
