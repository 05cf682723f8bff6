"""Kernels from random projections of both sides' rows (entropy_core.sketch): steps multiplied exactly, the error measured.

With P rows are multiplied by sqrt(P) before they are projected, so that it stands in the product once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, pass_order
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.kernel import products
from entropy_experiments.kernel.contraction import Wanted
from entropy_experiments.kernel.strategy import KernelSetup, Piece, Preconditioner, TrainingRows
from entropy_experiments.run.self_checks import SelfCheck


class Sketched(TrainingRows):
    """Keeps projections of the training rows, once P is known. `setup` has a sketch."""

    def __init__(self, setup: KernelSetup) -> None:
        super().__init__(setup)
        assert setup.sketch is not None
        self._sketch = setup.sketch

    def _cut(self, p: Preconditioner) -> Callable[[Wanted], list[Piece]]:
        roots = None if p is None else {name: p[name].sqrt() for name in self.setup.passes.names}
        columns = self._training_sketches(roots)

        def pieces(wanted: Wanted) -> list[Piece]:
            def block(batch: SequenceBatch, objectives: Sequence[TokenCoefficients]) -> Tensor:
                rows, with_steps = self._sketches(batch, objectives, roots, wanted)
                return torch.cat([rows @ columns.T, with_steps], 2)

            width = len(columns) + sum(one.count for one in wanted.step_columns)
            return [Piece(width, lambda: block)]

        return pieces

    def _training_sketches(self, roots: Preconditioner) -> Tensor:
        """(n_train, size) in every process, each chunk made by one."""
        batch, processes = self.setup.batch, self.setup.processes
        out = torch.zeros((len(batch), self._sketch.size), device=batch.device)
        chunks = pass_order(batch).split(self.setup.plan.chunk)
        for number in processes.mine(range(len(chunks))):
            part = batch.select(chunks[number])
            out[chunks[number]] = self._sketches(part, [score_coefficients(part)], roots, Wanted(("score",)))[0][0]
        return processes.sum(out)

    def _sketches(
        self, batch: SequenceBatch, objectives: Sequence[TokenCoefficients], roots: Preconditioner, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """(objectives, N, size) sketches of rows times sqrt(P), and (objectives, N, n_steps) exact products with the steps."""
        count = sum(one.count for one in wanted.step_columns)
        sketched = torch.zeros((len(objectives), len(batch), self._sketch.size), device=batch.device)
        with_steps = torch.zeros((len(objectives), len(batch), count), device=batch.device)

        def add(number: int, name: str, indices: Tensor, rows: Tensor) -> None:
            rows, at = rows.float(), indices.to(batch.device)
            for steps in wanted.step_columns:
                with_steps[number].index_add_(0, at, products(rows, steps.vectors[name].float()).to(batch.device))
            part = torch.zeros((len(rows), self._sketch.size), device=rows.device)
            self._sketch.add(part, name, rows if roots is None else rows * roots[name])
            sketched[number].index_add_(0, at, part.to(batch.device))

        def restart() -> None:
            sketched.zero_()
            with_steps.zero_()

        self.setup.passes.stream(batch, objectives, add, restart)
        return sketched, with_steps


def check_sketch(found: Tensor, exact: Tensor) -> SelfCheck:
    """A tile of the sketched kernel against the same entries computed exactly."""
    error = float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))
    return SelfCheck(
        "sketch: error of the kernel", error, 0.25,
        f"{exact.shape[0]} x {exact.shape[1]} entries of the sketched kernel against the exact ones, relative. Large entries "
        "are better than this and small ones worse; a larger projection_dim makes it smaller, as its inverse root.",
        "so that entries a quarter off, in the root mean square, would have passed",
    )  # fmt: skip
