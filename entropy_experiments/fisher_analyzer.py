"""The numbers of one analysis: kernels, predictions with standard errors, measurements, shares, and self-checks.

Training rows dS_i are the kernel's columns; the parts of the next AdamW step stand beside them. One forward pass over the
evaluation buffer multiplies every estimator's rows E_t with all columns at once (block by block:
entropy_experiments.kernel.engine), the training rows under P, the step as it is: kernels from the first, each sequence's
contribution to every prediction from the second. Means over evaluation sequences are predictions, a jackknife over their prompts
gives the standard errors. Where rows cover some modules only, contributions to predictions come from forward-mode derivatives
along the whole step instead.

Source: docs/theory/fisher-kernel.md, docs/theory/adamw-step.md, docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.adamw import Moments
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.formed import Formed
from entropy_core.gradients import batch_gradients, dot
from entropy_core.passes.settings import PassSettings
from entropy_experiments.kernel.contraction import STEP_VECTORS, OtherMetric, Products
from entropy_experiments.kernel.engine import KernelEngine
from entropy_experiments.kernel.sketched import check_sketch
from entropy_experiments.kernel.store.preconditioner_file import write_preconditioner
from entropy_experiments.kernel.store.row_storage import StoredRows
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.run.self_checks import SelfCheck, smallest_seen_gap, surprisal_z_score
from entropy_experiments.step.effects_of_leaving_out import (
    NumbersByEvaluation,
    effects_of_leaving_out,
    metrics_by_evaluation,
    numbers_by_evaluation,
    own_part_of_second_moment,
)
from entropy_experiments.step.estimator_check import check_estimators
from entropy_experiments.step.evaluation_products import EvaluationProducts, EvaluationSide
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.kernel_checks import check_attribution, check_entropy_kernel, check_kernel, check_storage
from entropy_experiments.step.measured_changes import check_slope, measure_scales
from entropy_experiments.step.numbers import (
    AnalysisNumbers,
    Kernels,
    MeasuredScale,
    Predictions,
    StepNumbers,
    StepShares,
)
from entropy_experiments.step.optimizer_step import AnalysedStep, NextStep
from entropy_experiments.step.predictions import predictions_by_derivatives, predictions_from_products, total_along
from entropy_experiments.step.settings import AnalysisSettings
from entropy_experiments.step.shares import attribute, horizon_factor
from entropy_experiments.step.training_side import TrainingSide, prepare_training_side
from rl_training.errors import ShareDone, UserError

Gradients = dict[str, dict[str, Tensor]]
"""estimator -> name -> gradient of entropy, nats per token."""


@dataclass(frozen=True)
class FisherComputation:
    """The numbers; the training side with its rows, for steps of other weights; and the gradients of h that shares and
    predictions rest on, by the estimand's `gradient` and `derivative`.
    """

    numbers: AnalysisNumbers
    training: TrainingSide
    gradients: Gradients


def analyze_batches(
    model: nn.Module,
    optimizer: Moments | None,
    eval_batch: SequenceBatch,
    train_batch: SequenceBatch,
    weights: Tensor | None,
    settings: AnalysisSettings | None = None,
    reporter: Reporter = SILENT,
) -> FisherComputation:
    """Run one analysis; the model and the optimizer are as before when it returns.

    Args:
        weights: (n_train,) w_i of the loss, g = -sum_i w_i dS_i; None: kernels alone, there is no step.
        settings: by default those of a checkpoint's own next step.
        reporter: is told of stages and blocks.

    Raises:
        UserError: for a missing optimizer or learning rate, or where nothing is left to compute.
        ShareDone: in every process but the first, when its part is done.
        ValueError: where rows cannot be formed.
    """
    settings = settings or AnalysisSettings()
    if weights is None and not settings.compute_full:
        raise UserError(
            "the training sequences have no weights, so the kernel is all there is: set fisher_kernel.compute_full=true"
        )
    engine = _settled_engine(model, eval_batch, train_batch, settings)
    rows = engine.setup.plan.strategy != "directions"
    reporter.stage("training gradients, one row per sequence" if rows else "gradient of the training loss")
    training = prepare_training_side(model, optimizer, train_batch, weights, settings, engine)
    reporter.stage("token statistics")
    side = EvaluationSide(eval_batch, engine.statistics(eval_batch, with_variances=True), settings.estimand)
    products, kernels = _matrices(side, training, settings, reporter)
    checks = [*training.checks, *_storage_checks(engine, training, kernels, eval_batch)]
    predictions = None if training.step is None else _predictions(model, side, training, products, settings, reporter)
    gradients = _entropy_gradients(model, side, settings.passes)
    attribution = _attribution(settings, training, gradients)
    reporter.stage("checking the kernel against finite differences")
    checks += _number_checks(model, side, training, kernels, attribution, gradients, settings)
    step = None
    if training.step is not None and predictions is not None and attribution is not None:
        measured = ()
        if settings.measure:
            measured, check = _measured(model, side, training.step, predictions, settings, reporter)
            checks.append(check)
        parts, taken = None if products is None else _by_evaluation(training, products), training.step
        step = StepNumbers(predictions, attribution, parts, measured, taken.gradient_norm, taken.clip)
    numbers = AnalysisNumbers(settings.estimand, side.statistics, training.statistics, kernels, step, tuple(checks))
    return FisherComputation(numbers, training, gradients)


def _settled_engine(
    model: nn.Module, eval_batch: SequenceBatch, train_batch: SequenceBatch, settings: AnalysisSettings
) -> KernelEngine:
    kinds = len(EvaluationSide.kinds_of(settings.estimand))
    engine = settings.kernel.engine(model, train_batch, len(eval_batch), settings.passes, settings.compute_full, kinds)
    engine.settle(eval_batch)
    return engine


def _matrices(
    side: EvaluationSide, training: TrainingSide, settings: AnalysisSettings, reporter: Reporter
) -> tuple[Products | None, Kernels | None]:
    """Products of the evaluation rows, and the kernels; rows are stored where that is asked. None: not asked for.

    Raises ShareDone in every process but the first.
    """
    products = train_products = kernels = None
    if training.kernel.rows.forms_rows:
        reporter.stage("evaluation gradients and kernels")
        products = _evaluation_products(side, training, settings.compute_full)
    if settings.compute_full:
        reporter.stage("the training buffer's own kernel")
        train_products = _training_products(side, training)
    if settings.kernel.save_gradients:
        reporter.stage("storing the evaluation gradients")
        _store_evaluation(side, training, settings)
    if not settings.kernel.processes.is_root:
        raise ShareDone
    if products is not None and train_products is not None:
        kernels = _kernels(side, products, *train_products)
    return products, kernels


def _storage_checks(
    engine: KernelEngine, training: TrainingSide, kernels: Kernels | None, eval_batch: SequenceBatch
) -> Iterator[SelfCheck]:
    """What a sketch and a store on disk lost of the rows."""
    if engine.setup.plan.strategy == "sketch" and kernels is not None:
        exact = training.kernel.exact_tile(eval_batch)
        yield check_sketch(kernels.fisher[: exact.shape[0], : exact.shape[1]], exact)
    if training.kernel.rows.store is not None:
        yield check_storage(training.kernel.rows.store.storage_error())


def _number_checks(
    model: nn.Module,
    side: EvaluationSide,
    training: TrainingSide,
    kernels: Kernels | None,
    attribution: StepShares | None,
    gradients: Gradients,
    settings: AnalysisSettings,
) -> Iterator[SelfCheck]:
    """Kernels and shares against gradients, kernels against finite differences, the sampler against the policy."""
    restrict = training.kernel.setup.passes.restrict
    if kernels is not None:
        towards = training.under_p(restrict(gradients[settings.estimand.gradient]))
        yield check_entropy_kernel(kernels.entropy_fisher, training.true_rows.products(towards))
    if attribution is not None:
        yield check_attribution(attribution.shares, attribution.batch_change)
    if kernels is not None:
        towards = training.under_p(restrict(training.true_gradient))
        weights, own = training.effective_weights, (kernels.fisher, kernels.train_fisher)
        yield from check_kernel(model, side.batch, towards, weights, *own, settings.passes)
    if settings.estimand.rows_drawn:
        yield _check_sampler(side)
        yield check_estimators(side.batch.device)


def _evaluation_products(side: EvaluationSide, training: TrainingSide, compute_full: bool) -> Products | None:
    """Of the evaluation rows with training rows and step, in the first process; None in the others."""
    others = _other_metrics(side, training) if compute_full else ()
    steps: Mapping[str, Tensor] | None = None
    if training.step is not None:
        vectors = training.step_vectors()
        steps = Formed(
            training.kernel.setup.passes.names,
            lambda name: torch.stack([vectors[v][name] for v in STEP_VECTORS]),
        )
    kinds = side.kernel_kinds if compute_full else ()
    return training.kernel.contract("evaluation", side.batch, side.coefficients(), kinds, steps, others)


def _predictions(
    model: nn.Module,
    side: EvaluationSide,
    training: TrainingSide,
    products: Products | None,
    settings: AnalysisSettings,
    reporter: Reporter,
) -> Predictions:
    """From products of rows of all trainable parameters, where there are such, else from derivatives along the step's vectors."""
    restricted, kernel_part = training.kernel.setup.passes.restricted, None
    if products is not None:
        found = predictions_from_products(side, products.steps)
        if not restricted:
            return found
        kernel_part = found.per_token[side.estimand.gradient]["total"].value
    reporter.stage("predictions over all modules" if restricted else "predictions, along the step and its parts")
    vectors = training.step_vectors()
    if restricted and kernel_part is None:
        own = training.kernel.setup.passes.restrict(vectors["total"])
        kernel_part = total_along(model, side, own, settings.passes)
    return predictions_by_derivatives(model, side, vectors, settings.passes, kernel_part)


