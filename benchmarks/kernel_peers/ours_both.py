"""This project's K1 and KH from one call; token statistics of the evaluation side are not given. (2, n_rows, n_columns)."""

from __future__ import annotations

import torch
from kernel_parts.cases import Case
from torch import Tensor

from entropy_core.kernel import compute_kernels

NEEDS = ("torch", "transformers", "peft")
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> None:
    return None


def kernel(handle: None, case: Case) -> Tensor:
    found = compute_kernels(case.model, case.rows, case.columns, case.preconditioner)
    return torch.stack([found.fisher, found.entropy_fisher])
