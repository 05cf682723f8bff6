"""Kernels from sketched rows: both sides through random projections, steps contracted exactly, the error measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import stream_rows
from entropy_core.passes.settings import PassSettings
from entropy_core.sketch import ModuleSketch
from entropy_experiments.run.self_checks import SelfCheck


def sketch_rows(
    model: nn.Module,
    batch: SequenceBatch,
    objectives: Sequence[TokenCoefficients],
    sketch: ModuleSketch,
    preconditioner: Mapping[str, Tensor] | None,
    steps: Mapping[str, Tensor] | None,
    passes: PassSettings,
) -> tuple[Tensor, Tensor]:
    """(objectives, N, size) sketches of rows times sqrt(P), and (objectives, N, n_steps) exact products of rows and steps."""
    count = 0 if steps is None else len(next(iter(steps.values())))
    sketched = torch.zeros((len(objectives), len(batch), sketch.size), device=batch.device)
    products = torch.zeros((len(objectives), len(batch), count), device=batch.device)

    def add(number: int, name: str, indices: Tensor, rows: Tensor) -> None:
        rows = rows.float()
        if steps is not None:
            found = rows.flatten(1) @ steps[name].flatten(1).float().T
            products[number].index_add_(0, indices.to(batch.device), found.to(batch.device))
        weighted = rows if preconditioner is None else rows * preconditioner[name].sqrt()
        part = torch.zeros((len(rows), sketch.size), device=rows.device)
        sketch.add(part, name, weighted)
        sketched[number].index_add_(0, indices.to(batch.device), part.to(batch.device))

    def restart() -> None:
        sketched.zero_()
        products.zero_()

    stream_rows(model, batch, objectives, add, passes, restart)
    return sketched, products


def check_sketch(found: Tensor, exact: Tensor) -> SelfCheck:
    """A tile of the sketched kernel against the same entries computed exactly."""
    error = float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))
    return SelfCheck(
        "sketch: error of the kernel", error, 0.25,
        f"{exact.shape[0]} x {exact.shape[1]} entries of the sketched kernel against the exact ones, relative. Large entries "
        "are better than this and small ones worse; a larger projection_dim makes it smaller, as its inverse root.",
        "so that entries a quarter off, in the root mean square, would have passed",
    )  # fmt: skip
