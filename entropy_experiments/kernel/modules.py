"""Rows restricted to chosen modules: which parameters they are, and the model with the others frozen for a moment.

Big adapters and full fine-tuning have more parameters than rows can be kept of. A kernel over some modules is a kernel in its
own right; what it leaves out of <grad h, step> is printed beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from entropy_core.cut_weights import open_cut
from entropy_core.gradients import trainable_parameters
from rl_training.errors import UserError


def chosen_parameters(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the trainable parameters that match any of the shell patterns (`*layers.1[0-9].*q_proj*`); all for None.

    Raises UserError for a pattern that matches none, naming it and a parameter that there is.
    """
    names = list(trainable_parameters(model))
    if patterns is None:
        return names
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"filter_modules: {pattern!r} matches none of the {len(names)} trainable parameters, such as {names[0]!r} "
                "(shell patterns over whole names: *q_proj*)"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def only_trainable(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, no other parameter requires a gradient; every flag is restored afterwards."""
    wanted, held = set(names), []
    cut = open_cut(model)
    if cut is not None:
        cut.give_back()  # flags are those of the stretches
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in wanted:
            parameter.requires_grad_(False)
            held.append(parameter)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
