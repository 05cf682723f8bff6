"""The numbers of one analysis: kernels, predictions with standard errors, measurements, shares, and self-checks.

Training rows dS_i are formed once, multiplied by P (one side only) and stored; the parts of the next AdamW step stand
beside them as four more columns. One forward pass over the evaluation buffer then contracts every estimator's rows E_t with
all columns at once: kernels from the first, each sequence's contribution to every prediction from the last. Means over
evaluation sequences are predictions, a jackknife over their prompts gives the standard errors.

Source: docs/theory/fisher-kernel.md, docs/theory/adamw-step.md, docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import psutil
import torch
from torch import Tensor, nn

from entropy_core.adamw import preconditioner
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import dot, entropy_gradient, per_sequence_gradients, trainable_parameters
from entropy_core.kernel import contract_rows
from entropy_core.measurement import EntropyMeasurement, fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_over_prompts
from entropy_experiments.attribution import attribute
from entropy_experiments.kernel_checks import (
    check_attribution,
    check_gradient,
    check_kernel,
    check_optimizer,
    check_unseen_parameters,
)
from entropy_experiments.optimizer_step import NextStep, clip_coefficient, moved, plain_gradient_step, take_next_step
from entropy_experiments.self_checks import SelfCheck, surprisal_z_score
from rl_training.errors import UserError

Stage = Callable[[str], None]
PARTS = ("total", "batch", "momentum", "weight_decay")


@dataclass(frozen=True)
class Estimate:
    """A value with the standard error of it (not the spread of its summands)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class MeasuredScale:
    """Measured changes at `scale` times the step, on the evaluation tokens."""

    scale: float
    snis: EntropyMeasurement
    fixed_prefix: EntropyMeasurement


@dataclass
class AnalysisNumbers:
    """Everything computed. Kernels are (n_eval, n_train) float32; shares and weights (n_train,) float64.

    predicted[estimator][part]: nats per token, predicted_per_completion: nats per completion. shares: dH_i of this step,
    nats per token, adding up to batch_change. contributions: (n_eval,) each evaluation sequence's part of the
    Rao-Blackwell total.
    """

    eval_statistics: TokenStatistics
    train_statistics: TokenStatistics
    fisher: Tensor | None = None
    entropy_fisher: Tensor | None = None
    predicted: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    predicted_per_completion: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    contributions: Tensor | None = None
    shares: Tensor | None = None
    horizon_factor: float = 1.0
    batch_change: float = 0.0
    measured: list[MeasuredScale] = field(default_factory=list)
    gradient_norm: float = 0.0
    clip: float = 1.0
    checks: list[SelfCheck] = field(default_factory=list)


