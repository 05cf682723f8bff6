"""What K_H may cost on top of K1: one more walk back over the evaluation side, LoRA gradients, graphs made beforehand."""

from __future__ import annotations

from typing import Any

import torch
from kernel_parts.cases import Case, parts
from torch import Tensor

from kernel_peers.plain import ATTENTION, NEEDS, objective, wrap

__all__ = ["ATTENTION", "NEEDS", "kernel", "prepare", "wrap"]


def prepare(handle: Any, case: Case) -> list[Tensor]:
    """Not timed: the graphs, walked back once, as the plain pass leaves them."""
    objectives = [objective(handle, part) for part in parts(case.rows)]
    for one in objectives:
        torch.autograd.grad(one, list(case.parameters.values()), retain_graph=True)
    return objectives


def kernel(objectives: list[Tensor], case: Case) -> None:
    parameters = list(case.parameters.values())
    while objectives:
        torch.autograd.grad(objectives.pop(0), parameters)
