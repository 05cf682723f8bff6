"""The training side of an analysis: its rows, P, and the step that these sequences cause.

    g(w) = -sum_i w_i dS_i

Where all rows are kept they are formed once: the evaluation side streams past them, and the step of any other weights follows
from them. Otherwise (entropy_experiments.kernel.plan) gradients of weighted sums come from a backward pass. Rows stay as they
are: P stands in the kernel's products.
Source: docs/theory/fisher-kernel.md, docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState, Moments, read_adamw_state
from entropy_core.batch import SequenceBatch
from entropy_core.formed import Formed
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.forward import masks_padding
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from entropy_experiments.checkpoints.missing_entries import checkpoint_preconditioner
from entropy_experiments.kernel.engine import Kernel, KernelEngine
from entropy_experiments.kernel.strategy import TrainingRows as KernelRows
from entropy_experiments.run.self_checks import SelfCheck
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows, TrainingRows
from entropy_experiments.step.kernel_checks import (
    check_gradient,
    check_optimizer,
    check_optimizer_entries,
    check_unseen_parameters,
    mean_squares,
)
from entropy_experiments.step.optimizer_step import AnalysedStep, NextStep, plain_step, take_next_step
from entropy_experiments.step.padding_embeddings import hold_unmoved_padding
from entropy_experiments.step.settings import AnalysisSettings
from rl_training.errors import UserError


@dataclass(frozen=True)
class TrainingSide:
    """Training sequences as columns of the kernel.

    kernel: rows dS_i over the parameters of filter_modules, under P. rows: over all trainable parameters, as the trainer's loss
    has them; true_rows: as the kernel has them (they differ where the embedding of a padding token is trained, and with DoRA).
    weights: (n_train,), or None where there is no step; gradient then is that of equal weights 1/n. max_grad_norm, learning_rate:
    what the step was taken with (learning_rate None: the optimizer's own).
    """

    batch: SequenceBatch
    statistics: TokenStatistics
    kernel: Kernel
    rows: TrainingRows
    true_rows: TrainingRows
    weights: Tensor | None
    gradient: dict[str, Tensor]
    step: AnalysedStep | None
    max_grad_norm: float | None
    learning_rate: float | None
    checks: list[SelfCheck]

    @property
    def kernel_preconditioner(self) -> Mapping[str, Tensor] | None:
        """The kernel's P, name -> tensor; None: P = 1."""
        return self.kernel.preconditioner

    def under_p(self, vector: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """P times a vector, formed when it is read."""
        p = self.kernel_preconditioner
        return vector if p is None else Formed(vector, lambda name: p[name] * vector[name])

    @property
    def adam_step(self) -> NextStep | None:
        """The step, where AdamW took it."""
        return self.step if isinstance(self.step, NextStep) else None

    @property
    def effective_weights(self) -> Tensor:
        """(n_train,) weights of `gradient`: the loss's own, or equal ones."""
        n = len(self.batch)
        return torch.full((n,), 1 / n, dtype=torch.float64) if self.weights is None else self.weights

    @property
    def true_gradient(self) -> dict[str, Tensor]:
        """`gradient` of the kernel's own rows."""
        return (
            self.gradient if self.rows is self.true_rows else self.true_rows.weighted_gradient(self.effective_weights)
        )

    @property
    def known_step(self) -> AnalysedStep:
        """`step`. Raises ValueError where there is none."""
        if self.step is None:
            raise ValueError("columns without weights make no step")
        return self.step

    def step_vectors(self) -> dict[str, Mapping[str, Tensor]]:
        """The step, its parts and what it would be without P and momentum, by the names in STEP_VECTORS; there must be one."""
        rates, clip = self.known_step.rates(), self.known_step.clip
        plain = Formed(self.gradient, lambda name: -rates[name] * clip * self.gradient[name])
        return {**self.known_step.parts(), "without_preconditioner": plain}


def prepare_training_side(
    model: nn.Module,
    optimizer: Moments | None,
    batch: SequenceBatch,
    weights: Tensor | None,
    settings: AnalysisSettings,
    engine: KernelEngine,
) -> TrainingSide:
    """Rows, P and the step; model and optimizer are as before when it returns. Arguments as in `analyze_batches`.

    Args:
        weights: (n_train,) w_i of the loss; None: no step.
        engine: of this model and batch.

    Raises:
        UserError: for a missing optimizer or learning rate, and for a P that needs a step where there are no weights.
        ValueError: where rows cannot be formed.
    """
    optimizer, passes = _asked_of(optimizer, weights, settings.preconditioning), settings.passes
    formed = engine.prepare()
    used = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64) if weights is None else weights
    masked = masks_padding(model) or PassState.of(model).stops_gradients
    kept = None if formed.columns is None or engine.setup.passes.restricted else KeptRows(formed.columns)
    rows, true_rows, shared = _rows(model, batch, passes, engine.setup.processes, kept, masked)
    gradient = shared.weighted_gradient(used)
    checks, sample = [], None
    if formed.forms_rows:
        sample, check = _first_rows(model, batch, formed, used, passes)
        checks.append(check)
    step = None if weights is None else _step(model, optimizer, gradient, settings)
    p: Mapping[str, Tensor] | None = None
    if optimizer is not None:
        taken = step if isinstance(step, NextStep) else None
        state = read_adamw_state(optimizer, trainable_parameters(model)) if taken is None else taken.state
        if taken is not None:
            checks.extend(check_optimizer(taken, gradient, settings.optimizer_record))
        elif sample is not None:
            checks.append(_check_second_moments(sample, state, settings))
        if sample is not None:  # P is the kernel's alone
            p = formed.held(preconditioner_of(model, settings.preconditioning, taken, state, gradient))
            if settings.preconditioning == "checkpoint":
                checks.append(check_unseen_parameters(state, sample, p))
    return TrainingSide(
        batch, engine.statistics(batch), Kernel(formed, p), rows, true_rows, weights, gradient, step,
        settings.max_grad_norm, settings.learning_rate, checks,
    )  # fmt: skip


def _step(
    model: nn.Module, optimizer: Moments | None, gradient: dict[str, Tensor], settings: AnalysisSettings
) -> AnalysedStep:
    lengths = settings.max_grad_norm, settings.learning_rate
    if optimizer is None:
        return plain_step(gradient, *lengths)
    return take_next_step(model, optimizer, gradient, *lengths)


def _asked_of(optimizer: Moments | None, weights: Tensor | None, preconditioning: str) -> Moments | None:
    """The optimizer where P or a step is made of it. Raises UserError where it, or the weights, are missing."""
    if preconditioning == "none":
        return None
    if optimizer is None:
        raise UserError(
            "the checkpoint has no optimizer state: set entropy_analysis.fisher_kernel.preconditioning=none"
        )
    if weights is None and preconditioning == "step":
        raise UserError(
            "fisher_kernel.preconditioning=step takes P from a step, but the training sequences have neither weights nor "
            "rewards: give them, or set preconditioning=checkpoint"
        )
    return optimizer


def _rows(
    model: nn.Module,
    batch: SequenceBatch,
    passes: PassSettings,
    processes: Processes,
    kept: KeptRows | None,
    masked: bool,
) -> tuple[TrainingRows, TrainingRows, TrainingRows]:
    """Rows as the trainer has them, as they are, and as the trainer has them with the work shared by all processes.

    Kept rows are true derivatives: not what the trainer's step is made of where torch masks a padding token's embedding, or a
    module stops gradients. What is asked of the first two later, one process asks alone.
    """
    true_rows = kept or RecomputedRows(model, batch, passes, as_trained=False)
    rows = RecomputedRows(model, batch, passes) if masked else true_rows
    shared = RecomputedRows(model, batch, passes, processes) if masked or kept is None else kept
    return rows, true_rows, shared


def _first_rows(
    model: nn.Module, batch: SequenceBatch, formed: KernelRows, weights: Tensor, passes: PassSettings
) -> tuple[Mapping[str, Tensor], SelfCheck]:
    """Some rows, and whether they add up to a gradient."""
    span, sample = formed.sample()
    some = weights[span.start : span.stop]
    part = KeptRows(sample).weighted_gradient(some)
    return sample, check_gradient(model, batch.select(list(span)), some, part, passes)


def _check_second_moments(
    sample: Mapping[str, Tensor], state: Mapping[str, AdamWParameterState], settings: AnalysisSettings
) -> SelfCheck:
    """The squares of rows have the profile of second moments too."""
    root_mean_square = Formed(sample, lambda name: mean_squares(sample[name]).sqrt().to(sample[name]))
    return check_optimizer_entries(
        Formed(sample, lambda name: state[name]), root_mean_square, settings.optimizer_record
    )


def preconditioner_of(
    model: nn.Module,
    preconditioning: str,
    step: AnalysedStep | None,
    state: Mapping[str, AdamWParameterState],
    gradient: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Name -> the kernel's P, formed when it is read.

    Args:
        preconditioning: of the configuration, not "none".
        state: the moments before the step.
        gradient: of the loss.

    Raises:
        UserError: where P at the checkpoint is not defined for a parameter.
    """
    if preconditioning == "step" and isinstance(step, NextStep):
        p = step.step_preconditioner
    else:
        p = checkpoint_preconditioner(state, gradient)
    masked = masks_padding(model) or PassState.of(model).stops_gradients
    return hold_unmoved_padding(model, state, p) if masked else p
