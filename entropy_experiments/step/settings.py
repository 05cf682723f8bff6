"""The settings of one analysis of two batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.checkpoints.optimizer_names import OptimizerRecord
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.statistics.estimand import POLICY, Estimand

Preconditioning = Literal["checkpoint", "step", "none"]

_CLIPPED_AT = 1.0
"""The Trainer's default."""


@dataclass(frozen=True)
class AnalysisSettings:
    """What `analyze_batches` does.

    estimand: which entropy it is about; `Estimand.of(rows_drawn)`. preconditioning: the kernel's P, "checkpoint" (from the
    moments in the optimizer), "step" (from those of the analysed step, which hold its gradient already) or "none" (P = 1, and the
    step is -lr g). learning_rate: needed without an optimizer; overrides every group's with one. optimizer_record: what the
    checkpoint's own record says of the optimizer's entries. step_scales: multiples of the step at which the change is measured
    (1 is always among them), where `measure`. compute_full: whether kernels are wanted. passes: how batches pass
    through the model. kernel: budgets, modules, where finished blocks go, and the processes that share the work.
    """

    estimand: Estimand = POLICY
    preconditioning: Preconditioning = "checkpoint"
    max_grad_norm: float | None = 1.0
    learning_rate: float | None = None
    step_scales: tuple[float, ...] = (1.0,)
    compute_full: bool = True
    measure: bool = True
    optimizer_record: OptimizerRecord = "names"
    passes: PassSettings = DEFAULT_PASSES
    kernel: KernelOptions = field(default_factory=KernelOptions)


def settings_of(checkpoint: Checkpoint, config: FisherAnalysisConfig, kernel: KernelOptions) -> AnalysisSettings:
    """What the configuration says, and where it says nothing the checkpoint's own record."""
    analysis, record = config.entropy_analysis, checkpoint.record
    norm = record.sidecar.algorithm.max_grad_norm if record.sidecar else _CLIPPED_AT
    if record.sidecar is None and config.checkpoint.max_grad_norm is None:
        warnings.warn(
            f"{record.path} does not say where its gradients were clipped: {_CLIPPED_AT:g}, the Trainer's default, is "
            "taken; give checkpoint.max_grad_norm (a large number where they were not)",
            stacklevel=2,
        )
    rates = record.learning_rates
    return AnalysisSettings(
        estimand=Estimand.of(analysis.sampling.rows_are_drawn),
        preconditioning=analysis.fisher_kernel.preconditioning,
        max_grad_norm=config.checkpoint.max_grad_norm or norm,
        # an optimizer's groups hold their rates
        learning_rate=rates[0] if checkpoint.optimizer is None and rates else None,
        step_scales=analysis.analysis.step_scales,
        compute_full=analysis.fisher_kernel.compute_full,
        measure=analysis.analysis.entropy_prediction,
        optimizer_record=record.optimizer_record,
        passes=PassSettings(analysis.fisher_kernel.token_batch_size),
        kernel=kernel,
    )
