"""The last hidden states of a model's passes, noted beside whatever the passes are made for.

A hook on the backbone, the module inside a causal language model whose last hidden state the output layer turns into logits
(transformers' `base_model`). The output layer itself is left alone: some trainers and the frozen head multiply by its weight
without calling it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from entropy_core.passes.forward import innermost_model


def backbone(model: nn.Module) -> nn.Module | None:
    """The module that gives hidden states; None where the model names none."""
    inner = innermost_model(model)
    found = getattr(inner, "base_model", None)
    return cast(nn.Module, found) if isinstance(found, nn.Module) and found is not inner else None


@contextmanager
def noted_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every pass appends its (n, l, width) last hidden state, without its graph, to the list yielded."""
    found: list[Tensor] = []
    module = backbone(model)
    if module is None:
        yield found
        return

    def note(_module: nn.Module, _args: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        hidden = output[0] if hidden is None and isinstance(output, tuple) and output else hidden
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            found.append(hidden.detach())

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def projected(hidden: Tensor, projection: Tensor) -> Tensor:
    """(m, size) float32: (m, width) hidden states times a (width, size) projection, without a graph."""
    with torch.no_grad():
        return hidden.detach().float() @ projection.to(hidden.device)
