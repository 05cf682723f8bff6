"""The numbers of one analysis: kernels, predictions with standard errors, measurements, shares, and self-checks.

Training rows dS_i times P (one side only) are the kernel's columns; the parts of the next AdamW step stand beside them as five
more. One forward pass over the evaluation buffer contracts every estimator's rows E_t with all columns at once (block by
block: entropy_experiments.kernel.engine): kernels from the first, each sequence's contribution to every prediction from the
last. Means over evaluation sequences are predictions, a jackknife over their prompts gives the standard errors. Where rows
cover some modules only, contributions to predictions come from forward-mode derivatives along the whole step instead.

Source: docs/theory/fisher-kernel.md, docs/theory/adamw-step.md, docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.directional import entropy_products, token_derivatives, weights_moved
from entropy_core.entropy import Estimator, TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import batch_gradients, dot
from entropy_core.kernel import OtherMetric
from entropy_core.measurement import fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_core.uncertainty import contributions_without_each_prompt
from entropy_experiments.checkpoints.optimizer_names import OptimizerRecord
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.kernel.sketch import check_sketch
from entropy_experiments.kernel.store.preconditioner_file import write_preconditioner
from entropy_experiments.kernel.store.row_storage import StoredRows
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.run.self_checks import SelfCheck, smallest_seen_gap, surprisal_z_score
from entropy_experiments.step.effects_of_leaving_out import (
    effects_of_leaving_out,
    headline_metric,
    headline_products,
    own_part_of_second_moment,
)
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.kernel_checks import check_attribution, check_entropy_kernel, check_kernel, check_storage
from entropy_experiments.step.numbers import PARTS, AnalysisNumbers, Estimate, MeasuredScale
from entropy_experiments.step.predictions_left_out import estimate_with_error, products_without_each_prompt
from entropy_experiments.step.shares import attribute, horizon_factor
from entropy_experiments.step.training_side import TrainingSide, prepare_training_side
from rl_training.errors import ShareDone, UserError

_SLOPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class FisherComputation:
    """The numbers; the training side with its rows, for steps of other weights; and the gradients of h that shares and
    predictions rest on, estimator -> name -> tensor ("rao_blackwell" and "split"; "fixed_prefix" where rows are given).
    """

    numbers: AnalysisNumbers
    training: TrainingSide
    gradients: dict[str, dict[str, Tensor]]


def analyze_batches(
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    weights: Tensor | None,
    *,
    rows_drawn: bool = True,
    preconditioning: str = "checkpoint",
    max_grad_norm: float | None = 1.0,
    learning_rate: float | None = None,
    step_scales: tuple[float, ...] = (1.0,),
    compute_full: bool = True,
    measure: bool = True,
    optimizer_record: OptimizerRecord = "names",
    token_batch_size: int = 2048,
    kernel: KernelOptions | None = None,
    reporter: Reporter = SILENT,
) -> FisherComputation:
    """Run one analysis; the model and the optimizer are as before when it returns.

    weights: (n_train,) w_i of the loss, g = -sum_i w_i dS_i; None: kernels alone, there is no step. rows_drawn: whether the
    policy drew the evaluation sequences (see AnalysisNumbers). preconditioning: the kernel's P, "checkpoint" (from the
    moments in `optimizer`), "step" (from those of the analysed step, which hold its gradient already) or "none" (P = 1, and
    the step is -lr g). learning_rate: needed without an optimizer; overrides every group's with one. optimizer_record: what the
    checkpoint's own record says of the optimizer's entries. kernel: budgets, modules, where
    finished blocks go, and the processes that share the work, of which the first returns the numbers.

    Raises UserError for a missing optimizer or learning rate, or where nothing is left to compute; ValueError where rows
    cannot be formed.
    """
    if weights is None and not compute_full:
        raise UserError(
            "the training sequences have no weights, so the kernel is all there is: set fisher_kernel.compute_full=true"
        )
    options = kernel or KernelOptions()
    engine = options.engine(model, train_batch, len(eval_batch), token_batch_size)
    engine.settle(eval_batch)
    reporter.stage("training gradients, one row per sequence")
    training = prepare_training_side(
        model,
        optimizer,
        train_batch,
        weights,
        preconditioning=preconditioning,
        max_grad_norm=max_grad_norm,
        learning_rate=learning_rate,
        optimizer_record=optimizer_record,
        token_batch_size=token_batch_size,
        engine=engine,
    )
    reporter.stage("token statistics")
    numbers = AnalysisNumbers(
        eval_statistics=engine.statistics(eval_batch, with_variances=True),
        train_statistics=training.statistics,
        rows_drawn=rows_drawn,
        clip=training.clip,
        gradient_norm=training.gradient_norm,
        checks=list(training.checks),
    )
    reporter.stage("evaluation gradients and kernels")
    _contract(eval_batch, training, numbers, compute_full)
    if compute_full:
        reporter.stage("the training buffer's own kernel")
        _contract_training(training, numbers)
    if options.save_gradients:
        reporter.stage("storing the evaluation gradients")
        _store_evaluation(eval_batch, training, numbers, options)
    if not options.processes.is_root:
        raise ShareDone
    if engine.plan.strategy == "sketch" and numbers.fisher is not None:
        exact = engine.exact_tile(eval_batch)
        numbers.checks.append(check_sketch(numbers.fisher[: exact.shape[0], : exact.shape[1]], exact))
    if engine.store is not None:
        numbers.checks.append(check_storage(engine.store.storage_error()))
    if engine.restricted and training.step is not None:
        reporter.stage("predictions over all modules")
        _predict_by_derivatives(model, eval_batch, training, numbers, token_batch_size)
    gradients = _attribute(model, eval_batch, training, numbers, token_batch_size)
    reporter.stage("checking the kernel against finite differences")
    kernels = (numbers.fisher, numbers.train_fisher)
    p, gradient = training.preconditioner, engine.restrict(training.true_gradient)
    numbers.checks.extend(
        check_kernel(model, eval_batch, train_batch, gradient, training.push, p, *kernels, token_batch_size)
    )
    if rows_drawn:
        z, unseen = surprisal_z_score(numbers.eval_statistics), smallest_seen_gap(numbers.eval_statistics, 4.0)
        numbers.checks.append(
            SelfCheck(
                "sampler: surprisal = entropy", z, 4.0,
                "|z| of mean(-S) against mean(sum of H_k) on the evaluation buffer; both estimate H. A large value means that "
                "completions were not drawn from the distribution that is differentiated.",
                f"so that a mean surprisal up to {unseen:.0%} off the entropy would have passed",
            )
        )  # fmt: skip
    if measure and training.step is not None:
        _measure(model, eval_batch, training.taken, step_scales, numbers, token_batch_size, reporter)
    return FisherComputation(numbers, training, gradients)


def _own_estimator(numbers: AnalysisNumbers) -> Estimator:
    """The estimator of kernels and shares: what given rows can tell is how entropy moves on their own tokens."""
    return "rao_blackwell" if numbers.rows_drawn else "fixed_prefix"


def _contract(batch: SequenceBatch, training: TrainingSide, numbers: AnalysisNumbers, compute_full: bool) -> None:
    """Fill in the cross kernels and the predictions, from one forward pass over the evaluation batch."""
    statistics, parts, engine = numbers.eval_statistics, training.step_parts(), training.engine
    steps = None
    if parts:
        vectors = [*(parts[part] for part in PARTS), training.plain_step()]
        steps = {name: torch.stack([vector[name] for vector in vectors]) for name in engine.names}
    if steps is None and not compute_full:
        return
    # Estimators whose coefficients are equal over a sequence's tokens are combinations of two kinds of rows, so that
    # four backward passes serve all estimators and both units.
    objectives = [
        score_coefficients(batch),
        TokenCoefficients(batch.completion_mask.double(), torch.zeros_like(statistics.entropies, dtype=torch.float64)),
    ]
    if numbers.rows_drawn:
        objectives += [entropy_coefficients(statistics, batch, "rao_blackwell", unit) for unit in (True, False)]
    first = len(training.batch) if compute_full else 0
    other = _headline_metric(training, numbers.rows_drawn) if first else None
    found = engine.contract("evaluation", batch, objectives, steps, compute_full, other)
    if found is None:
        return
    if other is not None and training.weights is not None:
        again = [found[number][:, -first:] for number in other.objectives]
        numbers.headline = headline_products(
            again, training.gradient, training.rows, training.weights, training.adam_step, training.clip or 0.0
        )
        found = [m[:, :-first] for m in found]
    rows = [m.double() for m in found]

    def products(estimator: Estimator, per_token: bool) -> Tensor:
        if estimator == "rao_blackwell":
            return rows[2 if per_token else 3]
        c = entropy_coefficients(statistics, batch, estimator, per_token)
        # equal over the tokens of a sequence: the largest in absolute value is the value
        alpha, gamma = c.entropy.amax(1, keepdim=True), (c.logprob.amax(1) + c.logprob.amin(1))[:, None]
        return alpha * rows[1] + gamma * rows[0]

    own = products(_own_estimator(numbers), True)
    if compute_full:
        numbers.fisher, numbers.entropy_fisher = rows[0][:, :first].float(), own[:, :first].float()
    if not parts:
        return
    estimators = get_args(Estimator) if numbers.rows_drawn else ("fixed_prefix",)
    for per_token, target in ((True, numbers.predicted), (False, numbers.predicted_per_completion)):
        for estimator in estimators:
            matrix = products(estimator, per_token)[:, first:]
            left_out = products_without_each_prompt(rows, statistics, batch, estimator, per_token, first)
            target[estimator] = {
                part: estimate_with_error(matrix[:, k].mean(), left_out[:, k]) for k, part in enumerate(PARTS)
            }
            if per_token and estimator == _own_estimator(numbers):
                k = len(PARTS)
                numbers.without_preconditioner = estimate_with_error(matrix[:, k].mean(), left_out[:, k])
    numbers.contributions, numbers.own_changes = own[:, first] / len(batch), rows[1][:, first]


def _headline_metric(training: TrainingSide, rows_drawn: bool) -> OtherMetric | None:
    """headline_metric over P; None without a step, and where the step's own rows are not kept."""
    if training.step is None or not isinstance(training.rows, KeptRows):
        return None
    metric = headline_metric(training.gradient, training.adam_step, training.clip or 0.0, training.learning_rate)
    if (p := training.preconditioner) is not None:
        metric = {name: a / p[name] for name, a in metric.items()}
    return OtherMetric(metric, (2, 3) if rows_drawn else (1,))


