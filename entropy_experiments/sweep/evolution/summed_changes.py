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
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom, jackknife_interval
from rl_training.intervals import interval, welch_freedom


def sums_with_errors(points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """ "predicted" and "actual" -> {"value", "standard_error", "low", "high", "degrees_of_freedom"} of the sums over (folder,
    `checkpoint_row`) pairs that have both, low to high their 95% interval.

    None where there is no point, or no error.
    """
    tables = [read_leave_one_out(folder.path) for folder, _ in points]
    found = {}
    for kind in ("predicted", "actual"):
        entries = [row["predicted"]["total"] if kind == "predicted" else row["actual"] for _, row in points]
        keys = [_column(row, kind) for _, row in points]
        series = [t.columns.get(key) if t else None for t, key in zip(tables, keys, strict=True)]
        prompts = [t.prompts if t else () for t in tables]
        value = sum(entry["value"] for entry in entries) if points else None
        found[kind] = dict.fromkeys(("standard_error", "low", "high", "degrees_of_freedom")) | {"value": value}
        if value is None:
            continue
        if all(s is not None for s in series) and all(p == prompts[0] for p in prompts):
            total = np.sum([s.numpy() for s in series if s is not None], axis=0)
            known = jackknife_interval(value, total)
            error = float(known.standard_error)
            found[kind] |= {"standard_error": error if math.isfinite(error) else None, **known.as_dict()}
        elif all(entry["standard_error"] is not None for entry in entries):
            found[kind] |= _of_independent([entry["standard_error"] for entry in entries], series, value)
    return found


def _of_independent(errors: Sequence[float], series: Sequence[Any], value: float) -> dict[str, float]:
    """Of a sum over checkpoints with prompts of their own: in quadrature, on Welch's degrees of freedom."""
    error = math.hypot(*errors)
    freedoms = [math.inf if s is None else float(effective_degrees_of_freedom(s.numpy())) for s in series]
    freedom = welch_freedom(zip(errors, freedoms, strict=True))
    low, high = interval(value, error, freedom)
    return {"standard_error": error, "low": low, "high": high, "degrees_of_freedom": freedom}


def _column(row: Mapping[str, Any], kind: str) -> str:
    given = row["estimator"] == "fixed_prefix"
    if kind == "predicted":
        return f"predicted.{row['estimator']}.total"
    return "actual.fixed_prefix" if given else "actual.snis"
