"""Trained parameters without an entry in `optimizer.pt`.

torch makes an entry with the first gradient, so that a parameter that never had one (an expert that no token chose, an adapter on
a tower for images) has none, and AdamW's next step leaves it alone as long as it still gets none. An entry that was lost looks
the same, and its parameter's step would be taken with P of one gradient. What tells them apart is a gradient now.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState, preconditioner
from entropy_core.cut_weights import any_of
from entropy_core.formed import Formed
from entropy_experiments.checkpoints.optimizer_names import OptimizerRecord
from rl_training.errors import UserError


def without_entry(state: Mapping[str, object], names: list[list[str]], numbers: list[list[int]]) -> list[str]:
    """Names of the parameters of an optimizer's groups whose numbers have no entry in `state`."""
    return [
        name
        for group, ids in zip(names, numbers, strict=True)
        for name, number in zip(group, ids, strict=True)
        if number not in state
    ]


def missing_note(names: list[str]) -> str:
    """What is to be said of them before a gradient is known."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"optimizer.pt has no entry for {names[0]!r}{more}: right only if these never had a gradient in the run; an analysis "
        "stops where they have one now"
    )


def refuse_missing_entries(
    state: Mapping[str, AdamWParameterState], gradient: Mapping[str, Tensor], record: OptimizerRecord
) -> None:
    """Raises UserError for a parameter without entry that has a gradient, unless the file is the trainer's own by its digest."""
    if record == "digest":
        return
    new = [name for name in gradient if not state[name].step]
    found = any_of([bool(gradient[name].any()) for name in new])
    lost = [name for name, moved in zip(new, found, strict=True) if moved]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"optimizer.pt has no entry for {lost[0]!r}{more}, which has a gradient: the entry was lost, or this parameter had "
            "no gradient in the whole run, which nothing records; copy the checkpoint again, or analyse without the optimizer's "
            "state by entropy_analysis.fisher_kernel.preconditioning=none"
        )


def checkpoint_preconditioner(
    state: Mapping[str, AdamWParameterState], gradient: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Name -> P at the checkpoint, formed when it is read; next to nothing for what has neither entry nor gradient, which no step
    moves.

    Raises UserError for a parameter with a gradient and no entry: Adam has no P for it before this step.
    """
    new = [name for name, entry in state.items() if not entry.step]
    for name, moved in zip(new, any_of([bool(gradient[name].any()) for name in new]), strict=True):
        if moved:
            raise UserError(
                f"{name!r} had no gradient in the run and has one now, so that Adam's P at the checkpoint is not defined for it: "
                "take entropy_analysis.fisher_kernel.preconditioning=step"
            )

    def form(name: str) -> Tensor:
        entry = state[name]
        if entry.step:
            return preconditioner(entry)
        return torch.full_like(entry.exp_avg, torch.finfo(entry.exp_avg.dtype).tiny)  # P is positive

    return Formed(state, form)
