"""Estimates of an analysis as the records that summary.json holds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.uncertainty import jackknife_standard_error, leave_one_prompt_out
from entropy_experiments.records.estimates import Estimate, Measurement
from entropy_experiments.statistics.jackknife_interval import JackknifeInterval, jackknife_interval
from entropy_experiments.step.numbers import Estimate as ComputedEstimate


def finite_number(value: float | None) -> float | None:
    """`value`, or None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def ratio_estimate(above: Tensor, prompt_index: Tensor, below: Tensor | None = None) -> Estimate:
    """sum(above) / sum(below), (N,) each over sequences, with its jackknife over prompts; below: by default 1, for a mean."""
    below = torch.ones_like(above) if below is None else below
    left_out = leave_one_prompt_out(above, prompt_index, below)
    value = float(above.sum() / below.sum())
    return stored_estimate(ComputedEstimate(value, jackknife_standard_error(left_out), left_out))


def interval_estimate(value: float, left_out: np.ndarray) -> Estimate:
    """A value with the interval of its (B,) values with each prompt left out; null where it is not known."""
    found = jackknife_interval(value, left_out)
    error = finite_number(float(found.standard_error))
    return Estimate(value=finite_number(value), standard_error=error, **found.as_dict())


def stored_estimate(e: ComputedEstimate) -> Estimate:
    """The record of an estimate; without an interval where its values with each prompt left out are not known."""
    value, error = finite_number(e.value), finite_number(e.standard_error)
    if e.left_out is None:
        return Estimate(value=value, standard_error=error)
    ends = jackknife_interval(e.value, e.left_out.cpu().numpy())
    return Estimate(value=value, standard_error=error, **ends.as_dict())


def stored_measurement(m: EntropyMeasurement) -> Measurement:
    """The record of a measured change; without an interval where the effective sample size is below half."""
    ends: dict[str, float | None] = dict.fromkeys(("low", "high", "degrees_of_freedom"))
    if m.trustworthy and m.left_out is not None:
        found: JackknifeInterval = jackknife_interval(
            m.change, m.left_out.cpu().numpy(), m.effective_sample_size / m.sequences
        )
        ends = found.as_dict()
    return Measurement(
        value=finite_number(m.change),
        standard_error=finite_number(m.standard_error),
        **ends,
        trustworthy=m.trustworthy,
        before=finite_number(m.before),
        after=finite_number(m.after),
        effective_sample_size=finite_number(m.effective_sample_size),
        n=m.sequences,
    )