def _contract_training(training: TrainingSide, numbers: AnalysisNumbers) -> None:
    """Fill in the kernels with the training sequences on both sides: one more forward and two backward passes."""
    batch = training.batch
    objectives = [
        score_coefficients(batch),
        entropy_coefficients(training.statistics, batch, _own_estimator(numbers), per_token=True),
    ]
    found = training.engine.contract("training", batch, objectives)
    if found is not None:
        numbers.train_fisher, numbers.train_entropy_fisher = found


def _store_evaluation(
    batch: SequenceBatch, training: TrainingSide, numbers: AnalysisNumbers, options: KernelOptions
) -> None:
    """Rows of the evaluation side and P beside the training side's, so that kernels under another P need no model."""
    engine, estimator, beside = training.engine, _own_estimator(numbers), options.store_folder
    if beside is None:
        raise ValueError("gradients are to be stored, and there is no folder for them")
    score, entropy = (beside.with_name(f"{beside.name}_{kind}") for kind in ("evaluation", "entropy"))
    terms = entropy_coefficients(numbers.eval_statistics, batch, estimator)
    wanted = [StoredRows(score, "score", score_coefficients(batch))]
    wanted.append(StoredRows(entropy, "entropy", terms, {"estimator": estimator}))
    engine.store_rows(batch, wanted)
    if training.preconditioner is not None and options.processes.is_root:
        what = {"formula": "1/(sqrt(v/(1-beta2^t))+eps)"}
        chosen = {name: training.preconditioner[name] for name in engine.names}
        write_preconditioner(beside.parent, chosen, what, overwrite=True)


