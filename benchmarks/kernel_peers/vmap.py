"""torch.func: vmap(grad(f)) over the LoRA parameters alone, the base model's weights held fixed."""

from __future__ import annotations

from typing import Any

import torch
from kernel_parts.cases import Case, Part, score
from torch import Tensor

from kernel_peers import store_and_stream

NEEDS = ("torch", "transformers", "peft")
ATTENTION = "eager"  # fused attention has no batching rule for this


def wrap(case: Case, cut: bool) -> Any:
    trained = {name: p.detach() for name, p in case.parameters.items()}

    def rows_of(part: Part) -> dict[str, Tensor]:
        def one(values: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
            def call(**arguments: Any) -> Any:
                return torch.func.functional_call(case.model, values, (), arguments)

            single = Part(part.indices[:1], ids[None], mask[None], part.positions)
            return score(call, single, cut).sum()

        return torch.func.vmap(torch.func.grad(one), (None, 0, 0))(trained, part.input_ids, part.mask)

    return rows_of


def kernel(handle: Any, case: Case) -> Tensor:
    return store_and_stream(case, handle)