def _other_metrics(side: EvaluationSide, training: TrainingSide) -> tuple[OtherMetric, ...]:
    """Of shares and effects by evaluation sequence; none without a step, and where the step's own rows are not kept."""
    if training.step is None or not isinstance(training.rows, KeptRows):
        return ()
    found = metrics_by_evaluation(training.gradient, training.step)
    return tuple(OtherMetric(metric, side.headline_kinds) for metric in found)


def _by_evaluation(training: TrainingSide, products: Products) -> NumbersByEvaluation | None:
    if not products.others or training.weights is None or training.step is None:
        return None
    shares, effects = (list(other.values()) for other in products.others)
    return numbers_by_evaluation((shares, effects), training.gradient, training.rows, training.weights, training.step)


def _training_products(side: EvaluationSide, training: TrainingSide) -> tuple[Tensor, Tensor] | None:
    """(n_train, n_train) K1 and KH with the training sequences on both sides: one more forward and two backward passes."""
    batch, own = training.batch, side.kernel_kinds[1]
    terms = entropy_coefficients(training.statistics, batch, side.estimand.gradient, per_token=True)
    rows = {"score": score_coefficients(batch), own: terms}
    found = training.kernel.contract("training", batch, rows, tuple(rows))
    return None if found is None else (found.kernel["score"], found.kernel[own])


