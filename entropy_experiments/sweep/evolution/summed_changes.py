"""Sums of predicted and of measured changes over checkpoints, with errors that know which evaluation prompts these share.

    T = sum_k x_k,      T_{-p} = sum_k x_{k,-p},      se(T) by the jackknife over prompts

where all checkpoints have the same evaluation prompts: what a prompt adds to every checkpoint alike adds up, and is not averaged
away as independent errors would be. Where prompts differ, errors are taken as independent.
entropy_experiments.records.leave_one_out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.records.leave_one_out import read_leave_one_out
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.statistics.confidence import freedom_of
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom, jackknife_interval
from entropy_experiments.statistics.largest_part import largest_part
from rl_training.intervals import interval, welch_freedom


def sums_with_errors(points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """ "predicted" and "actual" -> {"value", "standard_error", "low", "high", "degrees_of_freedom"} of the sums over (folder,
    `checkpoint_row`) pairs that have both, low to high their 95% interval.

    None where there is no point, or no error.
    """
    weights = [1.0] * len(points)
    return {
        "predicted": weighted_sum(points, "total", weights),
        "actual": weighted_sum(points, "actual", weights),
    }


def weighted_sum(
    points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]], kind: str, weights: Sequence[float]
) -> dict[str, float | None]:
    """Sum of w_k x_k over (folder, `checkpoint_row`) pairs, x a part of the prediction or the "actual" change, as in
    `sums_with_errors`.
    """
    nothing: dict[str, float | None] = dict.fromkeys(("value", "standard_error", "low", "high", "degrees_of_freedom"))
    entries = [row["actual"] if kind == "actual" else row["predicted"][kind] for _, row in points]
    if not points or any(entry is None for entry in entries):
        return nothing
    series, shared = _series(points, kind)
    value = float(sum(w * entry["value"] for w, entry in zip(weights, entries, strict=True)))
    found = nothing | {"value": value}
    if shared:
        total = np.sum([w * s.numpy() for w, s in zip(weights, series, strict=True) if s is not None], axis=0)
        known = jackknife_interval(value, total)
        error = float(known.standard_error)
        found |= {"standard_error": error if math.isfinite(error) else None, **known.as_dict()}
    elif all(entry["standard_error"] is not None for entry in entries):
        errors = [abs(w) * entry["standard_error"] for w, entry in zip(weights, entries, strict=True)]
        found |= _of_independent(errors, [_freedom(*pair) for pair in zip(entries, series, strict=True)], value)
    return found


def largest_of_sums(
    points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]], parts: Sequence[str], weights: Sequence[float]
) -> dict[str, Any] | None:
    """Which part's sum is the largest, by the paired difference (statistics.largest_part); None where checkpoints do not share
    their evaluation prompts, or a part is not known at all of them.
    """
    found = {}
    for part in parts:
        entries = [row["predicted"][part] for _, row in points]
        series, shared = _series(points, part)
        if not shared or any(entry is None for entry in entries):
            return None
        value = float(sum(w * entry["value"] for w, entry in zip(weights, entries, strict=True)))
        total = np.sum([w * s.numpy() for w, s in zip(weights, series, strict=True)], axis=0)
        found[part] = value, total
    largest = largest_part(found)
    return None if largest is None else largest.as_dict()


def _series(points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]], kind: str) -> tuple[list[Any], bool]:
    """(values with each prompt left out of every checkpoint, None where not known; whether all have them on the same prompts)."""
    tables = [read_leave_one_out(folder.path) for folder, _ in points]
    keys = [_column(row, kind) for _, row in points]
    series = [t.columns.get(key) if t else None for t, key in zip(tables, keys, strict=True)]
    prompts = [t.prompts if t else () for t in tables]
    shared = bool(points) and all(s is not None for s in series) and all(p == prompts[0] for p in prompts)
    return series, shared


def _freedom(entry: Mapping[str, Any], series: Any) -> float:
    """Of one summand: of its values with each prompt left out, else as its entry says."""
    return freedom_of(entry) if series is None else float(effective_degrees_of_freedom(series.numpy()))


def _of_independent(errors: Sequence[float], freedoms: Sequence[float], value: float) -> dict[str, float | None]:
    """Of a sum over checkpoints with prompts of their own: in quadrature, on Welch's degrees of freedom."""
    error, freedom = math.hypot(*errors), welch_freedom(zip(errors, freedoms, strict=True))
    low, high = interval(value, error, freedom)
    known = freedom if math.isfinite(freedom) else None
    return {"standard_error": error, "low": low, "high": high, "degrees_of_freedom": known}


def _column(row: Mapping[str, Any], kind: str) -> str:
    if kind == "actual":
        return "actual.fixed_prefix" if row["estimator"] == "fixed_prefix" else "actual.snis"
    return f"predicted.{row['estimator']}.{kind}"
