"""Errors of a predicted step, prompt by prompt: derivatives of what is measured, along the step's parts, by forward passes.

    predicted = <g, dtheta> = D dh along dtheta          D dh: entropy_core.token_ratios.token_ratio_derivative

The gradient g gives the value. The derivative along the step is the same number as a statistic over prompts: its jackknife has as
many units behind it as there are prompts, where folds of a gradient have four, and its values with each prompt left out pair
with those of the measurement on the same tokens. It costs a forward-mode pass for each part that is not 0, and the memory of one
direction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.token_ratios import TokenRatioChange
from entropy_core.uncertainty import Estimate, effective_degrees_of_freedom, jackknife_standard_error
from rl_training.probe.history import FOLDS

Along = Callable[[Mapping[str, Tensor]], TokenRatioChange]
"""A direction over all trained parameters -> the derivative of what is measured, of the weights as they are."""

_GO_BY_MEASURED = "`predicted` is off by so much, `measured` is not: go by that, or train without it"
_DISAGREE = 0.05


def over_prompts(value: float, left_out: Tensor, units: list[str]) -> Estimate:
    """An estimate with the jackknife of its (B,) values with each prompt left out."""
    left_out = left_out.double().cpu()
    freedom = effective_degrees_of_freedom(left_out - left_out.mean()) if len(left_out) > 1 else math.inf
    return Estimate(value, jackknife_standard_error(left_out), freedom, tuple(by_fold(left_out, units)))


def difference(predicted: float, left_out: Tensor, measured: TokenRatioChange) -> Estimate | None:
    """Predicted minus measured of one step, with its paired error; None where they are not of the same prompts."""
    there = measured.left_out
    if len(left_out) != len(there):
        return None
    apart = (left_out.to(there) - there).double().cpu()
    found = over_prompts(predicted - measured.change, apart, [])
    return replace(found, deviations=())


def disagreement(predicted: Estimate, derivative: float, what_now: str = _GO_BY_MEASURED) -> str | None:
    """Why the gradient's value and the derivative along the same step are not one number; None where rounding explains it.

    what_now: what it does to the numbers, and the remedy.
    """
    error = predicted.standard_error
    scale = max(abs(predicted.value), abs(derivative), error if math.isfinite(error) else 0.0)
    if abs(predicted.value - derivative) <= _DISAGREE * scale:
        return None
    return (
        f"the gradient of entropy along the step gives {predicted.value:.3g}, the derivative along the same step "
        f"{derivative:.3g}: half-precision weights round one of them, or the model computes something else under a gradient "
        f"(straight-through rounding, say). {what_now}"
    )


def prompt_names(batch: SequenceBatch) -> list[str]:
    """A name for each prompt of a batch, in ascending order of index: a digest of its tokens."""
    names: dict[int, str] = {}
    ids, masks = batch.input_ids.cpu(), batch.prompt_mask.cpu()
    for prompt, row, kept in zip(batch.prompt_index.tolist(), ids, masks, strict=True):
        if prompt not in names:
            names[prompt] = hashlib.sha256(row[kept].numpy().tobytes()).hexdigest()[:16]
    return [names[prompt] for prompt in sorted(names)]


def by_fold(left_out: Tensor, units: list[str]) -> list[float]:
    """FOLDS deviations of (B,) values with each unit left out, by the units' names; empty without names."""
    if not units:
        return []
    count, out = len(left_out), [0.0] * FOLDS
    deviations = (left_out.double() - left_out.double().mean()) * math.sqrt((count - 1) / count)
    for unit, deviation in zip(units, deviations.tolist(), strict=True):
        out[int(unit, 16) % FOLDS] -= deviation
    return out