def _kernels(side: EvaluationSide, products: Products, train_fisher: Tensor, train_entropy_fisher: Tensor) -> Kernels:
    rows = EvaluationProducts(side, {kind: matrix.double() for kind, matrix in products.kernel.items()})
    entropy_fisher = rows.of(side.estimand.gradient, per_token=True).float()
    return Kernels(products.kernel["score"], entropy_fisher, train_fisher, train_entropy_fisher)


def _store_evaluation(side: EvaluationSide, training: TrainingSide, settings: AnalysisSettings) -> None:
    """Rows of the evaluation side and P beside the training side's, so that kernels under another P need no model."""
    setup, estimator, folder = training.kernel.setup, side.estimand.gradient, settings.kernel.store_folder
    if folder is None:
        raise ValueError("gradients are to be stored, and there is no folder for them")
    score, entropy = (folder.with_name(f"{folder.name}_{kind}") for kind in ("evaluation", "entropy"))
    terms = entropy_coefficients(side.statistics, side.batch, estimator)
    wanted = [StoredRows(score, "score", score_coefficients(side.batch))]
    wanted.append(StoredRows(entropy, "entropy", terms, {"estimator": estimator}))
    setup.store(side.batch, wanted)
    if (p := training.kernel_preconditioner) is not None and settings.kernel.processes.is_root:
        what = {"formula": "1/(sqrt(v/(1-beta2^t))+eps)"}
        chosen = {name: p[name] for name in setup.passes.names}
        write_preconditioner(folder.parent, chosen, what, overwrite=True)


