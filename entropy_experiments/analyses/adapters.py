"""What each analysis is given: its arrays, and for those that need real steps the model and its rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import any_of
from entropy_core.gradients import entropy_gradient, per_sequence_gradients, trainable_parameters
from entropy_core.interventions import TrainingTokens, reference_statistics
from entropy_core.passes.settings import PassSettings
from entropy_core.predictors import covariance_predictor, steer_predictor
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.analyses.attribution import EvaluationTerms, TokenDetail, TrainingShares, attribute_step
from entropy_experiments.analyses.baselines import baseline_table
from entropy_experiments.analyses.buffers import compare_buffers
from entropy_experiments.analyses.clustering import sequence_clusters
from entropy_experiments.analyses.entropy_prediction import compare_prediction, prediction_rows
from entropy_experiments.analyses.higher_order import measure_orders
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.analyses.intervention import Halves, SharePrediction, half_subsets, prove_by_intervention
from entropy_experiments.analyses.price_steps import PriceInputs
from entropy_experiments.analyses.prices import price_list
from entropy_experiments.analyses.prompt_structure import prompt_structure as structure_of_prompts
from entropy_experiments.analyses.weighting_schemes import Responses, with_measurements
from entropy_experiments.analyses.weighting_schemes import weighting_schemes as table_of_weightings
from entropy_experiments.analyses.who_was_first import numbers_of_draws
from entropy_experiments.records.attribution_results import AttributionResult
from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.records.kernel_results import BuffersResult, PromptStructureResult
from entropy_experiments.records.price_results import PricesResult
from entropy_experiments.records.step_results import (
    BaselinesResult,
    EntropyPredictionResult,
    HigherOrderResult,
    InterventionResult,
)
from entropy_experiments.records.weighting_results import WeightingResult
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.effects_of_leaving_out import (
    decided_by_effect,
    effects_of_leaving_out,
    own_part_of_second_moment,
)
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.fresh_samples import draw_after_step, fresh_entropy_change
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows, TrainingRows
from entropy_experiments.step.measured_changes import entropy_change, resolution
from entropy_experiments.step.numbers import StepNumbers
from entropy_experiments.step.real_steps import StepMeasurement, measure_curve
from entropy_experiments.step.training_side import preconditioner_of
from entropy_experiments.step.weighted_directions import products_with_weightings
from entropy_experiments.step.what_if import StepMaker
from entropy_experiments.text.tokens import token_texts
from rl_training.errors import UserError

_FRESH_STREAM = 3_000_003  # apart from the streams of both buffers
_RESPONSE_SUBSETS = 16  # halves over which response shares are averaged; their standard error falls slowly beyond


_FEWEST_SUBSETS = 3
_ROWS_HELD = 2**31  # bytes


class NotApplicable(Exception):
    """The question does not arise for this checkpoint and these buffers; the message says why."""


def buffers(inputs: AnalysisInputs) -> BuffersResult:
    """analyses/buffers.py."""
    return compare_buffers(inputs.evaluation_labels(), inputs.training_labels(), inputs.truncated())


def prompt_structure(inputs: AnalysisInputs) -> PromptStructureResult:
    """analyses/prompt_structure.py."""
    return structure_of_prompts(inputs.kernel_arrays(), seed=inputs.config.seed)


def sequence_clustering(inputs: AnalysisInputs) -> ClusteringResult:
    """analyses/clustering.py."""
    return sequence_clusters(inputs.kernel_arrays(step_needed=False), seed=inputs.config.seed)


def entropy_prediction(inputs: AnalysisInputs) -> EntropyPredictionResult:
    """analyses/entropy_prediction.py, with fresh samples at the scales that the configuration names."""
    numbers, step, settings = inputs.numbers, step_numbers(inputs), inputs.config.entropy_analysis
    predicted = {
        name: {
            "value": parts["total"].value,
            "standard_error": parts["total"].standard_error,
            "left_out": None if parts["total"].left_out is None else parts["total"].left_out.cpu().numpy(),
        }
        for name, parts in step.predictions.per_token.items()
    }
    measured = {m.scale for m in step.measured}
    anew = numbers.estimand.rows_drawn and not any(inputs.evaluation.drawn)  # no environment can be run here
    wanted = [s for s in settings.analysis.fresh_scales if s in measured] if anew else []
    fresh = {}
    for number, scale in enumerate(wanted):
        drawn = draw_after_step(
            inputs.model,
            inputs.side.known_step.parameter_delta,
            scale,
            inputs.evaluation,
            inputs.plan.sampling_config,
            inputs.config.seed + _FRESH_STREAM + number,
            inputs.passes,
        )
        fresh[scale] = fresh_entropy_change(numbers.eval_statistics, inputs.eval_batch, *drawn)
    smallest = resolution(step.measured[0].fixed_prefix.before)
    return compare_prediction(predicted, prediction_rows(step.measured, fresh), smallest)


def step_numbers(inputs: AnalysisInputs) -> StepNumbers:
    """Of the analysed step. Raises NotApplicable where there is none."""
    if inputs.numbers.step is None:
        raise NotApplicable("the training sequences have neither weights nor rewards, so there is no step")
    return inputs.numbers.step


def higher_order(inputs: AnalysisInputs) -> HigherOrderResult:
    """analyses/higher_order.py, along the step and back, at the configured scales up to 1."""
    settings = inputs.config.entropy_analysis
    forward = sorted(s for s in {*settings.analysis.step_scales, 1.0} if s <= 1)
    curve = measure_curve(
        inputs.model,
        inputs.side.known_step.parameter_delta,
        [sign * s for s in forward for sign in (1, -1)],
        inputs.eval_batch,
        inputs.numbers.eval_statistics,
        passes=inputs.passes,
        known={m.scale: m.after for m in step_numbers(inputs).measured if m.after is not None},
    )
    split = step_numbers(inputs).predictions.per_token["split"]["total"]
    return measure_orders(
        curve.scales.numpy(),
        curve.changes.numpy(),
        None if curve.left_out is None else curve.left_out.numpy(),
        effective_sample_sizes=curve.effective_sample_sizes.numpy(),
        sequences=curve.sequences,
        slope={"value": split.value, "standard_error": split.standard_error, **ends_of(split.value, split.left_out)},
    )


def attribution(inputs: AnalysisInputs) -> AttributionResult:
    """analyses/attribution.py, down to the tokens of the sequences that moved entropy most."""
    step, sampling = step_numbers(inputs), inputs.plan.sampling_config
    rollouts, advantages = inputs.training.rollouts, inputs.training.advantages
    return attribute_step(
        TrainingShares(
            labels=inputs.training_labels(),
            shares=step.attribution.shares.numpy(),
            horizon_factor=step.attribution.horizon_factor,
            effects=step.attribution.effects.numpy(),
            advantages=None if advantages is None else advantages.double().numpy(),
            endings=rollouts.endings(sampling),
        ),
        TokenDetail(
            shares=inputs.token_shares.numpy(),
            mask=inputs.side.batch.completion_mask.cpu().numpy(),
            texts=[token_texts(inputs.tokenizer, ids) for ids in rollouts.completion_ids],
            drawn=rollouts.drawn,
        ),
        EvaluationTerms(
            labels=inputs.evaluation_labels(),
            contributions=step.predictions.contributions.cpu().numpy(),
            own_changes=step.predictions.own_changes.cpu().numpy(),
            endings=inputs.evaluation.endings(sampling),
        ),
    )


def step_measurement(inputs: AnalysisInputs) -> StepMeasurement:
    """Real steps with other weights from this checkpoint."""
    numbers, side = inputs.numbers, inputs.side
    return StepMeasurement(
        inputs.model,
        inputs.optimizer if side.adam_step is not None else None,
        side.rows,
        inputs.eval_batch,
        numbers.eval_statistics,
        max_grad_norm=side.max_grad_norm,
        learning_rate=side.learning_rate,
        measure=entropy_change(numbers.estimand),
        passes=inputs.passes,
    )


def intervention(inputs: AnalysisInputs) -> InterventionResult:
    """analyses/intervention.py: shares of the measurement's own derivative first, then those of the report."""
    found, estimand, side = step_numbers(inputs).attribution, inputs.numbers.estimand, inputs.side
    settings = inputs.config.entropy_analysis
    assert side.weights is not None
    weights, seed = side.weights.double().cpu(), inputs.config.seed
    active = int((weights != 0).sum())
    possible = math.comb(active, active // 2) if active > 1 else 0
    count = min(settings.analysis.intervention_subsets, possible)
    if count < _FEWEST_SUBSETS:
        raise NotApplicable(f"the {active} training sequences with a weight can be halved in {possible} ways only")
    steps = step_measurement(inputs)
    own = estimand.derivative
    predictions = {own: SharePrediction(found.measurement_shares.numpy(), _rest(inputs, own))}
    if side.adam_step is not None:
        others = torch.zeros(min(_RESPONSE_SUBSETS, count), len(weights), dtype=torch.float64)
        others[:, weights != 0] = torch.from_numpy(half_subsets(active, len(others), seed + 1)).double()
        response = steps.response_shares(inputs.gradients[own], weights, others)
        predictions["response"] = SharePrediction(response.shares.numpy(), response.rest, with_clipping=False)
    if estimand.gradient != own:
        predictions[estimand.gradient] = SharePrediction(found.shares.numpy(), _rest(inputs, estimand.gradient))
    proof = prove_by_intervention(
        steps.change, weights.numpy(), predictions, clip=steps.clip, halves=Halves(count, seed=seed)
    )
    lowest = steps.lowest_effective_sample_size
    return proof.model_copy(update={"effective_part": None if lowest is None else lowest / len(inputs.eval_batch)})


def _rest(inputs: AnalysisInputs, estimator: str) -> float:
    """What momentum and decay are predicted to do."""
    parts = step_numbers(inputs).predictions.per_token[estimator]
    return parts["momentum"].value + parts["weight_decay"].value


def weighting_schemes(inputs: AnalysisInputs) -> WeightingResult:
    """analyses/weighting_schemes.py; with `weighting_steps` each weighting's real step at equal length is measured."""
    longest = inputs.plan.sampling_config.max_completion_length
    if inputs.numbers.kernels is None:
        arrays = inputs.step_arrays()
        table = table_of_weightings(arrays, longest, respond=lambda columns: _responses(inputs, columns))
    else:
        arrays = inputs.kernel_arrays()
        table = table_of_weightings(arrays, longest)
    if not np.isfinite(arrays.training.reward).all():
        why = {"reason": "not all training sequences have rewards"}
        rows = tuple(row.model_copy(update=why) if row.kind == "scheme" else row for row in table.rows)
        table = table.model_copy(update={"rows": rows})
    if not inputs.config.entropy_analysis.analysis.weighting_steps:
        return table
    steps = step_measurement(inputs)

    def changes(weights: np.ndarray) -> tuple[torch.Tensor, float]:
        """The change, then the change with each group of prompts left out; and the effective sample, in sequences."""
        curve = measure_curve(
            inputs.model,
            steps.step(torch.from_numpy(weights)),
            (1.0,),
            inputs.eval_batch,
            inputs.numbers.eval_statistics,
            passes=inputs.passes,
        )
        found = curve.changes if curve.left_out is None else torch.cat([curve.changes, curve.left_out[:, 0]])
        return found, float(curve.effective_sample_sizes[0])

    rest, rest_size = changes(np.zeros(len(inputs.training.rollouts)))
    measured = {}
    for row in table.rows:
        if row.scale is None or row.scale.equal_length is None:
            continue
        change, size = changes(row.scale.equal_length * np.array(table.weights[row.name]))
        difference = change - rest
        error = jackknife_standard_error(difference[1:]) if len(difference) > 2 else None
        measured[row.name] = {"equal_length": (float(difference[0]), error, min(size, rest_size))}
    return with_measurements(table, measured)


def _responses(inputs: AnalysisInputs, columns: np.ndarray) -> Responses:
    """In place of kernels."""
    side, settings, p = inputs.side, inputs.config.entropy_analysis.fisher_kernel, None
    step = side.adam_step
    if step is not None:
        try:
            p = preconditioner_of(inputs.model, settings.preconditioning, step, step.state, side.gradient)
        except UserError as error:  # the step itself needs no such P
            raise NotApplicable(str(error)) from error
    evaluation = EvaluationSide(inputs.eval_batch, inputs.numbers.eval_statistics, inputs.numbers.estimand)
    weightings, passes = list(torch.from_numpy(columns).T), inputs.passes
    found = products_with_weightings(inputs.model, evaluation, side.true_rows, weightings, p, passes)
    return Responses(*(values.cpu().numpy() for values in found))


def baselines(inputs: AnalysisInputs) -> BaselinesResult:
    """analyses/baselines.py; the predictors from the literature see the training buffer's tokens, as their papers do."""
    step, side = step_numbers(inputs), inputs.side
    full = step.measured_step
    tokens = (side.statistics.logprobs.cpu(), side.batch.completion_mask.cpu())
    advantages, rate = torch.from_numpy(inputs.advantages()), next(iter(side.known_step.rates().values()))
    entropies = side.statistics.entropies.cpu()
    return baseline_table(
        step.predictions.per_token,
        full.snis if full else None,
        measured_fixed_prefix=full.fixed_prefix if full else None,
        without_preconditioner=step.predictions.without_preconditioner,
        covariance=covariance_predictor(*tokens, advantages, rate),
        natural_covariance=covariance_predictor(*tokens, advantages, rate, natural_gradient=True),
        steer=steer_predictor(tokens[0], entropies, tokens[1], advantages, rate),
    )


def prices(inputs: AnalysisInputs) -> PricesResult:
    """analyses/prices.py; the sequences of highest cost are chosen on every other evaluation prompt."""
    numbers, side, settings = inputs.numbers, inputs.side, inputs.config.entropy_analysis
    step_numbers(inputs)
    assert side.weights is not None
    passes = inputs.passes
    prompts = inputs.eval_batch.prompt_index
    chosen_on = (torch.searchsorted(prompts.unique(), prompts) % 2 == 0).cpu()
    rewards, truncated = inputs.training_labels().reward, inputs.truncated()[1]
    tokens = TrainingTokens(
        batch=side.batch,
        statistics=side.statistics,
        weights=side.weights.double(),
        advantages=torch.from_numpy(inputs.advantages()).to(side.weights.device),
        rewards=torch.from_numpy(rewards),
        truncated=torch.from_numpy(truncated).to(side.weights.device),
        max_completion_length=inputs.plan.sampling_config.max_completion_length,
        costliest=_costliest(inputs, chosen_on, passes),
    )
    priced = PriceInputs(
        model=inputs.model,
        steps=StepMaker(side.known_step, trainable_parameters(inputs.model), side.max_grad_norm),
        tokens=tokens,
        rows=_kept_rows(inputs, passes),
        evaluation=EvaluationSide(inputs.eval_batch, numbers.eval_statistics, numbers.estimand),
        gradient_of_h=inputs.gradients[numbers.estimand.gradient],
        rewards=torch.from_numpy(inputs.evaluation_labels().reward),
        judged=~chosen_on,
        passes=passes,
    )

    def reference() -> TokenStatistics | str:
        return reference_statistics(inputs.model, side.batch, passes)

    return price_list(priced, reference, settings.analysis.price_steps)


def _kept_rows(inputs: AnalysisInputs, passes: PassSettings) -> TrainingRows:
    """The training rows, formed once where an analysis without a matrix kept none and few bytes hold them: many weightings
    of them are asked for."""
    side = inputs.side
    size = len(side.batch) * sum(p.numel() * p.element_size() for p in trainable_parameters(inputs.model).values())
    if not isinstance(side.rows, RecomputedRows) or any(any_of([size > _ROWS_HELD])):
        return side.rows
    return KeptRows(per_sequence_gradients(inputs.model, side.batch, passes, as_trained=True))


def _costliest(inputs: AnalysisInputs, chosen_on: torch.Tensor, passes: PassSettings) -> torch.Tensor | None:
    """Training sequences that lower entropy, from the costliest on, by the evaluation sequences `chosen_on`."""
    rows = chosen_on.nonzero().flatten()
    batch = inputs.eval_batch.select(rows.tolist())
    if len(batch.prompt_index.unique()) < 2 or bool(chosen_on.all()):
        return None
    cost = _cost_by_contributions(inputs, chosen_on)
    if cost is None:
        cost = _cost_by_gradient(inputs, batch, inputs.numbers.eval_statistics.select(rows), passes)
    order = cost.argsort(stable=True)
    return order[cost[order] < 0]


def _cost_by_contributions(inputs: AnalysisInputs, chosen_on: torch.Tensor) -> torch.Tensor | None:
    """(n_train,) effects or shares from the sums that the kernel's pass left; None where it left none."""
    if inputs.decisive is None:
        return None
    prompts, statistics = inputs.eval_batch.prompt_index.cpu(), inputs.numbers.eval_statistics
    counts = np.isin(prompts.unique(), prompts[chosen_on])[None].astype(float)
    side = (
        prompts.numpy(),
        statistics.entropy_sums().cpu().numpy(),
        inputs.eval_batch.completion_lengths.cpu().numpy(),
    )
    return torch.from_numpy(numbers_of_draws(counts, inputs.decisive, *side)[0])


def _cost_by_gradient(
    inputs: AnalysisInputs, batch: SequenceBatch, statistics: TokenStatistics, passes: PassSettings
) -> torch.Tensor:
    """(n_train,) the same by the gradient of entropy on `batch`."""
    side, estimator = inputs.side, inputs.numbers.estimand.gradient
    assert side.weights is not None
    gradient = entropy_gradient(inputs.model, batch, estimator, statistics=statistics, passes=passes)
    if decided_by_effect(own_part_of_second_moment(side.known_step)):
        return effects_of_leaving_out(gradient, side.gradient, side.rows, side.weights, side.known_step)
    products = side.rows.products(side.known_step.share_direction(gradient))
    return side.known_step.clip * side.weights.double().cpu() * products
