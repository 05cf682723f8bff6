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

import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.records.leave_one_out import read_leave_one_out
from entropy_experiments.records.reader import ResultsFolder


def sums_with_errors(points: Sequence[tuple[ResultsFolder, Mapping[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """ "predicted" and "actual" -> {"value", "standard_error"} of the sums over (folder, `checkpoint_row`) pairs that have both.

    None where there is no point, or no error.
    """
    tables = [read_leave_one_out(folder.path) for folder, _ in points]
    found = {}
    for kind in ("predicted", "actual"):
        entries = [row["predicted"]["total"] if kind == "predicted" else row["actual"] for _, row in points]
        keys = [_column(row, kind) for _, row in points]
        series = [t.columns.get(key) if t else None for t, key in zip(tables, keys, strict=True)]
        prompts = [t.prompts if t else () for t in tables]
        error = None
        if points and all(s is not None for s in series) and all(p == prompts[0] for p in prompts):
            known = [s for s in series if s is not None]
            error = jackknife_standard_error(torch.stack(known).sum(0))
        elif points and all(entry["standard_error"] is not None for entry in entries):
            error = math.hypot(*(entry["standard_error"] for entry in entries))
        value = sum(entry["value"] for entry in entries) if points else None
        found[kind] = {"value": value, "standard_error": error if error is not None and math.isfinite(error) else None}
    return found


def _column(row: Mapping[str, Any], kind: str) -> str:
    given = row["estimator"] == "fixed_prefix"
    if kind == "predicted":
        return f"predicted.{row['estimator']}.total"
    return "actual.fixed_prefix" if given else "actual.snis"
