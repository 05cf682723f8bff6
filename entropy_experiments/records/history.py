"""A run's log as reports know it: one row a training step, and of the probe's numbers each step's own.

A trainer that logs once in several steps logs means over them. What the probe predicted and measured of every step stands in the
checkpoint's `trainer_state.json` (rl_training.probe.history), which is taken in place of what was logged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from entropy_experiments.records.history_rows import HistoryRow, values_of
from entropy_experiments.statistics.confidence import Known
from entropy_experiments.statistics.correlation import Correlation, correlation
from entropy_experiments.statistics.jackknife_interval import effective_degrees_of_freedom
from entropy_experiments.text.numbers import as_number
from rl_training.intervals import interval, welch_freedom
from rl_training.probe.history import (
    DEVIATIONS,
    FOLDS,
    KEPT,
    MEASURED_DEVIATIONS,
    STATE_KEY,
    error_of_sum,
)

# The first of several names that was logged counts; each with its error and the degrees of freedom behind that.
_LOGGED = {
    "entropy": ("entropy",),
    "reward": ("buffer/reward_all_prompts", "buffer/reward_first_round", "reward"),
}
_PROBE = {f"probe/{name}": f"entropy_probe/{name}" for name in KEPT}


def training_history(
    log_history: Sequence[Mapping[str, Any]], trainer_state: Mapping[str, Any] | None = None
) -> list[HistoryRow]:
    """One row a logged or probed step, ascending; logs of plain TRL fill fewer fields.

    Args:
        log_history: What the trainer logged, an entry a logging step.
        trainer_state: The checkpoint's, for each step's own probe values; without them rows of several steps say of how many
            theirs are the means (`HistoryRow.probe_mean_of`).
    """
    by_step = _probed_steps(trainer_state or {})
    rows: dict[int, dict[str, Any]] = {}
    before = steps_before = 0
    for entry in log_history:
        step = entry.get("step")
        if "loss" not in entry or not _is_step(step):
            continue
        row = rows[step] = {"step": step}
        row |= _logged(entry)
        probe = {new: entry[old] for new, old in _PROBE.items() if as_number(entry.get(old)) is not None}
        if probe and not by_step:
            # The probe counts its steps; logs of before it did are only known to be of single steps if none was left out.
            count = as_number(entry.get("entropy_probe/steps"))
            between = step - before if count is None else count - steps_before
            steps_before = steps_before if count is None else int(count)
            row |= probe | ({"probe/mean_of": int(between)} if between > 1 else {})
        before = step
    for step, values in by_step.items():
        rows.setdefault(step, {"step": step}).update(values)
    return [HistoryRow.model_validate(rows[step]) for step in sorted(rows)]


def _is_step(step: object) -> TypeGuard[int]:
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= 2**53


def _logged(entry: Mapping[str, Any]) -> dict[str, Any]:
    row = {}
    for name, candidates in _LOGGED.items():
        old = next((candidate for candidate in candidates if as_number(entry.get(candidate)) is not None), None)
        if old is not None:
            row |= {
                f"{name}{end}": entry[f"{old}{end}"]
                for end in ("", "_se", "_df")
                if as_number(entry.get(f"{old}{end}")) is not None
            }
    return row


def stored_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `trainer_state.json`; empty where there is none."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return state if isinstance(state, dict) else {}


def _probed_steps(trainer_state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Step -> its probe values; empty where the state holds none, or not as it should (it is a stranger's file)."""
    callbacks = trainer_state.get("stateful_callbacks")
    columns = callbacks.get(STATE_KEY) if isinstance(callbacks, Mapping) else None
    steps = columns.get("step") if isinstance(columns, Mapping) else None
    if not isinstance(columns, Mapping) or not isinstance(steps, list):
        return {}
    out: dict[int, dict[str, Any]] = {step: {} for step in steps if _is_step(step)}
    for name in KEPT:
        values = columns.get(name)
        if isinstance(values, list) and len(values) == len(steps):
            for step, value in zip(steps, values, strict=True):
                if _is_step(step) and step in out and as_number(value) is not None:
                    out[step][f"probe/{name}"] = value
    for name in (DEVIATIONS, MEASURED_DEVIATIONS):
        folds = columns.get(name)
        if not isinstance(folds, list) or len(folds) != len(steps):
            continue
        for step, values in zip(steps, folds, strict=True):
            known = isinstance(values, list) and all(as_number(value) is not None for value in values)
            if _is_step(step) and step in out and known:
                out[step][f"probe/{name}"] = values
    return out


