"""Self-checks of gradients, optimizer state and kernel; each compares two ways of computing one thing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState, whole_states
from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import total_of
from entropy_core.directional import weights_moved
from entropy_core.entropy import score_coefficients
from entropy_core.formed import Formed, whole
from entropy_core.gradients import batch_gradients
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_experiments.checkpoints.exchanged_entries import exchange_refused, exchanged_by_gradients
from entropy_experiments.checkpoints.missing_entries import refuse_missing_entries
from entropy_experiments.checkpoints.optimizer_names import OptimizerRecord, mapping_evidence
from entropy_experiments.kernel.store.records import StorageError
from entropy_experiments.run.self_checks import SelfCheck, relative_error, relative_error_of_dicts
from entropy_experiments.step.optimizer_step import NextStep
from rl_training.errors import UserError

_ROWS_AT_A_TIME = 4
_FINITE_DIFFERENCE_TOLERANCE = 0.02
_SPLIT_TOLERANCE = 1e-3
_MOST_ROUNDED = 0.05  # of a step, by weights that are large beside it: small learning rates of full fine-tuning


def check_gradient(
    model: nn.Module, batch: SequenceBatch, weights: Tensor, gradient: dict[str, Tensor], passes: PassSettings
) -> SelfCheck:
    """The weighted sum of (n_train,) weights times rows, `gradient`, against autograd's gradient of -sum_i w_i S_i."""
    autograd = batch_gradients(model, batch, [score_coefficients(batch, -weights.to(batch.device))], passes)[0]
    autograd = {name: autograd[name] for name in gradient}
    return SelfCheck(
        "rows = autograd", relative_error_of_dicts(gradient, autograd), 1e-4,
        "the weighted sum of per-sequence gradients against autograd's gradient of the loss, over all parameters of the kernel, "
        "relative. A failure means that some parameter's rows are missing or wrong.",
    )  # fmt: skip


def check_optimizer(step: NextStep, gradient: Mapping[str, Tensor], record: OptimizerRecord) -> list[SelfCheck]:
    """The split against the optimizer's own step, and moments against gradients (`check_optimizer_entries`)."""
    entries = check_optimizer_entries(step.state, gradient, record)
    split = step.sum_of_parts
    found, rounded = (relative_error_of_dicts(split, one) for one in (step.unrounded_delta, step.parameter_delta))
    return [
        SelfCheck(
            "AdamW split = optimizer's step", max(found, rounded * _SPLIT_TOLERANCE / _MOST_ROUNDED), _SPLIT_TOLERANCE,
            "batch + momentum + decay against the step that torch.optim.AdamW takes with weights in float64, relative "
            f"({found:.1e}). Rounding to the run's own weights puts the step off by {rounded:.1e} ({_MOST_ROUNDED} is allowed): "
            "the value is the larger of the two, this one scaled to the tolerance.",
        ),
        entries,
    ]  # fmt: skip


def check_optimizer_entries(
    state: Mapping[str, AdamWParameterState], gradient: Mapping[str, Tensor], record: OptimizerRecord
) -> SelfCheck:
    """Moments against fresh gradients, parameter by parameter.

    Raises UserError where the moments look like those of other parameters, or entries are missing.
    """
    refuse_missing_entries(state, gradient, record)
    state, gradient = whole_states(state), whole(gradient)  # profiles and correlations are of whole matrices
    seen = Formed((name for name in gradient if state[name].step), lambda name: gradient[name])
    evidence = mapping_evidence(state, seen)
    worst = "" if evidence.worst is None else f" The least convincing is {evidence.worst!r}."
    if not evidence.convincing(record):
        raise UserError(
            f"only {evidence.share:.0%} of {evidence.compared} parameters resemble their optimizer state more "
            f"than that of another parameter of the same shape (e.g. {evidence.worst!r}): the optimizer's entries are "
            "in another order than the model's parameters, so P would be wrong; nothing is analysed"
        )
    squares = Formed(seen, lambda name: state[name].exp_avg_sq)
    exchanged, straight, pairs = exchanged_by_gradients(squares, seen)
    if exchanged is not None:
        raise exchange_refused("optimizer.pt", exchanged)
    return SelfCheck(
        "optimizer entries recognised", 1.0 - evidence.share, 1.0 - evidence.required(record),
        f"share of {evidence.compared} parameters whose second moments resemble the gradients of a sibling of the same shape "
        f"more than their own.{worst} Of {pairs} pairs of parameters of one shape {straight} have "
        "certainly not changed places with each other, and none has by the looks of it.",
        f"so that entries in a random order would have been seen ({evidence.by_chance:.0%} of {evidence.compared} matrices match "
        f"by chance), and of two that changed places {straight} of {pairs} pairs of one shape",
    )  # fmt: skip


