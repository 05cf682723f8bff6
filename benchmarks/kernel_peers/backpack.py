"""backpack: the adapters' linear layers are extended, BatchGrad leaves their per-sample gradients in p.grad_batch."""

from __future__ import annotations

from typing import Any

from backpack import backpack, extend
from backpack.extensions import BatchGrad
from kernel_parts.cases import Case, Part, score
from torch import Tensor, nn

from kernel_peers import store_and_stream

NEEDS = ("backpack-for-pytorch",)
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> Any:
    for module in case.model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            extend(module)

    def rows_of(part: Part) -> dict[str, Tensor]:
        with backpack(BatchGrad()):
            score(case.model, part, cut).sum().backward()
        rows = {}
        for name, p in case.parameters.items():
            rows[name] = p.grad_batch
            del p.grad_batch
            p.grad = None
        return rows

    return rows_of


def kernel(handle: Any, case: Case) -> Tensor:
    return store_and_stream(case, handle)