def analyze_batches(
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    weights: Tensor,
    *,
    preconditioning: str = "checkpoint",
    max_grad_norm: float | None = 1.0,
    learning_rate: float | None = None,
    step_scales: tuple[float, ...] = (1.0,),
    compute_full: bool = True,
    measure: bool = True,
    names_recorded: bool = True,
    token_batch_size: int = 2048,
    stage: Stage = lambda name: None,
) -> AnalysisNumbers:
    """Run one analysis; the model and the optimizer are as before when it returns.

    weights: (n_train,) w_i of the loss, g = -sum_i w_i dS_i. preconditioning: the kernel's P, "checkpoint" (from the moments
    in `optimizer`), "step" (from those of the analysed step, which hold its gradient already) or "none" (P = 1, and the step
    is -lr g). learning_rate: needed without an optimizer; overrides every group's with one. names_recorded: whether the
    optimizer's names come from the checkpoint's own record rather than from rebuilding.

    Raises UserError for a missing optimizer or learning rate, ValueError where rows cannot be formed.
    """
    with_adam = preconditioning != "none"
    if with_adam and optimizer is None:
        raise UserError(
            "the checkpoint has no optimizer state: set entropy_analysis.fisher_kernel.preconditioning=none"
        )
    parameters = trainable_parameters(model)
    stage("token statistics")
    numbers = AnalysisNumbers(
        eval_statistics=token_statistics(model, eval_batch, token_batch_size, with_variances=True),
        train_statistics=token_statistics(model, train_batch, token_batch_size),
    )
    _require_memory(parameters, len(train_batch))
    stage("training gradients, one row per sequence")
    columns = per_sequence_gradients(model, train_batch, token_batch_size=token_batch_size)
    gradient = {name: -torch.einsum("n,n...->...", weights.to(rows), rows) for name, rows in columns.items()}
    numbers.checks.append(check_gradient(model, train_batch, weights, gradient, token_batch_size))
    step = _next_step(model, optimizer if with_adam else None, gradient, max_grad_norm, learning_rate, numbers)
    p: dict[str, Tensor] | None = None
    if isinstance(step, NextStep):
        numbers.checks.extend(check_optimizer(step, gradient, names_recorded))
        at_checkpoint = preconditioning == "checkpoint"
        p = {name: preconditioner(s) for name, s in step.state.items()} if at_checkpoint else step.preconditioner
        for name, rows in columns.items():
            rows.mul_(p[name])
        if at_checkpoint:
            numbers.checks.append(check_unseen_parameters(step, columns, p))
    taken, parts = _step_parts(step)
    stage("evaluation gradients and kernels")
    _contract(model, eval_batch, columns, parts, numbers, compute_full, token_batch_size)
    grad_h = entropy_gradient(model, eval_batch, statistics=numbers.eval_statistics, token_batch_size=token_batch_size)
    adam_step = step if isinstance(step, NextStep) else None
    found = attribute(grad_h, columns, weights, adam_step, p, numbers.clip, learning_rate or 0.0)
    numbers.shares, numbers.horizon_factor = found.shares, found.horizon_factor
    numbers.batch_change = dot(grad_h, parts["batch"])
    numbers.checks.extend(check_attribution(found, numbers.batch_change, numbers.entropy_fisher))
    stage("checking the kernel against finite differences")
    numbers.checks.extend(
        check_kernel(model, eval_batch, train_batch, gradient, weights, p, numbers.fisher, token_batch_size)
    )
    z = surprisal_z_score(numbers.eval_statistics)
    numbers.checks.append(
        SelfCheck(
            "sampler: surprisal = entropy", z, 4.0,
            "|z| of mean(-S) against mean(sum of H_k) on the evaluation buffer; both estimate H. A large value means that "
            "completions were not drawn from the distribution that is differentiated.",
        )
    )  # fmt: skip
    if measure:
        _measure(model, eval_batch, taken, parameters, step_scales, numbers, token_batch_size, stage)
    return numbers


def _next_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    gradient: dict[str, Tensor],
    max_grad_norm: float | None,
    learning_rate: float | None,
    numbers: AnalysisNumbers,
) -> NextStep | dict[str, Tensor]:
    if optimizer is not None:
        step = take_next_step(model, optimizer, gradient, max_grad_norm, learning_rate)
        numbers.clip, numbers.gradient_norm = step.clip, step.gradient_norm
        return step
    if not learning_rate:
        raise UserError("without optimizer state the step's size is unknown: give checkpoint.learning_rate=...")
    numbers.clip, numbers.gradient_norm = clip_coefficient(gradient, max_grad_norm)
    return plain_gradient_step(gradient, learning_rate, numbers.clip)


