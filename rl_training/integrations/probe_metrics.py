"""The names under which a step's predicted and measured changes are logged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_training.algs.entropy_change import EntropyChange, StepParts

_PARTS = {"total": "predicted", "batch": "batch", "momentum": "momentum", "decay": "decay"}


def metrics_of(change: EntropyChange) -> dict[str, float]:
    """Name -> value, nats per token unless the name says `_per_completion`; what is unknown is left out.

    predicted, batch, momentum, decay and their `_se`; entropy; same_tokens; measured, measured_se, measured_fixed_prefix;
    ess; weights_ess; predictor_<name>.
    """
    values = _parts(change.per_token, "")
    if change.per_completion is not None:
        values |= _parts(change.per_completion, "_per_completion")
    values |= {
        "entropy": change.entropy,
        "same_tokens": change.same_tokens,
        "weights_ess": change.effective_sample_size,
        **{f"predictor_{name}": value for name, value in change.predictors.items()},
    }
    if change.measured is not None:
        values["measured"] = change.measured.change
        values["measured_se"] = change.measured.standard_error
        values["ess"] = change.measured.effective_sample_size
    if change.measured_fixed_prefix is not None:
        values["measured_fixed_prefix"] = change.measured_fixed_prefix.change
    if change.shares is not None:
        values["largest_share"] = float(change.shares[change.shares.abs().argmax()])
    return {name: value for name, value in values.items() if value == value}


def _parts(parts: StepParts, suffix: str) -> dict[str, float]:
    out = {}
    for part, name in _PARTS.items():
        estimate = getattr(parts, part)
        out[name + suffix] = estimate.value
        out[f"{name}_se{suffix}"] = estimate.standard_error
    return out


def running_totals(history: Sequence[EntropyChange]) -> dict[str, float]:
    """Sums so far, nats per token, and from the third measured step on the correlation of predicted and measured.

    cumulative_predicted over all predicted steps; cumulative_measured and cumulative_predicted_where_measured over those
    that were measured as well (refresh_every). Steps that were not probed (log_every) are in none, nor those before a run
    was resumed.
    """
    both = [(c.total.value, c.measured.change) for c in history if c.measured is not None]
    predicted, measured = np.array(both).reshape(-1, 2).T
    totals = {"cumulative_predicted": float(sum(c.total.value for c in history))}
    if len(both):
        totals["cumulative_measured"] = float(measured.sum())
        if len(both) < len(history):
            totals["cumulative_predicted_where_measured"] = float(predicted.sum())
    if len(both) > 2 and predicted.std() > 0 and measured.std() > 0:
        totals["correlation"] = float(np.corrcoef(predicted, measured)[0, 1])
    return totals
