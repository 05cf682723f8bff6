"""Every probed step's numbers, kept in the trainer's state, so that each checkpoint holds the history up to it.

A trainer logs once in `logging_steps` steps, and TRL logs the mean of what it was given since the last time: sums of changes,
counts and correlations cannot be found again from that. `trainer_state.json` keeps `stateful_callbacks` as it is; under
`STATE_KEY` there is one list a number, as long as there are probed steps, null where a step has none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_training.intervals import correlation_interval

STATE_KEY = "entropy_probe"

KEPT = (
    "entropy", "entropy_se", "predicted", "predicted_se", "predicted_df", "batch", "momentum", "decay",
    "measured", "measured_se", "measured_df", "measured_over", "watched_for", "ess", "low_ess",
)  # fmt: skip
"""Names of `metrics_of` that are kept of every step."""

DEVIATIONS, MEASURED_DEVIATIONS = "predicted_deviations", "measured_deviations"
"""One list a step: the deviations of its prediction by fold (entropy_core.uncertainty.Estimate), and those of its measurement
where sequences are in several steps (rl_training.probe.watch); from them sums have errors."""

FOLDS = 16
"""Parts of held-out prompts, by their tokens, that such deviations are of (rl_training.probe.step_errors.by_fold)."""

FEWEST_CORRELATED = 8
"""Measured steps below which no correlation is logged: of fewer its 95% interval spans most of -1 to 1."""

RUNNING = (
    "steps", "measured_steps", "low_ess_steps", "cumulative_predicted", "cumulative_predicted_se", "cumulative_measured",
    "cumulative_measured_se", "cumulative_predicted_where_measured", "correlation", "correlation_low", "correlation_high",
    "cumulative_measured_df",
)  # fmt: skip
"""Names of `ProbeHistory.totals` and `metrics.running_of`: values at a step, of which a window's last one counts and no mean."""


class ProbeHistory:
    """Columns by name, `step` among them; shared with the trainer's state from `begin` on."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = _no_columns()

    def begin(self, callbacks: dict[str, Any], last_step: int) -> None:
        """A run begins after `last_step`. callbacks: `TrainerState.stateful_callbacks`, of the checkpoint where it is resumed."""
        found = callbacks.get(STATE_KEY)
        columns = _no_columns()
        if isinstance(found, Mapping) and isinstance(found.get("step"), list):
            places = [i for i, step in enumerate(found["step"]) if _is_step(step) and step <= last_step]
            for name in columns:
                values, known = found.get(name), _is_list if name in (DEVIATIONS, MEASURED_DEVIATIONS) else _is_number
                values = values if isinstance(values, list) else []
                columns[name] = [values[i] if i < len(values) and known(values[i]) else None for i in places]
        self._columns = callbacks[STATE_KEY] = columns

    def add(
        self,
        step: int,
        metrics: Mapping[str, float],
        deviations: Sequence[float] = (),
        of_measured: Sequence[float] = (),
    ) -> None:
        """metrics: of `metrics_of`, of step `step` (counted from 1). deviations, of_measured: of `predicted` and of `measured`
        together with the steps that it is over, by fold, where known.
        """
        self._columns["step"].append(step)
        self._columns[DEVIATIONS].append(list(deviations) or None)
        self._columns[MEASURED_DEVIATIONS].append(list(of_measured) or None)
        for name in KEPT:
            self._columns[name].append(metrics.get(name))

    def steps(self) -> list[dict[str, float | None]]:
        """What is kept of each step so far, by name."""
        return [{name: self._columns[name][i] for name in KEPT} for i in range(len(self._columns["step"]))]

    def totals(self) -> dict[str, float]:
        """Sums so far, nats per token, with standard errors; from the eighth measured step on the correlation of predicted and
        measured with its 95% interval.

        steps: all predicted ones, and cumulative_predicted over them. measured_steps: those that were measured as well
        (refresh_every) on an effective sample of at least half the sequences; cumulative_measured and
        cumulative_predicted_where_measured (where it differs) over them. low_ess_steps: measured on less, and in no sum but
        cumulative_predicted. Steps that were not probed (log_every) are in none.
        """
        predicted, measured = (_floats(self._columns[name]) for name in ("predicted", "measured"))
        errors = _floats(self._columns["measured_se"])
        low = _floats(self._columns["low_ess"]) == 1.0
        made = np.isfinite(predicted)
        both = np.isfinite(measured) & ~low & made
        if not made.any():  # measured alone
            return {"steps": 0.0}
        totals = {"steps": float(made.sum()), "cumulative_predicted": float(predicted[made].sum())}
        deviations = [d for d, is_made in zip(self._columns[DEVIATIONS], made, strict=True) if is_made]
        error = error_of_sum(_floats(self._columns["predicted_se"])[made], deviations)
        if error is not None:
            totals["cumulative_predicted_se"] = error
        totals["measured_steps"] = float(both.sum())
        if low.any():
            totals["low_ess_steps"] = float(low.sum())
        if both.any():
            totals["cumulative_measured"] = float(measured[both].sum())
            shared = [d for d, is_both in zip(self._columns[MEASURED_DEVIATIONS], both, strict=True) if is_both]
            if np.isfinite(errors[both]).all() and not any(shared):  # every step has sequences of its own
                totals["cumulative_measured_se"] = float(np.sqrt(np.square(errors[both]).sum()))
            if not both[made].all():
                totals["cumulative_predicted_where_measured"] = float(predicted[both].sum())
        if both.sum() >= FEWEST_CORRELATED and predicted[both].std() > 0 and measured[both].std() > 0:
            found = float(np.corrcoef(predicted[both], measured[both])[0, 1])
            low_end, high_end = correlation_interval(predicted[both], measured[both])
            totals |= {"correlation": found, "correlation_low": low_end, "correlation_high": high_end}
        return totals


def error_of_sum(errors: np.ndarray, deviations: Sequence[Any]) -> float | None:
    """Standard error of a sum of predictions that share a running average of gradients; None where one has no error.

    errors: (T,) of each; deviations: (T,) of them by fold, which add up fold by fold and so hold what the predictions share.
    Where they are not known, or differ in number, the sum of the errors: the most that it can be.
    """
    if not len(errors) or not np.isfinite(errors).all():
        return None
    known = [d for d in deviations if isinstance(d, list | tuple) and d and all(isinstance(x, int | float) for x in d)]
    if len(known) == len(errors) and len({len(d) for d in known}) == 1:
        return float(np.linalg.norm(np.sum(np.asarray(known, dtype=np.float64), axis=0)))
    return float(errors.sum())


def _no_columns() -> dict[str, list[Any]]:
    return {name: [] for name in ("step", DEVIATIONS, MEASURED_DEVIATIONS, *KEPT)}


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    """Within what a float can be: JSON knows larger ones."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _floats(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
