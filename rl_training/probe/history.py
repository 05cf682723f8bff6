"""Every probed step's numbers, kept in the trainer's state, so that each checkpoint holds the history up to it.

A trainer logs once in `logging_steps` steps, and TRL logs the mean of what it was given since the last time: sums of changes,
counts and correlations cannot be found again from that. `trainer_state.json` keeps `stateful_callbacks` as it is; under
`STATE_KEY` there is one list a number, as long as there are probed steps, null where a step has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

STATE_KEY = "entropy_probe"

KEPT = (
    "entropy", "predicted", "predicted_se", "batch", "momentum", "decay", "measured", "measured_se", "ess", "low_ess",
)  # fmt: skip
"""Names of `metrics_of` that are kept of every step."""

RUNNING = (
    "steps", "measured_steps", "low_ess_steps", "cumulative_predicted", "cumulative_measured",
    "cumulative_predicted_where_measured", "correlation",
)  # fmt: skip
"""Names of `ProbeHistory.totals`: values at a step, of which a window's last one counts and no mean."""


class ProbeHistory:
    """Columns by name, `step` among them; shared with the trainer's state from `begin` on."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = _no_columns()

    def begin(self, callbacks: dict[str, Any], last_step: int) -> None:
        """A run begins after `last_step`. callbacks: `TrainerState.stateful_callbacks`, of the checkpoint where it is resumed."""
        found = callbacks.get(STATE_KEY)
        columns = _no_columns()
        if isinstance(found, Mapping) and isinstance(found.get("step"), list):
            places = [i for i, step in enumerate(found["step"]) if step <= last_step]
            for name in columns:
                values = found.get(name, [])
                columns[name] = [values[i] if i < len(values) else None for i in places]
        self._columns = callbacks[STATE_KEY] = columns

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: of `metrics_of`, of step `step` (counted from 1)."""
        self._columns["step"].append(step)
        for name in KEPT:
            self._columns[name].append(metrics.get(name))

    def totals(self) -> dict[str, float]:
        """Sums so far, nats per token, and from the third measured step on the correlation of predicted and measured.

        steps: all predicted ones, and cumulative_predicted over them. measured_steps: those that were measured as well
        (refresh_every) on an effective sample of at least half the sequences; cumulative_measured and
        cumulative_predicted_where_measured (where it differs) over them. low_ess_steps: measured on less, and in no sum but
        cumulative_predicted. Steps that were not probed (log_every) are in none.
        """
        predicted, measured = (_floats(self._columns[name]) for name in ("predicted", "measured"))
        low = _floats(self._columns["low_ess"]) == 1.0
        both = np.isfinite(measured) & ~low
        totals = {"steps": float(len(predicted)), "cumulative_predicted": float(predicted.sum())}
        totals["measured_steps"] = float(both.sum())
        if low.any():
            totals["low_ess_steps"] = float(low.sum())
        if both.any():
            totals["cumulative_measured"] = float(measured[both].sum())
            if not both.all():
                totals["cumulative_predicted_where_measured"] = float(predicted[both].sum())
        if both.sum() > 2 and predicted[both].std() > 0 and measured[both].std() > 0:
            totals["correlation"] = float(np.corrcoef(predicted[both], measured[both])[0, 1])
        return totals


def _no_columns() -> dict[str, list[Any]]:
    return {name: [] for name in ("step", *KEPT)}


def _floats(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