def _entropy_gradients(model: nn.Module, side: EvaluationSide, passes: PassSettings) -> Gradients:
    """By the estimand's `gradient` and `derivative`, from one forward pass."""
    wanted = dict.fromkeys((side.estimand.gradient, side.estimand.derivative))
    objectives = [entropy_coefficients(side.statistics, side.batch, e).scaled(1.0 / len(side.batch)) for e in wanted]
    return dict(zip(wanted, batch_gradients(model, side.batch, objectives, passes), strict=True))


def _attribution(settings: AnalysisSettings, training: TrainingSide, gradients: Gradients) -> StepShares | None:
    """The shares, by the gradient of entropy and by that of its measurement; None without a step."""
    if training.weights is None or training.step is None:
        return None
    rows, weights, step, estimand = training.rows, training.weights, training.step, settings.estimand
    found = {estimator: attribute(gradient, rows, weights, step) for estimator, gradient in gradients.items()}
    own, towards = found[estimand.gradient], gradients[estimand.gradient]
    return StepShares(
        shares=own.shares,
        measurement_shares=found[estimand.derivative].shares,
        products=own.products,
        step_factor=own.step_factor,
        horizon_factor=horizon_factor(next(iter(step.state.values()))) if isinstance(step, NextStep) else 1.0,
        batch_change=dot(towards, step.parts()["batch"]),
        effects=effects_of_leaving_out(towards, training.gradient, rows, weights, step),
        own_part_of_second_moment=own_part_of_second_moment(step),
        tokens=own.tokens,
    )


def _check_sampler(side: EvaluationSide) -> SelfCheck:
    z, unseen = surprisal_z_score(side.statistics), smallest_seen_gap(side.statistics, 4.0)
    return SelfCheck(
        "sampler: surprisal = entropy", z, 4.0,
        "|z| of mean(-S) against mean(sum of H_k) on the evaluation buffer; both estimate H. A large value means that "
        "completions were not drawn from the distribution that is differentiated.",
        f"so that a mean surprisal up to {unseen:.0%} off the entropy would have passed",
    )  # fmt: skip


def _measured(
    model: nn.Module,
    side: EvaluationSide,
    step: AnalysedStep,
    predictions: Predictions,
    settings: AnalysisSettings,
    reporter: Reporter,
) -> tuple[tuple[MeasuredScale, ...], SelfCheck]:
    """The changes along the step, and whether their slope is what was predicted."""
    delta, passes = step.parameter_delta, settings.passes
    found = measure_scales(model, side, delta, settings.step_scales, passes, reporter)
    reporter.stage("checking the slope")
    predicted = predictions.per_token[settings.estimand.derivative]["total"]
    return found, check_slope(model, side, delta, predicted, found[0].fixed_prefix.before, passes)