@dataclass(frozen=True)
class ProbedSums:
    """Sums over the steps that were predicted and measured on a sample to be trusted, nats per token, with 95% intervals; the
    correlation over them; and how many further steps were measured on an effective sample of less than half the sequences.

    difference: predicted minus measured, with the error of that difference; None where the two are not known on the same prompts.
    """

    steps: int
    predicted: Known
    measured: Known
    difference: Known | None
    correlation: Correlation | None
    left_out: int


def probed_sums(rows: Sequence[HistoryRow]) -> ProbedSums | None:
    """None where no step has both and can be trusted.

    Predictions share a running average, or held-out sequences, measurements these: their errors add fold by fold
    (rl_training.probe.history.error_of_sum). Of measurements on each step's own sequences they add in quadrature.
    """
    predicted, measured = (values_of(rows, f"probe_{name}") for name in ("predicted", "measured"))
    both, low = np.isfinite(predicted) & np.isfinite(measured), values_of(rows, "probe_low_ess") == 1.0
    used = np.flatnonzero(both & ~low)
    if not len(used):
        return None
    chosen = [rows[k] for k in used]
    errors, freedoms = (
        [values_of(chosen, f"probe_{name}_{end}") for name in ("predicted", "measured")] for end in ("se", "df")
    )
    deviations = [[row.probe_predicted_deviations for row in chosen], [row.probe_measured_deviations for row in chosen]]
    sums = [Known(float(predicted[used].sum())), Known(float(measured[used].sum()))]
    error = error_of_sum(errors[0], deviations[0])
    if error is not None and np.isfinite(freedoms[0]).all():
        sums[0] = Known(
            sums[0].value, *interval(sums[0].value, error, _freedom_of_sum(freedoms[0].tolist(), deviations[0]))
        )
    if np.isfinite(errors[1]).all() and np.isfinite(freedoms[1]).all():
        freedom = welch_freedom(zip(errors[1].tolist(), freedoms[1].tolist(), strict=True))
        error = float(np.linalg.norm(errors[1]))
        if any(deviations[1]):
            error, freedom = error_of_sum(errors[1], deviations[1]) or 0.0, _freedom_of_sum([freedom], deviations[1])
        sums[1] = Known(sums[1].value, *interval(sums[1].value, error, freedom))
    alone = (values_of(chosen, "probe_measured_over") == 1.0).all()
    apart = _difference(sums[0].value - sums[1].value, *deviations) if alone else None
    found = correlation(predicted[used], measured[used])
    return ProbedSums(len(used), sums[0], sums[1], apart, found, int((both & low).sum()))


def _difference(value: float, predicted: Sequence[Any], measured: Sequence[Any]) -> Known | None:
    """Of two sums whose deviations are of the same parts of the prompts; None where they are not."""
    pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if p and m and len(p) == len(m) == FOLDS]
    if len(pairs) < len(predicted):
        return None
    apart = [(np.asarray(p, np.float64) - np.asarray(m, np.float64)).tolist() for p, m in pairs]
    error = float(np.linalg.norm(np.sum(apart, axis=0)))
    return Known(value, *interval(value, error, _freedom_of_sum([], apart)))


def _freedom_of_sum(freedoms: Sequence[float], deviations: Sequence[Any]) -> float:
    """Degrees of freedom behind `error_of_sum`: of the summed deviations where they add up part by part, else the fewest of any
    summand's."""
    known = [d for d in deviations if isinstance(d, list | tuple) and d]
    if not known or len(known) < len(deviations) or len({len(d) for d in known}) > 1:
        return min(freedoms, default=math.inf)
    total = np.asarray(known, np.float64).sum(0)
    return float(effective_degrees_of_freedom(total))


def holds_means(rows: Sequence[HistoryRow]) -> bool:
    """Whether some probe values are means over several steps, so that they have no sums."""
    return any(row.probe_mean_of is not None for row in rows)
