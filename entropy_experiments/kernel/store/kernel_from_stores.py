"""The kernel of two gradient stores: another preconditioner tried without another forward or backward pass.

    K(t, i) = sum_j e_tj P_j s_ij          e: a row of the evaluation store, s: of the training store, j over all parameters

P on one side, once. The sum over j is taken in blocks of columns, so that all rows of both sides pass once; where not even
narrow columns of all rows fit into memory, the kernel is made in tiles and rows pass once a tile. Sums in float32.
Source: docs/theory/fisher-kernel.md, docs/guides/gradient-store.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.kernel import check_preconditioner
from entropy_experiments.kernel.store.store import GradientStore
from rl_training.errors import UserError

NARROWEST_BYTES = 64 * 2**10
"""Of one row in one read: below this, reading scattered pieces of rows takes longer than reading rows several times."""


class TilePlan(NamedTuple):
    """Rows of either side and columns that are in memory at once."""

    eval_rows: int
    train_rows: int
    columns: int


def kernel_from_stores(
    eval_store: GradientStore,
    train_store: GradientStore,
    preconditioner: Mapping[str, Tensor] | None = None,
    memory_budget: int = 2**30,
) -> Tensor:
    """(n_eval, n_train) float32 on the CPU: K1 where the evaluation store holds score rows, KH where it holds entropy rows.

    preconditioner: name -> P of the parameter's shape; None means P = 1. memory_budget: bytes, the result included.

    Raises UserError where a store is not complete or damaged, the two are of different models, the training side holds no
    score rows, or the budget is too small; ValueError where P does not cover the parameters.
    """
    _check_pair(eval_store, train_store)
    layout, n_eval, n_train = eval_store.layout, eval_store.layout.num_grads, train_store.layout.num_grads
    check_preconditioner(
        preconditioner, {name: torch.empty(shape, device="meta") for name, shape in layout.shapes.items()}
    )
    plan = plan_tiles(eval_store, train_store, preconditioner is not None, memory_budget)
    p = None
    if preconditioner is not None:
        p = torch.empty(layout.row_values)
        for name, columns in layout.columns().items():
            p[columns] = preconditioner[name].detach().reshape(-1)
    kernel = torch.zeros((n_eval, n_train))
    # Filled again and again: memory that is handed back and forth does not all come back.
    buffers = [torch.empty(rows * plan.columns) for rows in (plan.eval_rows, plan.train_rows)]

    def read(side: int, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        out = buffers[side][: shape[0] * shape[1]].view(shape)
        return (eval_store, train_store)[side].block(rows, columns, out)

    for t in _pieces(n_eval, plan.eval_rows):
        for i in _pieces(n_train, plan.train_rows):
            for columns in _pieces(layout.row_values, plan.columns):
                left = read(0, t, columns)
                if p is not None:
                    left *= p[columns]
                kernel[t, i].addmm_(left, read(1, i, columns).T)  # a view: adds in place
    return kernel


def plan_tiles(
    eval_store: GradientStore, train_store: GradientStore, preconditioned: bool, memory_budget: int
) -> TilePlan:
    """The largest tiles within `memory_budget` bytes. Raises UserError, saying how much is needed, where there are none."""
    layout, n_eval, n_train = eval_store.layout, eval_store.layout.num_grads, train_store.layout.num_grads
    fixed = 4 * n_eval * n_train + 4 * layout.row_values * preconditioned
    free = (memory_budget - fixed) // 4
    columns = free // (n_eval + n_train)
    narrowest = min(layout.row_values, NARROWEST_BYTES // 4)
    if columns >= narrowest:
        return TilePlan(n_eval, n_train, min(columns, layout.row_values))
    rows = free // narrowest
    if rows < 2:
        raise UserError(
            f"memory_budget {memory_budget / 2**30:.3g} GiB is too small: the kernel, P and one row of either side need "
            f"{(fixed + 8 * narrowest) / 2**30:.3g} GiB"
        )
    # The smaller side whole where it fits beside one row: then the larger one passes once.
    smaller = min(n_eval, n_train)
    smaller = smaller if smaller < rows else rows // 2
    larger = rows - smaller
    return TilePlan(*((smaller, larger) if n_eval <= n_train else (larger, smaller)), narrowest)


def _pieces(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _check_pair(eval_store: GradientStore, train_store: GradientStore) -> None:
    left, right = eval_store.layout, train_store.layout
    if right.kind != "score":
        raise UserError(f"{train_store.folder} holds {right.kind} rows: the training side must hold score rows")
    found = left.fingerprint.model_difference(right.fingerprint, f"in {eval_store.folder}", f"in {train_store.folder}")
    if found or left.shapes != right.shapes or list(left.shapes) != list(right.shapes):
        raise UserError(
            f"the two stores are of different models: {found or 'their rows have other parameters'}; compute both sides from "
            "the same checkpoint"
        )
    for store in (eval_store, train_store):
        store.check_complete()
        for number in range(store.layout.shard_count):
            store.check_shard(number)