def _predict_by_derivatives(
    model: nn.Module,
    batch: SequenceBatch,
    training: TrainingSide,
    numbers: AnalysisNumbers,
    token_batch_size: int,
) -> None:
    """Put predictions over all trainable parameters in the place of those over the kernel's modules."""
    estimators = get_args(Estimator) if numbers.rows_drawn else ("fixed_prefix",)
    own, statistics = _own_estimator(numbers), numbers.eval_statistics
    restricted = numbers.predicted[own]["total"].value
    for part, step in {**training.step_parts(), "plain": training.plain_step()}.items():
        derivatives = token_derivatives(model, batch, step, token_batch_size)

        def products(estimator: Estimator, per_token: bool, along: TokenStatistics = derivatives) -> Tensor:
            return entropy_products(statistics, along, batch, estimator, per_token)

        def estimate(estimator: Estimator, per_token: bool, along: TokenStatistics = derivatives) -> Estimate:
            def of_rows(kept: Tensor) -> Tensor:
                some = batch.select(kept.tolist())
                return entropy_products(statistics.select(kept), along.select(kept), some, estimator, per_token)

            value = entropy_products(statistics, along, batch, estimator, per_token).mean()
            return estimate_with_error(value, contributions_without_each_prompt(batch.prompt_index, of_rows))

        if part == "plain":
            numbers.without_preconditioner = estimate(own, True)
            continue
        for per_token, target in ((True, numbers.predicted), (False, numbers.predicted_per_completion)):
            for estimator in estimators:
                target[estimator][part] = estimate(estimator, per_token)
        if part == "total":
            whole = numbers.predicted[own]["total"].value
            numbers.left_out = None if whole == 0.0 else 1.0 - restricted / whole
            numbers.contributions = products(own, True) / len(batch)
            numbers.own_changes = products("fixed_prefix", False)


