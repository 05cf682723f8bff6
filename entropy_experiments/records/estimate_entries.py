"""Estimates as summary.json holds them: value, standard error, degrees of freedom and the ends of the 95% interval.

"low" and "high" (entropy_experiments.statistics.jackknife_interval) are not symmetric about the value where few prompts are
skewed; they are null where nothing is known of the spread, and of a measurement whose effective sample size is below half:
weights that a few sequences carry have no known error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.uncertainty import jackknife_standard_error, leave_one_prompt_out
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.step.numbers import Estimate


def ratio_entry(above: Tensor, prompt_index: Tensor, below: Tensor | None = None) -> dict[str, Any]:
    """Of sum(above) / sum(below), (N,) each over sequences; below: by default 1, for a mean over sequences."""
    below = torch.ones_like(above) if below is None else below
    left_out = leave_one_prompt_out(above, prompt_index, below)
    return estimate_entry(Estimate(float(above.sum() / below.sum()), jackknife_standard_error(left_out), left_out))


def estimate_entry(e: Estimate) -> dict[str, Any]:
    """Of an estimate; without an interval where its values with each prompt left out are not known."""
    entry = {"value": e.value, "standard_error": e.standard_error}
    return entry if e.left_out is None else entry | jackknife_interval(e.value, e.left_out.cpu().numpy()).as_dict()


def measurement_entry(m: EntropyMeasurement) -> dict[str, Any]:
    """Of a measured change."""
    ends: dict[str, Any] = dict.fromkeys(("low", "high", "degrees_of_freedom"))
    if m.trustworthy and m.left_out is not None:
        ends = jackknife_interval(m.change, m.left_out.cpu().numpy(), m.effective_sample_size / m.sequences).as_dict()
    return {
        "value": m.change,
        "standard_error": m.standard_error,
        **ends,
        "trustworthy": m.trustworthy,
        "before": m.before,
        "after": m.after,
        "effective_sample_size": m.effective_sample_size,
        "n": m.sequences,
    }
