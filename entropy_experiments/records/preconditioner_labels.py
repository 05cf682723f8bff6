"""Which P stands behind which numbers of a results folder.

Shares and the batch part of the step are made with P_t, the step's own, which holds this step's gradient; the kernel with the P
that `fisher_kernel.preconditioning` asks for, by default the checkpoint's. One label for both called shares made with P_t
"checkpoint". docs/decisions/0008-shares-use-the-steps-own-p.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_experiments.text.numbers import lookup

WORDS = {
    "step": "the step's own P_t, this step's gradient included",
    "checkpoint": "the checkpoint's, from before the step",
    "none": "none: a plain gradient step",
}


def of_shares(preconditioning: str) -> str:
    """The label of the P that shares are made with, from the kernel's `preconditioning`."""
    return "none" if preconditioning == "none" else "step"


def preconditioner_labels(summary: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(of the shares, of the kernel) as summary.json says; folders that name one P alone mean the kernel's."""
    found, kernel = (lookup(summary, "attribution", key) for key in ("preconditioner", "kernel_preconditioner"))
    if not isinstance(found, str):
        return None, kernel if isinstance(kernel, str) else None
    if isinstance(kernel, str):
        return found, kernel
    return (of_shares(found) if found in WORDS else None), found
