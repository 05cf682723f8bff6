"""The training side of an analysis: one row a sequence, times P, and the step that these sequences cause.

    columns_i = P dS_i            g(w) = -sum_i w_i dS_i

Formed once and kept: the evaluation side streams past them, and the step of any other weights follows from the same columns.
Source: docs/theory/fisher-kernel.md, docs/theory/adamw-step.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from entropy_core.adamw import preconditioner, read_adamw_state
from entropy_core.batch import SequenceBatch
from entropy_core.gradients import per_sequence_gradients, trainable_parameters
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.analysis_numbers import PARTS
from entropy_experiments.kernel_checks import (
    check_gradient,
    check_optimizer,
    check_optimizer_entries,
    check_unseen_parameters,
)
from entropy_experiments.optimizer_step import NextStep, clip_coefficient, plain_gradient_step, take_next_step
from entropy_experiments.self_checks import SelfCheck
from rl_training.errors import UserError


@dataclass(frozen=True)
class TrainingSide:
    """Training sequences as columns of the kernel.

    columns: name -> (n_train, *shape) rows dS_i times `preconditioner` (None: P = 1). weights: (n_train,), or None where
    there is no step; gradient then is that of equal weights 1/n. step: AdamW's, or name -> tensor of the plain gradient
    step, or None. max_grad_norm, learning_rate: what the step was taken with (learning_rate None: the optimizer's own).
    """

    batch: SequenceBatch
    statistics: TokenStatistics
    columns: dict[str, Tensor]
    preconditioner: dict[str, Tensor] | None
    weights: Tensor | None
    gradient: dict[str, Tensor]
    step: NextStep | dict[str, Tensor] | None
    clip: float | None
    gradient_norm: float | None
    max_grad_norm: float | None
    learning_rate: float | None
    checks: list[SelfCheck]

    @property
    def adam_step(self) -> NextStep | None:
        """The step, where AdamW took it."""
        return self.step if isinstance(self.step, NextStep) else None

    @property
    def taken(self) -> dict[str, Tensor]:
        """theta_after - theta_before."""
        if self.step is None:
            raise ValueError("columns without weights make no step")
        return self.step.taken if isinstance(self.step, NextStep) else self.step

    @property
    def push(self) -> Tensor:
        """(n_train,) weights of `gradient`: the loss's own, or equal ones."""
        n = len(self.batch)
        return torch.full((n,), 1 / n, dtype=torch.float64) if self.weights is None else self.weights

    def step_parts(self) -> dict[str, dict[str, Tensor]]:
        """The step and its parts, by the names in PARTS; empty without a step."""
        if self.step is None:
            return {}
        if isinstance(self.step, NextStep):
            u = self.step.update
            return dict(zip(PARTS, (self.step.taken, u.batch, u.momentum, u.weight_decay), strict=True))
        nothing = {name: torch.zeros_like(d) for name, d in self.step.items()}
        return dict(zip(PARTS, (self.step, self.step, nothing, nothing), strict=True))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter in the step."""
        if self.adam_step is not None:
            return {name: state.lr for name, state in self.adam_step.state.items()}
        return dict.fromkeys(self.columns, self.learning_rate or 0.0)

    def plain_step(self) -> dict[str, Tensor]:
        """-lr c g: what the step would be without P and momentum."""
        clip, rates = self.clip or 0.0, self.rates()
        return {name: -rates[name] * clip * g for name, g in self.gradient.items()}

    def weighted_gradient(self, weights: Tensor) -> dict[str, Tensor]:
        """-sum_i w_i dS_i for other (n_train,) weights, name -> tensor."""
        return weighted_gradient(self.columns, weights, self.preconditioner)


def weighted_gradient(
    columns: Mapping[str, Tensor], weights: Tensor, kernel_preconditioner: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """-sum_i w_i dS_i from (n_train, *shape) columns, which hold kernel_preconditioner as a factor."""
    out = {}
    for name, rows in columns.items():
        total = -torch.einsum("n,n...->...", weights.to(rows), rows)
        out[name] = total if kernel_preconditioner is None else total / kernel_preconditioner[name]
    return out


def prepare_training_side(
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    batch: SequenceBatch,
    weights: Tensor | None,
    *,
    preconditioning: str,
    max_grad_norm: float | None,
    learning_rate: float | None,
    names_recorded: bool,
    token_batch_size: int,
) -> TrainingSide:
    """Rows, P and the step; model and optimizer are as before when it returns. Arguments as in `analyze_batches`.

    Raises UserError for a missing optimizer or learning rate, a P that needs a step where there are no weights, rows that do
    not fit into memory; ValueError where rows cannot be formed.
    """
    if preconditioning == "none":
        optimizer = None
    elif optimizer is None:
        raise UserError(
            "the checkpoint has no optimizer state: set entropy_analysis.fisher_kernel.preconditioning=none"
        )
    if weights is None and preconditioning == "step":
        raise UserError(
            "fisher_kernel.preconditioning=step takes P from a step, but the training sequences have neither weights nor "
            "rewards: give them, or set preconditioning=checkpoint"
        )
    parameters = trainable_parameters(model)
    _require_memory(parameters, len(batch))
    columns = per_sequence_gradients(model, batch, token_batch_size=token_batch_size)
    used = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64) if weights is None else weights
    gradient = weighted_gradient(columns, used)
    checks = [check_gradient(model, batch, used, gradient, token_batch_size)]
    step, clip, norm = None, None, None
    if weights is not None:
        step, clip, norm = _take_step(model, optimizer, gradient, max_grad_norm, learning_rate)
    p = None
    if optimizer is not None:
        state = step.state if isinstance(step, NextStep) else read_adamw_state(optimizer, parameters)
        if isinstance(step, NextStep):
            checks.extend(check_optimizer(step, gradient, names_recorded))
        else:  # the squares of rows have the profile of second moments too
            root_mean_square = {name: rows.square().mean(0).sqrt() for name, rows in columns.items()}
            checks.append(check_optimizer_entries(state, root_mean_square, names_recorded))
        at_checkpoint = preconditioning == "checkpoint"
        p = step.preconditioner if isinstance(step, NextStep) else {}
        if at_checkpoint:
            p = {name: preconditioner(s) for name, s in state.items()}
        for name, rows in columns.items():
            rows.mul_(p[name])
        if at_checkpoint:
            checks.append(check_unseen_parameters(state, columns, p))
    statistics = token_statistics(model, batch, token_batch_size)
    return TrainingSide(
        batch, statistics, columns, p, weights, gradient, step, clip, norm, max_grad_norm, learning_rate, checks
    )


def _take_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    gradient: dict[str, Tensor],
    max_grad_norm: float | None,
    learning_rate: float | None,
) -> tuple[NextStep | dict[str, Tensor], float, float]:
    if optimizer is not None:
        step = take_next_step(model, optimizer, gradient, max_grad_norm, learning_rate)
        return step, step.clip, step.gradient_norm
    if not learning_rate:
        raise UserError("without optimizer state the step's size is unknown: give checkpoint.learning_rate=...")
    clip, norm = clip_coefficient(gradient, max_grad_norm)
    return plain_gradient_step(gradient, learning_rate, clip), clip, norm


def _require_memory(parameters: dict[str, nn.Parameter], sequences: int) -> None:
    """Raises UserError where the rows of the training side would not fit into the free memory of the machine."""
    needed = sequences * sum(p.numel() * p.element_size() for p in parameters.values())
    free = _free_memory(next(iter(parameters.values())).device)
    if needed > free:
        count = sum(p.numel() for p in parameters.values())
        raise UserError(
            f"the gradients of {sequences} training sequences over {count:,} parameters need {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free: lower entropy_analysis.train_batch_size, or train fewer parameters (LoRA)"
        )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # what can be had without swapping: memory that only caches files counts, which "free" pages would leave out
    return psutil.virtual_memory().available