def check_unseen_parameters(
    state: Mapping[str, AdamWParameterState], rows: Mapping[str, Tensor], p: Mapping[str, Tensor]
) -> SelfCheck:
    """How much of the kernel's scale comes from parameters that Adam has never seen a gradient of (v = 0, P = 1/eps).

    state: the moments at the checkpoint. rows: raw training rows, name -> (n, *shape); p: P at the checkpoint.
    """
    unseen = total = 0.0
    for name, part in rows.items():
        weight = mean_squares(part) * len(part) * p[name].double()
        total += float(weight.sum())
        unseen += float(weight[state[name].exp_avg_sq == 0].sum())
    unseen, total = total_of(unseen, total)
    return SelfCheck(
        "kernel not ruled by unseen parameters", unseen / total if total > 0 else 0.0, 0.5,
        "share of the training sequences' own kernel values, sum_i K1(i, i), that comes from parameters whose second moment is "
        "exactly 0, so that P is 1/eps: common after the first step, or for rare tokens' embeddings. Take "
        "entropy_analysis.fisher_kernel.preconditioning=step, which includes this step's gradient.",
        "so that parameters which Adam has not seen may make up to half of the kernel's scale",
    )  # fmt: skip


def mean_squares(rows: Tensor) -> Tensor:
    """Float64 mean over (n, *shape) rows of their squares, a few rows at a time: all squares would be as large as the rows."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for some in rows.split(_ROWS_AT_A_TIME):
        total += some.double().square().sum(0)
    return total / len(rows)


def check_kernel(
    model: nn.Module,
    eval_batch: SequenceBatch,
    towards: Mapping[str, Tensor],
    weights: Tensor,
    fisher: Tensor,
    train_fisher: Tensor,
    passes: PassSettings,
) -> list[SelfCheck]:
    """`fisher` times the weights against finite differences, and `train_fisher`, of equal batches, held to be symmetric and PSD.

    towards: P g, with g the gradient that these (n_train,) weights make of the training rows.
    """
    direction = Formed(towards, lambda name: -towards[name])
    sample = torch.arange(min(16, len(eval_batch)))
    eval_batch = eval_batch.select(sample)
    product = fisher[sample].double() @ weights.double().to(fisher.device)
    size = float(product.abs().max())
    if size == 0.0:
        return []
    # The fastest score moves by 0.02 nats: well above rounding, well below curvature. A router of experts may choose others on
    # the way, which is a jump; a shorter way crosses fewer of them, and what is wrong with K is wrong on all.
    errors = []
    for epsilon in (0.02 / size, 0.005 / size, 0.00125 / size):
        scores = []
        for sign in (1, -1):
            with weights_moved(model, direction, sign * epsilon):
                scores.append(token_statistics(model, eval_batch, passes).scores())
        errors.append(relative_error((scores[0] - scores[1]) / (2 * epsilon), product))
        if errors[-1] <= _FINITE_DIFFERENCE_TOLERANCE:
            break
    return [
        SelfCheck(
            "K w = finite difference", min(errors), _FINITE_DIFFERENCE_TOLERANCE,
            "K1 times the weights against a central difference of 16 sequences' scores along P g, relative. A failure means "
            "that P is missing, doubled, or on both sides, or that the model's gradient is not its derivative (a module stops "
            "or approximates it).",
        ),
        SelfCheck(
            "K symmetric and PSD on equal batches",
            _symmetry_and_psd_error(train_fisher.double()), 1e-4,
            "asymmetry, and the most negative eigenvalue relative to the largest, of a kernel of training sequences with "
            "themselves.",
        ),
    ]  # fmt: skip


def check_attribution(shares: Tensor, batch_change: float) -> SelfCheck:
    """Shares against <grad h, batch part of the step>."""
    scale = max(abs(batch_change), float(shares.abs().max()), 1e-12)
    return SelfCheck(
        "attribution: shares add up", abs(float(shares.sum()) - batch_change) / scale, 1e-4,
        "sum of all dH_i against <grad h, batch part of the step>, relative. A failure means that weights, clipping or "
        "normalisers differ between rows and loss.",
    )  # fmt: skip


def check_entropy_kernel(entropy_fisher: Tensor, products: Tensor) -> SelfCheck:
    """(n_eval, n_train) K_H against (n_train,) <grad h, P dS_i> from autograd's gradient of h."""
    mean = entropy_fisher.double().mean(0).cpu()
    return SelfCheck(
        "entropy kernel = autograd", relative_error(mean, products), 1e-4,
        "mean over evaluation sequences of K_H against <grad h, P dS_i> from autograd's gradient of h, relative.",
    )  # fmt: skip


def _symmetry_and_psd_error(square: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh((square + square.T) / 2)
    return max(relative_error(square, square.T), float(-eigenvalues[0] / eigenvalues[-1].clamp(min=1e-30)))


def check_storage(error: StorageError) -> SelfCheck:
    """What keeping gradients in fewer bits did to them."""
    return SelfCheck(
        "gradient store: rounding", error.relative, 0.02,
        f"{error}. Kernels that are read from the store carry this error.",
    )  # fmt: skip
