"""Sums of predicted and of measured changes over checkpoints, with errors that know which evaluation prompts these share.

    T = sum_k x_k,      T_{-p} = sum_k x_{k,-p},      se(T) by the jackknife over prompts

where all checkpoints have the same evaluation prompts: what a prompt adds to every checkpoint alike adds up, and is not averaged
away as independent errors would be. Where prompts differ, errors are taken as independent.
entropy_experiments.records.leave_one_out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.estimate_entries import finite_number, interval_estimate
from entropy_experiments.records.estimates import NO_ESTIMATE, Estimate, LargestPartRecord
from entropy_experiments.records.evolution import CheckpointRow
from entropy_experiments.records.leave_one_out import read_leave_one_out
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom
from entropy_experiments.statistics.largest_part import largest_part
from rl_training.intervals import interval, welch_freedom

Points = Sequence[tuple[ResultsFolder, CheckpointRow]]
"""Analyses of one run, each with its row."""


def weighted_sum(points: Points, kind: str, weights: Sequence[float]) -> Estimate:
    """Sum of w_k x_k over checkpoints.

    Args:
        points: The checkpoints.
        kind: x: a part of the prediction, or "actual" for the measured change.
        weights: w, one a checkpoint.

    Returns:
        The sum with its 95% interval; null where there is no point, or an x or its error is not known.
    """
    numbers = [_number(row, kind) for _, row in points]
    values = [number.value for number in numbers if number.value is not None]
    if not points or len(values) < len(points):
        return NO_ESTIMATE
    series, shared = _series(points, kind)
    value = float(sum(w * x for w, x in zip(weights, values, strict=True)))
    if shared:
        return interval_estimate(value, _weighted(series, weights))
    errors = [number.standard_error for number in numbers if number.standard_error is not None]
    if len(errors) < len(points):
        return NO_ESTIMATE.model_copy(update={"value": value})
    # Checkpoints with prompts of their own: in quadrature, on Welch's degrees of freedom.
    scaled = [abs(w) * error for w, error in zip(weights, errors, strict=True)]
    freedoms = [_freedom(*pair) for pair in zip(numbers, series, strict=True)]
    error, freedom = math.hypot(*scaled), welch_freedom(zip(scaled, freedoms, strict=True))
    low, high = interval(value, error, freedom)
    return Estimate(value=value, standard_error=error, low=low, high=high, degrees_of_freedom=finite_number(freedom))


def largest_of_sums(points: Points, parts: Sequence[str], weights: Sequence[float]) -> LargestPartRecord | None:
    """Which part's sum is the largest, by the paired difference (statistics.largest_part).

    Returns:
        None where checkpoints do not share their evaluation prompts, or a part is not known at all of them.
    """
    sums = {}
    for part in parts:
        values = [number.value for _, row in points if (number := _number(row, part)).value is not None]
        series, shared = _series(points, part)
        if not shared or len(values) < len(points):
            return None
        sums[part] = float(sum(w * x for w, x in zip(weights, values, strict=True))), _weighted(series, weights)
    largest = largest_part(sums)
    return None if largest is None else LargestPartRecord(**largest.as_dict())


def _number(row: CheckpointRow, kind: str) -> Estimate:
    if kind == "actual":
        return row.actual or NO_ESTIMATE
    return NO_ESTIMATE if row.predicted is None else getattr(row.predicted, kind)


def _weighted(series: Sequence[Any], weights: Sequence[float]) -> np.ndarray:
    return np.sum([w * s.numpy() for w, s in zip(weights, series, strict=True)], axis=0)


def _series(points: Points, kind: str) -> tuple[list[Any], bool]:
    """(values with each prompt left out of every checkpoint, None where not known; whether all have them on the same prompts)."""
    tables = [read_leave_one_out(folder.path) for folder, _ in points]
    keys = [_column(row, kind) for _, row in points]
    series = [t.columns.get(key) if t else None for t, key in zip(tables, keys, strict=True)]
    prompts = [t.prompts if t else () for t in tables]
    shared = bool(points) and all(s is not None for s in series) and all(p == prompts[0] for p in prompts)
    return series, shared


def _freedom(number: Estimate, series: Any) -> float:
    """Of one summand: of its values with each prompt left out, else as the number says."""
    if series is not None:
        return float(effective_degrees_of_freedom(series.numpy()))
    return math.inf if number.degrees_of_freedom is None else number.degrees_of_freedom


def _column(row: CheckpointRow, kind: str) -> str:
    if kind == "actual":
        return f"actual.{'fixed_prefix' if row.estimator == 'fixed_prefix' else 'snis'}"
    return f"predicted.{row.estimator}.{kind}"
