"""opacus: GradSampleModule leaves every parameter's per-sample gradients in p.grad_sample."""

from __future__ import annotations

from typing import Any

from kernel_parts.cases import Case, Part, score
from opacus import GradSampleModule
from torch import Tensor

from kernel_peers import store_and_stream

NEEDS = ("opacus",)
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> Any:
    model = GradSampleModule(case.model, batch_first=True, loss_reduction="sum", strict=False).train()

    def rows_of(part: Part) -> dict[str, Tensor]:
        score(model, part, cut).sum().backward()
        rows = {}
        for name, p in case.parameters.items():
            rows[name] = p.grad_sample
            p.grad_sample = p.grad = None
        return rows

    return rows_of


def kernel(handle: Any, case: Case) -> Tensor:
    return store_and_stream(case, handle)