def _step_parts(step: NextStep | dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    if isinstance(step, NextStep):
        u = step.update
        return step.taken, {
            "total": step.taken,
            "batch": u.batch,
            "momentum": u.momentum,
            "weight_decay": u.weight_decay,
        }
    nothing = {name: torch.zeros_like(d) for name, d in step.items()}
    return step, {"total": step, "batch": step, "momentum": nothing, "weight_decay": nothing}


def _contract(
    model: nn.Module,
    batch: SequenceBatch,
    columns: dict[str, Tensor],
    parts: dict[str, dict[str, Tensor]],
    numbers: AnalysisNumbers,
    compute_full: bool,
    token_batch_size: int,
) -> None:
    statistics = numbers.eval_statistics
    # Estimators whose coefficients are equal over a sequence's tokens are combinations of two kinds of rows, so that
    # four backward passes serve all estimators and both units.
    objectives = [
        score_coefficients(batch),
        TokenCoefficients(batch.completion_mask.double(), torch.zeros_like(statistics.entropies, dtype=torch.float64)),
        entropy_coefficients(statistics, batch, "rao_blackwell", True),
        entropy_coefficients(statistics, batch, "rao_blackwell", False),
    ]
    step_columns = {name: torch.stack([parts[part][name] for part in PARTS]) for name in columns}
    sets = [columns, step_columns] if compute_full else [step_columns]
    score_rows, entropy_only_rows, *own = (
        m.double() for m in contract_rows(model, batch, objectives, sets, None, token_batch_size)
    )
    first = score_rows.shape[1] - len(PARTS)
    if compute_full:
        numbers.fisher = score_rows[:, :first].float()
        numbers.entropy_fisher = own[0][:, :first].float()
    for per_token, target in ((True, numbers.predicted), (False, numbers.predicted_per_completion)):
        for estimator in get_args(Estimator):
            if estimator == "rao_blackwell":
                matrix = own[0 if per_token else 1]
            else:
                c = entropy_coefficients(statistics, batch, estimator, per_token)
                # equal over the tokens of a sequence: the largest in absolute value is the value
                alpha, gamma = c.entropy.amax(1, keepdim=True), (c.logprob.amax(1) + c.logprob.amin(1))[:, None]
                matrix = alpha * entropy_only_rows + gamma * score_rows
            target[estimator] = {
                part: _mean_with_error(matrix[:, first + k], batch.prompt_index) for k, part in enumerate(PARTS)
            }
    numbers.contributions = own[0][:, first] / len(batch)


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


def _mean_with_error(contributions: Tensor, prompt_index: Tensor) -> Estimate:
    return Estimate(float(contributions.mean()), jackknife_over_prompts(contributions, prompt_index))


def _measure(
    model: nn.Module,
    batch: SequenceBatch,
    taken: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    scales: tuple[float, ...],
    numbers: AnalysisNumbers,
    token_batch_size: int,
    stage: Stage,
) -> None:
    before = numbers.eval_statistics
    for scale in sorted({*scales, 1.0}):
        stage(f"measuring at {scale:g} x the step")
        with moved(model, taken, scale):
            after = token_statistics(model, batch, token_batch_size)
        numbers.measured.append(
            MeasuredScale(
                scale, snis_entropy_change(before, after, batch), fixed_prefix_entropy_change(before, after, batch)
            )
        )
    stage("checking the slope")
    small = 1 / 16
    changes = []
    for sign in (1, -1):
        with moved(model, taken, sign * small):
            changes.append(snis_entropy_change(before, token_statistics(model, batch, token_batch_size), batch).change)
    slope = (changes[0] - changes[1]) / (2 * small)
    split = numbers.predicted["split"]["total"]
    # A float32 forward knows entropies to a few units in the last place, so a slope over 2/16 of a step has a floor.
    floor = 32 * torch.finfo(torch.float32).eps * numbers.measured[0].snis.before / small
    numbers.checks.append(
        SelfCheck(
            "slope of the measurement = its derivative",
            abs(slope - split.value) / max(abs(split.value), split.standard_error, 50 * floor), 0.02,
            "central difference of the reweighted entropy at 1/16 of the step against the split estimator on the same tokens, "
            "relative to the largest of the prediction, its standard error and 50 times the rounding of float32. Pins every "
            "sign and normaliser.",
        )
    )  # fmt: skip
