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

import torch
from torch import Tensor, nn

from entropy_core.adamw import batch_step_factor, preconditioner
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import batch_gradients, dot, per_sequence_gradients, trainable_parameters
from entropy_core.kernel import compute_cross_fisher_kernel, contract_rows
from entropy_core.measurement import EntropyMeasurement, fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import jackknife_over_prompts
from entropy_experiments.optimizer_mapping import mapping_evidence
from entropy_experiments.optimizer_step import NextStep, clip_coefficient, moved, plain_gradient_step, take_next_step
from entropy_experiments.self_checks import SelfCheck, relative_error, relative_error_of_dicts, surprisal_z_score
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
    nats per token, under the P named by `preconditioning`. contributions: (n_eval,) each evaluation sequence's part of the
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
    batch_change_with_checkpoint_p: float = 0.0
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
    token_batch_size: int = 2048,
    stage: Stage = lambda name: None,
) -> AnalysisNumbers:
    """Run one analysis; the model and the optimizer are as before when it returns.

    weights: (n_train,) w_i of the loss, g = -sum_i w_i dS_i. preconditioning: "checkpoint" (P from `optimizer`) or "none"
    (P = 1, and the step is -lr g). learning_rate: needed without an optimizer.

    Raises UserError for a missing optimizer or learning rate, ValueError where rows cannot be formed.
    """
    with_adam = preconditioning == "checkpoint"
    if with_adam and optimizer is None:
        raise UserError(
            "the checkpoint has no optimizer state: set entropy_analysis.fisher_kernel.preconditioning=none"
        )
    parameters = trainable_parameters(model)
    stage("token statistics")
    numbers = AnalysisNumbers(
        eval_statistics=token_statistics(model, eval_batch, token_batch_size),
        train_statistics=token_statistics(model, train_batch, token_batch_size),
    )
    stage("training gradients, one row per sequence")
    columns = per_sequence_gradients(model, train_batch, token_batch_size=token_batch_size)
    gradient = {name: -torch.einsum("n,n...->...", weights.to(rows), rows) for name, rows in columns.items()}
    numbers.checks.append(_check_gradient(model, train_batch, weights, gradient, token_batch_size))
    step = _next_step(model, optimizer if with_adam else None, gradient, max_grad_norm, learning_rate, numbers)
    if isinstance(step, NextStep):
        p = {name: preconditioner(s) for name, s in step.state.items()}
        numbers.checks.extend(_check_optimizer(step, gradient))
    else:
        p = None
    if p is not None:
        for name, rows in columns.items():
            rows.mul_(p[name])
    taken, parts = _step_parts(step)
    stage("evaluation gradients and kernels")
    _contract(model, eval_batch, columns, parts, numbers, compute_full, token_batch_size)
    _attribute(model, eval_batch, columns, weights, step, gradient, p, numbers, learning_rate, token_batch_size)
    stage("checking the kernel against finite differences")
    numbers.checks.extend(
        _check_kernel(model, eval_batch, train_batch, gradient, weights, p, numbers, token_batch_size)
    )
    z = surprisal_z_score(numbers.eval_statistics.scores(), numbers.eval_statistics.entropy_sums())
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
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        step = take_next_step(model, optimizer, gradient, max_grad_norm)
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
    first = next(iter(columns.values())).shape[0] if compute_full else 0
    wide = {
        name: torch.cat([columns[name][:first], torch.stack([parts[part][name] for part in PARTS])]) for name in columns
    }
    score_rows, entropy_only_rows, *own = (
        m.double() for m in contract_rows(model, batch, objectives, wide, None, token_batch_size)
    )
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


def _mean_with_error(contributions: Tensor, prompt_index: Tensor) -> Estimate:
    return Estimate(float(contributions.mean()), jackknife_over_prompts(contributions, prompt_index))


def _attribute(
    model: nn.Module,
    batch: SequenceBatch,
    columns: dict[str, Tensor],
    weights: Tensor,
    step: NextStep | dict[str, Tensor],
    gradient: dict[str, Tensor],
    p: dict[str, Tensor] | None,
    numbers: AnalysisNumbers,
    learning_rate: float | None,
    token_batch_size: int,
) -> None:
    """dH_i = sum over parameters of lr (1 - beta1)/(1 - beta1^t) c w_i <grad h, P dS_i>, with the group's own factors."""
    coefficients = entropy_coefficients(numbers.eval_statistics, batch).scaled(1.0 / len(batch))
    grad_h = batch_gradients(model, batch, [coefficients], token_batch_size)[0]
    if isinstance(step, NextStep):
        factors = {name: batch_step_factor(s) for name, s in step.state.items()}
        numbers.horizon_factor = _horizon_factor(step)
    else:
        factors = dict.fromkeys(columns, float(learning_rate or 0.0))
    inner = torch.zeros(len(weights), dtype=torch.float64)
    plain_inner = torch.zeros_like(inner)
    for name, rows in columns.items():
        products = (rows.flatten(1) @ grad_h[name].flatten()).double().cpu()
        plain_inner += products
        inner += factors[name] * products
    numbers.shares = numbers.clip * weights.double().cpu() * inner
    direction = {
        name: -factors[name] * numbers.clip * (gradient[name] if p is None else p[name] * gradient[name])
        for name in columns
    }
    numbers.batch_change_with_checkpoint_p = dot(grad_h, direction)
    total = numbers.batch_change_with_checkpoint_p
    scale = max(abs(total), float(numbers.shares.abs().max()), 1e-12)
    numbers.checks.append(
        SelfCheck(
            "attribution: shares add up", abs(float(numbers.shares.sum()) - total) / scale, 1e-4,
            "sum of all dH_i against <grad h, batch part of the step>, relative. A failure means that weights, clipping or "
            "normalisers differ between rows and loss.",
        )
    )  # fmt: skip
    if numbers.entropy_fisher is not None:
        numbers.checks.append(
            SelfCheck(
                "entropy kernel = autograd", relative_error(numbers.entropy_fisher.double().mean(0).cpu(), plain_inner), 1e-4,
                "mean over evaluation sequences of K_H against <grad h, P dS_i> from autograd's gradient of h, relative.",
            )
        )  # fmt: skip


