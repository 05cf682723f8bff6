"""What a training run will hold beside activations, said and bounded before it is taken.

weights                   as they are loaded
gradients, two moments    of every trained parameter, in its own precision
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rl_training.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. trained: number of trained parameters."""

    weights: int
    gradients: int
    trained: int

    @property
    def moments(self) -> int:
        """Adam's first and second."""
        return 2 * self.gradients

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments

    def describe(self) -> str:
        """One line."""
        return (
            f"memory beside activations: {self.total / _GIB:.2f} GiB (weights {self.weights / _GIB:.2f}, gradients and moments "
            f"of {self.trained:,} trained parameters {(self.gradients + self.moments) / _GIB:.2f})"
        )


def training_memory(model: nn.Module, limit: int | None = None) -> TrainingMemory:
    """Of a model whose trained parameters require gradients, on all devices together.

    Args:
        model: With its weights; gradients and moments are not there yet.
        limit: Bytes that `total` may be; None: any.

    Raises:
        UserError: where it is more.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights, gradients = (sum(p.numel() * p.element_size() for p in some) for some in (parameters, trained))
    found = TrainingMemory(weights, gradients, sum(p.numel() for p in trained))
    if limit is not None and found.total > limit:
        remedy = (
            "train adapters (lora.enabled=true)"
            if len(trained) == len(parameters)
            else "train fewer parameters (lora.r)"
        )
        raise UserError(
            f"training takes {found.total / _GIB:.3g} GiB beside activations, and training.memory_limit is "
            f"{limit / _GIB:.3g} GiB: {remedy}, or raise training.memory_limit"
        )
    return found
