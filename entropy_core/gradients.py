"""Gradients of sums over completion tokens: for a whole batch, and one row per sequence.

    objective(c) = sum_t sum_k [ c.entropy_tk H_tk + c.logprob_tk log pi_tk ]       (c frozen, entropy_core.entropy)
    row_t        = d/dtheta of sequence t's own terms of it                          so  sum_t row_t = d objective / dtheta

Rows come out of ordinary batched backward passes. In a module y = f(x; w) that treats the sequences of a batch separately,
row_t of w needs only x_t and the cotangent dObjective/dy_t; a hook on every module that owns trainable parameters reads
both while the backward passes by. For y = x W^T + b that is  row_t(W) = sum_l dy_tl x_tl^T  and  row_t(b) = sum_l dy_tl;
for any other module (norms, GPT-2's transposed Conv1D, scaled embeddings) it is the module's own vector-Jacobian product,
sequence by sequence. A parameter used in several places (tied weights) sums its uses. Where hooks cannot follow a model, a loop
over sequences gives the same rows (entropy_core.passes.row_formation).

Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import objective_gradients, open_cut, refuse_unopened
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.formed import dot as dot
from entropy_core.graph_passes import CoefficientsOf, GraphPasses
from entropy_core.passes.forward import true_parameter_gradients
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.passes.state import PassState, open_passes
from entropy_core.row_stream import RowSink, RowStream
from entropy_core.scores import TokenStatistics, token_statistics


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require a gradient, in `named_parameters` order (tied weights
    once); inside `entropy_core.cut_weights.weights_cut` this process's stretch of each.

    Raises:
        ValueError: there are none.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    cut = open_cut(model)
    found = {name: p for name, p in inner.named_parameters() if p.requires_grad} if cut is None else cut.trainable()
    if not found:
        raise ValueError(
            "the model has no trainable parameter: load the adapter with is_trainable=True, or unfreeze some"
        )
    return found


@contextmanager
def gradient_rule(model: nn.Module, as_trained: bool) -> Iterator[None]:
    """Inside, gradients of padding embeddings are the true ones, or (as_trained) those of torch's
    rule; and so for gradients that hooks change, and for those that modules stop, where a PassState
    with true_derivatives is open on the model.
    """
    with ExitStack() as rules:
        if not as_trained:
            rules.enter_context(true_parameter_gradients(model))
            rules.enter_context(PassState.of(model).attached_norms())
        yield


def batch_gradients(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
    passes: PassSettings = DEFAULT_PASSES,
    as_trained: bool = False,
    sharing: PrefixSharing | None = None,
) -> list[dict[str, Tensor]]:
    """One gradient (name -> tensor of the parameter's shape) for each objective, by plain autograd,
    from one forward pass.

    Args:
        coefficients, as_trained: as in `stream_rows`. A trainable parameter that the model did not
            use has a gradient of zeros. `p.grad` is not touched.
        sharing: as in `entropy_core.graph_passes.GraphPasses`.
    """
    refuse_unopened(model)
    parameters = trainable_parameters(model)
    totals: list[dict[str, Tensor]] = []
    with open_passes(model), gradient_rule(model, as_trained), torch.enable_grad():
        for _, objectives in GraphPasses(model, batch, coefficients, passes, sharing=sharing).run():
            for number, objective in enumerate(objectives):
                if number == len(totals):
                    totals.append({name: torch.zeros_like(p) for name, p in parameters.items()})
                _add_gradient(objective, parameters, totals[number], number + 1 < len(objectives))
            del objectives, objective
    return totals


def _add_gradient(
    objective: Tensor, parameters: Mapping[str, nn.Parameter], total: Mapping[str, Tensor], retain_graph: bool
) -> None:
    """Add an objective's gradient to `total` parameter by parameter, as the backward pass reaches them."""
    if open_cut() is not None:  # torch reduces gradients where they arise, and shows them when all is over
        found = objective_gradients(objective, list(parameters.values()), retain_graph)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name].add_(gradient)
        return

    def adding(name: str) -> Callable[[Tensor], Tensor]:
        def add(gradient: Tensor) -> Tensor:
            total[name].add_(gradient.to_dense() if gradient.is_sparse else gradient)
            # What a hook returns takes the gradient's place: autograd would hold all of them until the pass is over.
            return gradient if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

        return add

    hooks = [p.register_hook(adding(name)) for name, p in parameters.items()]
    try:
        torch.autograd.grad(objective, list(parameters.values()), retain_graph=retain_graph, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def entropy_gradient(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    statistics: TokenStatistics | None = None,
    passes: PassSettings = DEFAULT_PASSES,
) -> dict[str, Tensor]:
    """Estimate of the gradient of h (per_token) or H, name -> tensor; see entropy_core.entropy for
    the estimators.

    Args:
        statistics: the batch's token statistics under this very model, where they are known
            already; saves a forward pass.

    Examples:
        >>> gradient = entropy_gradient(model, batch)
        >>> {name: tuple(value.shape) for name, value in gradient.items()}
        {'embed.weight': (8, 4), 'head.weight': (8, 4), 'head.bias': (8,)}
    """

    def coefficients(known: TokenStatistics) -> list[TokenCoefficients]:
        return [entropy_coefficients(known, batch, estimator, per_token).scaled(1.0 / len(batch))]

    wanted = coefficients if statistics is None else coefficients(statistics)
    return batch_gradients(model, batch, wanted, passes)[0]


def stream_rows(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
    sink: RowSink,
    passes: PassSettings = DEFAULT_PASSES,
    restart: Callable[[], None] | None = None,
    as_trained: bool = False,
    factored: bool = False,
) -> None:
    """Send every sequence's row of every parameter and objective to `sink`, module by module, as
    the backward passes by.

    Args:
        model: any model of causal language; its trainable parameters have rows.
        batch: N sequences.
        coefficients: one an objective, each (N, L); or a function from the batch's statistics under
            this model to them, which saves the pass that finds these statistics, in whole or in
            part (`entropy_core.graph_passes`).
        sink: called with (objective, parameter name, (n,) indices, (n, *shape) rows).
        passes: how the batch is cut and rows are formed. Unless its `verify` is false, rows are
            checked against autograd's gradient over all trainable parameters in the bucket that
            passes first (the smallest, where coefficients are no function) and in those twice as
            large, and one row against that of its sequence alone (`entropy_core.passes.row_check`).
        restart: empties what the sink has filled. With it the method "auto" can fall back to the
            loop at any time, without it only until the first rows were sent.
        as_trained: by torch's rules for padding embeddings, and by hooks on gradients
            (`entropy_core.passes.forward.true_parameter_gradients`), as the gradient that the
            trainer's optimizer gets.
        factored: the sink is sent `entropy_core.passes.factors.RowFactors` in place of rows.

    Raises:
        RowsNotFormedError: (a ValueError) with method="hooks", or too late to fall back, for a
            parameter whose rows cannot be formed (its module mixes sequences, takes several
            tensors, or is used other than by being called), naming both.
    """
    refuse_unopened(model)
    with gradient_rule(model, as_trained):
        stream = RowStream(model, trainable_parameters(model), batch, coefficients, passes, factored)
        stream.run(passes.formation(), sink, restart)


def keeping(rows: Sequence[Mapping[str, Tensor]], places: Tensor | None = None) -> RowSink:
    """A sink that keeps the rows of one stream: for each objective name -> (N, *shape), zeros at
    first, in their dtypes.

    Args:
        places: (batch,) where in `rows` each sequence of the batch belongs; None: where it is in
            the batch.
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


def emptied(rows: Sequence[Mapping[str, Tensor]], places: Tensor | None = None) -> None:
    """Make zeros of rows that a sink of `keeping` filled, of those at `places` only where they are
    given.
    """
    for one in rows:
        for part in one.values():
            if places is None:
                part.zero_()
            else:
                part[places.to(part.device)] = 0


def gradient_rows(
    model: nn.Module,
    batch: SequenceBatch,
    coefficients: TokenCoefficients,
    passes: PassSettings = DEFAULT_PASSES,
    as_trained: bool = False,
) -> dict[str, Tensor]:
    """All rows at once: name -> (N, *parameter.shape).

    The memory is N times the trainable parameters.

    Args:
        passes, as_trained: as in `stream_rows`.
    """
    parameters = trainable_parameters(model)
    rows = {name: torch.zeros((len(batch), *p.shape), dtype=p.dtype, device=p.device) for name, p in parameters.items()}

    sink, restart = keeping([rows]), lambda: emptied([rows])
    stream_rows(model, batch, [coefficients], sink, passes, restart, as_trained)
    return rows


def per_sequence_gradients(
    model: nn.Module,
    batch: SequenceBatch,
    passes: PassSettings = DEFAULT_PASSES,
    as_trained: bool = False,
) -> dict[str, Tensor]:
    """Rows of the score, dS(t)/dtheta: name -> (N, *parameter.shape).

    No advantage, no length, no preconditioner inside.

    Examples:
        >>> rows = per_sequence_gradients(model, batch)
        >>> rows["head.weight"].shape
        torch.Size([4, 8, 4])
    """
    return gradient_rows(model, batch, score_coefficients(batch), passes, as_trained)


def entropy_rows(
    model: nn.Module,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
    passes: PassSettings = DEFAULT_PASSES,
) -> dict[str, Tensor]:
    """Each sequence's term E_t of an entropy-gradient estimate: name -> (N, *shape).

    Their mean over N is the estimate.

    Examples:
        >>> rows, gradient = entropy_rows(model, batch), entropy_gradient(model, batch)
        >>> torch.allclose(rows["head.bias"].mean(0), gradient["head.bias"], atol=1e-5)
        True
    """
    statistics = token_statistics(model, batch, passes)
    coefficients = entropy_coefficients(statistics, batch, estimator, per_token)
    return gradient_rows(model, batch, coefficients, passes)