def _attribute(
    model: nn.Module,
    batch: SequenceBatch,
    training: TrainingSide,
    numbers: AnalysisNumbers,
    token_batch_size: int,
) -> dict[str, dict[str, Tensor]]:
    """Fill in the shares, by the gradient of entropy and by that of its reweighted measurement; return these gradients."""
    wanted: list[Estimator] = [_own_estimator(numbers)]
    if numbers.rows_drawn:
        wanted.append("split")
    objectives = [
        entropy_coefficients(numbers.eval_statistics, batch, estimator).scaled(1.0 / len(batch)) for estimator in wanted
    ]
    gradients = batch_gradients(model, batch, objectives, token_batch_size)
    by_estimator: dict[str, dict[str, Tensor]] = dict(zip(wanted, gradients, strict=True))
    if numbers.entropy_fisher is not None:
        p, own = training.preconditioner, training.engine.restrict(gradients[0])
        products = training.true_rows.products(own if p is None else {name: p[name] * g for name, g in own.items()})
        numbers.checks.append(check_entropy_kernel(numbers.entropy_fisher, products))
    if training.weights is None or training.clip is None:
        return by_estimator
    found = [
        attribute(
            gradient,
            training.rows,
            training.weights,
            training.adam_step,
            training.clip,
            training.learning_rate or 0.0,
        )
        for gradient in gradients
    ]
    numbers.shares, numbers.products, numbers.step_factor = found[0].shares, found[0].products, found[0].step_factor
    numbers.effects = effects_of_leaving_out(
        gradients[0], training.gradient, training.rows, training.weights, training.adam_step, training.clip,
        training.learning_rate,
    )  # fmt: skip
    numbers.own_part_of_second_moment = own_part_of_second_moment(training.adam_step)
    numbers.split_shares = found[1].shares if numbers.rows_drawn else None
    step = training.adam_step
    numbers.horizon_factor = 1.0 if step is None else horizon_factor(next(iter(step.state.values())))
    numbers.batch_change = dot(gradients[0], training.step_parts()["batch"])
    numbers.checks.append(check_attribution(found[0].shares, numbers.batch_change))
    return by_estimator


def _measure(
    model: nn.Module,
    batch: SequenceBatch,
    taken: dict[str, Tensor],
    scales: tuple[float, ...],
    numbers: AnalysisNumbers,
    token_batch_size: int,
    reporter: Reporter,
) -> None:
    """Fill in the measured changes along the step, and check their slope against the prediction."""
    before = numbers.eval_statistics
    for scale in sorted({*scales, 1.0}):
        reporter.stage(f"measuring at {scale:g} x the step")
        with weights_moved(model, taken, scale):
            after = token_statistics(model, batch, token_batch_size)
        snis = snis_entropy_change(before, after, batch) if numbers.rows_drawn else None
        numbers.measured.append(MeasuredScale(scale, snis, fixed_prefix_entropy_change(before, after, batch)))
    reporter.stage("checking the slope")
    estimator = "split" if numbers.rows_drawn else "fixed_prefix"
    change = snis_entropy_change if numbers.rows_drawn else fixed_prefix_entropy_change
    expected = numbers.predicted[estimator]["total"]
    errors = []
    for small in (1 / 16, 1 / 64):  # a router of experts that jumps on the way does so less on a shorter one
        changes = []
        for sign in (1, -1):
            with weights_moved(model, taken, sign * small):
                changes.append(change(before, token_statistics(model, batch, token_batch_size), batch).change)
        slope = (changes[0] - changes[1]) / (2 * small)
        # A float32 forward knows entropies to a few units in the last place, so a slope over 2/16 of a step has a floor.
        floor = 32 * torch.finfo(torch.float32).eps * numbers.measured[0].fixed_prefix.before / small
        size = max(abs(expected.value), _known(expected.standard_error), 50 * floor)
        errors.append(abs(slope - expected.value) / size)
        if errors[-1] <= _SLOPE_TOLERANCE:
            break
    numbers.checks.append(
        SelfCheck(
            "slope of the measurement = its derivative", min(errors), _SLOPE_TOLERANCE,
            f"central difference of the measured entropy at 1/16 of the step (or 1/64) against its exact derivative, the "
            f"{estimator} estimator on the same tokens, relative to the largest of the prediction, its standard error and 50 "
            "times the rounding of float32. Pins every sign and normaliser.",
        )
    )  # fmt: skip


def _known(standard_error: float) -> float:
    """A standard error, 0 where one prompt alone leaves it unknown."""
    return 0.0 if math.isnan(standard_error) else standard_error
