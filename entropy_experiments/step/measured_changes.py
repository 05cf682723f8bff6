"""What the step really does to entropy on the evaluation tokens, at several sizes, and whether predictions are its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from entropy_core.directional import weights_moved
from entropy_core.measurement import EntropyMeasurement, fixed_prefix_entropy_change, snis_entropy_change
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_experiments.run.reporter import Reporter
from entropy_experiments.run.self_checks import SelfCheck
from entropy_experiments.statistics.estimand import Estimand
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.numbers import Estimate, MeasuredScale

_SLOPE_TOLERANCE = 0.02


def entropy_change(estimand: Estimand) -> Callable[..., EntropyMeasurement]:
    """The function that measures the estimand's change: of statistics before and after, and their batch."""
    return snis_entropy_change if estimand.measure == "snis" else fixed_prefix_entropy_change


def resolution(before: float) -> float:
    """What a float32 forward pass knows of a mean entropy of `before` nats: a few units in the last place."""
    return 32 * torch.finfo(torch.float32).eps * before


def measure_scales(
    model: nn.Module,
    side: EvaluationSide,
    step: Mapping[str, Tensor],
    scales: Sequence[float],
    passes: PassSettings,
    reporter: Reporter,
) -> tuple[MeasuredScale, ...]:
    """The measured changes at these multiples of the step and at 1, in ascending order."""
    before, found = side.statistics, []
    for scale in sorted({*scales, 1.0}):
        reporter.stage(f"measuring at {scale:g} x the step")
        with weights_moved(model, step, scale):
            after = token_statistics(model, side.batch, passes)
        snis = snis_entropy_change(before, after, side.batch) if side.estimand.measure == "snis" else None
        found.append(MeasuredScale(scale, snis, fixed_prefix_entropy_change(before, after, side.batch), after))
    return tuple(found)


def check_slope(
    model: nn.Module,
    side: EvaluationSide,
    step: Mapping[str, Tensor],
    predicted: Estimate,
    entropy: float,
    passes: PassSettings,
) -> SelfCheck:
    """The slope of the measurement at no step against `predicted`, the total by the estimand's `derivative`.

    entropy: before the step, nats per token.
    """
    change, errors = entropy_change(side.estimand), []
    for small in (1 / 16, 1 / 64):  # a router of experts that jumps on the way does so less on a shorter one
        changes = []
        for sign in (1, -1):
            with weights_moved(model, step, sign * small):
                after = token_statistics(model, side.batch, passes)
            changes.append(change(side.statistics, after, side.batch).change)
        slope = (changes[0] - changes[1]) / (2 * small)
        error = 0.0 if math.isnan(predicted.standard_error) else predicted.standard_error  # unknown with one prompt
        # a slope over 2/16 of a step has a floor
        size = max(abs(predicted.value), error, 50 * resolution(entropy) / small)
        errors.append(abs(slope - predicted.value) / size)
        if errors[-1] <= _SLOPE_TOLERANCE:
            break
    return SelfCheck(
        "slope of the measurement = its derivative", min(errors), _SLOPE_TOLERANCE,
        f"central difference of the measured entropy at 1/16 of the step (or 1/64) against its exact derivative, the "
        f"{side.estimand.derivative} estimator on the same tokens, relative to the largest of the prediction, its standard error "
        "and 50 times the rounding of float32. Pins every sign and normaliser.",
    )  # fmt: skip
