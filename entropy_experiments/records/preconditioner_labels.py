"""Which P stands behind which numbers of a results folder.

Shares and the batch part of the step are made with P_t, the step's own, which holds this step's gradient; the kernel with the P
that `fisher_kernel.preconditioning` asks for, by default the checkpoint's. One label for both called shares made with P_t
"checkpoint". docs/decisions/0008-shares-use-the-steps-own-p.md.
"""

from __future__ import annotations

WORDS = {
    "step": "the step's own P_t, this step's gradient included",
    "checkpoint": "the checkpoint's, from before the step",
    "none": "none: a plain gradient step",
}


def of_shares(preconditioning: str) -> str:
    """The label of the P that shares are made with, from the kernel's `preconditioning`."""
    return "none" if preconditioning == "none" else "step"