def _horizon_factor(step: NextStep) -> float:
    """sum_j beta1^j (1 - beta1^t)/(1 - beta1^(t+j)): a batch's change over the life of the momentum, relative to this step."""
    state = next(iter(step.state.values()))
    t, beta = state.step + 1, state.beta1
    return sum(beta**j * (1 - beta**t) / (1 - beta ** (t + j)) for j in range(1000))


def _check_gradient(
    model: nn.Module, batch: SequenceBatch, weights: Tensor, gradient: dict[str, Tensor], token_batch_size: int
) -> SelfCheck:
    autograd = batch_gradients(model, batch, [score_coefficients(batch, -weights.to(batch.device))], token_batch_size)[
        0
    ]
    return SelfCheck(
        "rows = autograd", relative_error_of_dicts(gradient, autograd), 1e-4,
        "the weighted sum of per-sequence gradients against autograd's gradient of the loss, over all trainable parameters, "
        "relative. A failure means that some parameter's rows are missing or wrong.",
    )  # fmt: skip


def _check_optimizer(step: NextStep, gradient: dict[str, Tensor]) -> list[SelfCheck]:
    evidence = mapping_evidence(step.state, gradient)
    worst = "" if evidence.worst is None else f" The least convincing is {evidence.worst!r}."
    if not evidence.convincing:
        raise UserError(
            f"only {evidence.share:.0%} of {evidence.compared} parameters resemble their optimizer state more "
            f"than that of another parameter of the same shape (e.g. {evidence.worst!r}): the optimizer's entries are "
            "in another order than the model's parameters, so P would be wrong; nothing is analysed"
        )
    return [
        SelfCheck(
            "AdamW split = optimizer's step", relative_error_of_dicts(step.update.total(), step.taken), 1e-3,
            "batch + momentum + decay against the step that torch.optim.AdamW takes, relative; float32 parameters round the "
            "step that is taken.",
        ),
        SelfCheck(
            "optimizer entries recognised", 1.0 - evidence.share, 0.4,
            f"share of {evidence.compared} parameters whose second moments resemble the gradients of a sibling of the same shape "
            f"more than their own.{worst}",
        ),
    ]  # fmt: skip


def _check_kernel(
    model: nn.Module,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    gradient: dict[str, Tensor],
    weights: Tensor,
    p: dict[str, Tensor] | None,
    numbers: AnalysisNumbers,
    token_batch_size: int,
) -> list[SelfCheck]:
    if numbers.fisher is None:
        return []
    direction = {name: -g if p is None else -p[name] * g for name, g in gradient.items()}
    sample = torch.arange(min(16, len(eval_batch)))
    eval_batch = eval_batch.select(sample)
    product = numbers.fisher[sample].double() @ weights.double().to(numbers.fisher.device)
    size = float(product.abs().max())
    if size == 0.0:
        return []
    epsilon = 0.05 / size  # the fastest score moves by 0.05 nats: well above rounding, well below curvature
    with moved(model, direction, epsilon):
        plus = token_statistics(model, eval_batch, token_batch_size).scores()
    with moved(model, direction, -epsilon):
        minus = token_statistics(model, eval_batch, token_batch_size).scores()
    few = train_batch.select(range(min(6, len(train_batch))))
    square = compute_cross_fisher_kernel(model, few, few, p, token_batch_size).double()
    eigenvalues = torch.linalg.eigvalsh((square + square.T) / 2)
    return [
        SelfCheck(
            "K w = finite difference", relative_error((plus - minus) / (2 * epsilon), product), 0.02,
            "K1 times the weights against a central difference of 16 sequences' scores along P g, relative. A "
            "failure means P is missing, doubled, or on both sides.",
        ),
        SelfCheck(
            "K symmetric and PSD on equal batches",
            max(relative_error(square, square.T), float(-eigenvalues[0] / eigenvalues[-1].clamp(min=1e-30))), 1e-4,
            "asymmetry, and the most negative eigenvalue relative to the largest, of a kernel of six sequences with themselves.",
        ),
    ]  # fmt: skip


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
