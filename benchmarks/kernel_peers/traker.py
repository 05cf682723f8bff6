"""traker: FunctionalGradientComputer. It forms the gradients of all weights, then drops those that were not asked for."""

from __future__ import annotations

from typing import Any

import torch
from kernel_parts.cases import Case, Part, score
from torch import Tensor
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput

from kernel_peers import store_and_stream

NEEDS = ("traker",)
ATTENTION = "eager"
_MOST_ELEMENTS = 2**28  # of one batch's gradients: 1 GiB


class _Score(AbstractModelOutput):
    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, ids: Tensor, mask: Tensor) -> Tensor:
        def call(**arguments: Any) -> Any:
            return torch.func.functional_call(model, (weights, buffers), (), arguments)

        return score(call, Part(ids[:1], ids[None], mask[None], ids)).sum()

    def get_out_to_loss_grad(self, *arguments: Any) -> Tensor:
        raise NotImplementedError("scores are not losses")


def wrap(case: Case, cut: bool) -> Any:
    count = sum(p.numel() for p in case.model.parameters())
    computer = FunctionalGradientComputer(
        case.model, _Score(), count, torch.float32, torch.device(case.rows.device), grad_wrt=list(case.parameters)
    )
    at_once = max(1, _MOST_ELEMENTS // count)

    def rows_of(part: Part) -> dict[str, Tensor]:
        pieces = [
            computer.compute_per_sample_grad((part.input_ids[k : k + at_once], part.mask[k : k + at_once]))
            for k in range(0, len(part.indices), at_once)
        ]
        return {name: torch.cat([piece[name].detach() for piece in pieces]) for name in case.parameters}

    return rows_of


def kernel(handle: Any, case: Case) -> Tensor:
    return store_and_stream(case, handle)
