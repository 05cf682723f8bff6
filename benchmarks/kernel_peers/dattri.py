"""dattri: TracIn over the trainable parameters. It has no P, so parameters are moved along sqrt(P): their gradient then has it.

Each loader gives its whole side at once: with several training batches it recomputes the test side for each.
"""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from kernel_parts.cases import Case, Part, score, whole
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

NEEDS = ("dattri",)
ATTENTION = "eager"


def wrap(case: Case, cut: bool) -> Any:
    start = {name: p.detach().clone() for name, p in case.parameters.items()}

    def objective(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        values = {
            name: start[name] + (p - start[name]) * case.preconditioner[name].sqrt() for name, p in parameters.items()
        }

        def call(**arguments: Any) -> Any:
            return torch.func.functional_call(case.model, values, (), arguments)

        ids, mask = data
        return score(call, Part(ids[:1], ids[None], mask[None], ids)).sum()

    task = AttributionTask(objective, case.model, case.model.state_dict())
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, device=str(case.rows.device))
    attributor.projector_kwargs = None  # None as an argument means its default, a projection to 512
    return attributor


def kernel(handle: Any, case: Case) -> Tensor:
    loaders, orders = [], []
    for side in (case.columns, case.rows):
        part = whole(side)
        loaders.append(DataLoader(TensorDataset(part.input_ids, part.mask), batch_size=len(side), shuffle=False))
        orders.append(part.indices)
    found = handle.attribute(*loaders).detach()
    out = torch.zeros(len(case.rows), len(case.columns))
    out[orders[1].cpu()[:, None], orders[0].cpu()] = found.T
    return out
