"""What the step is predicted to do, from products of the evaluation rows with its parts, or from derivatives along them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entropy_core.directional import entropy_derivatives, token_derivatives
from entropy_core.entropy import Estimator
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import contributions_without_each_prompt
from entropy_experiments.kernel.contraction import PARTS, STEP_VECTORS, RowKind
from entropy_experiments.step.evaluation_products import (
    EvaluationProducts,
    EvaluationSide,
    error_is_known,
    estimate_with_error,
)
from entropy_experiments.step.numbers import Estimate, PartsByEstimator, Predictions


def predictions_from_products(side: EvaluationSide, steps: Mapping[RowKind, Tensor]) -> Predictions:
    """steps: kind -> (n_eval, len(STEP_VECTORS)) products of rows with the step's vectors."""
    products = EvaluationProducts(side, {kind: matrix.double() for kind, matrix in steps.items()})
    found: dict[bool, PartsByEstimator] = {}
    for per_token in (True, False):
        estimates = {e: products.estimate(e, per_token) for e in side.estimand.estimators}
        found[per_token] = {e: dict(zip(PARTS, columns, strict=False)) for e, columns in estimates.items()}
        if per_token:
            without = estimates[side.estimand.gradient][STEP_VECTORS.index("without_preconditioner")]
    total = STEP_VECTORS.index("total")
    contributions = products.of(side.estimand.gradient, True)[:, total] / len(side.batch)
    return Predictions(found[True], found[False], without, contributions, products.products["own_tokens"][:, total])


def predictions_by_derivatives(
    model: nn.Module,
    side: EvaluationSide,
    vectors: Mapping[str, Mapping[str, Tensor]],
    passes: PassSettings,
    kernel_part: float | None = None,
) -> Predictions:
    """Over all trainable parameters, from one pass in forward mode along each of the step's vectors.

    vectors: STEP_VECTORS -> name -> tensor. kernel_part: the predicted total over the kernel's modules alone, to say what these
    leave out; None where they leave out none.
    """
    estimators, own, count = side.estimand.estimators, side.estimand.gradient, len(side.batch)
    along = {name: token_derivatives(model, side.batch, vectors[name], passes) for name in STEP_VECTORS}

    def predicted(per_token: bool) -> PartsByEstimator:
        return {e: {part: _estimate(side, along[part], e, per_token) for part in PARTS} for e in estimators}

    def contributions(estimator: Estimator, per_token: bool) -> Tensor:
        return entropy_derivatives(side.statistics, along["total"], side.batch, estimator, per_token)

    per_token = predicted(True)
    whole = per_token[own]["total"].value
    return Predictions(
        per_token,
        predicted(False),
        _estimate(side, along["without_preconditioner"], own, True),
        contributions(own, True) / count,
        contributions("fixed_prefix", False),
        None if whole == 0.0 or kernel_part is None else 1.0 - kernel_part / whole,
    )


def total_along(model: nn.Module, side: EvaluationSide, part: Mapping[str, Tensor], passes: PassSettings) -> float:
    """The predicted change along one vector by the estimand's own estimator, nats per token, from one pass in forward mode."""
    along = token_derivatives(model, side.batch, part, passes)
    return float(entropy_derivatives(side.statistics, along, side.batch, side.estimand.gradient, True).mean())


def _estimate(side: EvaluationSide, along: TokenStatistics, estimator: Estimator, per_token: bool) -> Estimate:
    def of_rows(kept: Tensor) -> Tensor:
        some = side.batch.select(kept.tolist())
        return entropy_derivatives(side.statistics.select(kept), along.select(kept), some, estimator, per_token)

    value = of_rows(torch.arange(len(side.batch))).mean()
    if not error_is_known(estimator, side.batch):
        return Estimate(float(value), math.nan, None)
    return estimate_with_error(value, contributions_without_each_prompt(side.batch.prompt_index, of_rows))
