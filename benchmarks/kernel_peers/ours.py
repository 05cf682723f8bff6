"""This project's K1."""

from __future__ import annotations

from kernel_parts.cases import Case
from torch import Tensor

from entropy_core.kernel import compute_cross_fisher_kernel

NEEDS = ("torch", "transformers", "peft")
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> None:
    return None


def kernel(handle: None, case: Case) -> Tensor:
    return compute_cross_fisher_kernel(case.model, case.rows, case.columns, case.preconditioner)
