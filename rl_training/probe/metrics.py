"""The names under which a step's predicted and measured changes are logged."""

from __future__ import annotations

import math

from rl_training.probe.change import EntropyChange, StepParts
from rl_training.probe.watch import WatchedChange

_PARTS = {"total": "predicted", "batch": "batch", "momentum": "momentum", "decay": "decay"}


def metrics_of(change: EntropyChange, watched_for: int = 1) -> dict[str, float]:
    """Name -> value, nats per token unless the name says `_per_completion`; what is unknown is left out.

    predicted, batch, momentum, decay and their `_se`; entropy, entropy_se; same_tokens; measured, measured_se,
    measured_fixed_prefix; predicted_df and measured_df (of entropy_se as well): degrees of freedom behind these errors;
    difference, difference_se, difference_df: predicted minus measured, with the error of that difference;
    ess, and low_ess where it is less than half the sequences, so that the measurement is not to be trusted (1, else 0; not
    under `mode: watch`, whose measurement rests on no such weights); weights_ess; predictor_<name>. Under `mode: watch` as well
    measured_over (steps, of which `measured` is the mean), watched_for (as given: steps that a sequence is watched for at most,
    so that the entropies of so many steps err alike), measured_filtered, measured_bias (which is in it), measured_batch,
    measured_momentum and measured_decay, critic_r2.
    """
    values = _parts(change.per_token, "")
    if change.per_completion is not None:
        values |= _parts(change.per_completion, "_per_completion")
    values |= {
        "entropy": change.entropy,
        "entropy_se": change.entropy_error,
        "predicted_df": change.total.degrees_of_freedom,
        "measured_df": change.degrees_of_freedom,
        "same_tokens": change.same_tokens,
        "weights_ess": change.effective_sample_size,
        **{f"predictor_{name}": value for name, value in change.predictors.items()},
    }
    if change.measured is not None:
        values["measured"] = change.measured.change
        values["measured_se"] = change.measured.standard_error
        values["ess"] = change.measured.effective_sample_size
        values["low_ess"] = float(not change.measured.trustworthy)
    if change.measured_fixed_prefix is not None:
        values["measured_fixed_prefix"] = change.measured_fixed_prefix.change
    if change.watched is not None:
        values |= _watched(change.watched) | {"watched_for": float(watched_for)}
    if change.difference is not None:
        values["difference"] = change.difference.value
        values["difference_se"] = change.difference.standard_error
        values["difference_df"] = change.difference.degrees_of_freedom
    if change.shares is not None:
        values["largest_share"] = float(change.shares[change.shares.abs().argmax()])
    if change.effects is not None:
        values["largest_effect"] = float(change.effects[change.effects.abs().argmax()])
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    return {name: value for name, value in known.items() if not (name.endswith("_df") and math.isinf(value))}


def running_of(watched: WatchedChange) -> dict[str, float]:
    """The sum of all that was watched so far, of which a window's last value counts and no mean."""
    total = watched.cumulative
    values = {
        "cumulative_measured": total.value,
        "cumulative_measured_se": total.standard_error,
        "cumulative_measured_df": total.degrees_of_freedom,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _watched(watched: WatchedChange) -> dict[str, float]:
    each = watched.each
    values = {
        "measured": each.value,
        "measured_se": each.standard_error,
        "measured_df": each.degrees_of_freedom,
        "measured_over": float(watched.steps),
        "measured_fixed_prefix": watched.quiet.fixed_prefix / watched.steps,
        "measured_filtered": watched.filtered.value,
        "measured_filtered_se": watched.filtered.standard_error,
        "measured_bias": watched.bias / watched.steps,
        "ess": watched.effective_size,
        "critic_r2": watched.explained,
    }
    for name, part in watched.parts.items():
        values |= {f"measured_{name}": part.value, f"measured_{name}_se": part.standard_error}
    return values


def _parts(parts: StepParts, suffix: str) -> dict[str, float]:
    out = {}
    for part, name in _PARTS.items():
        estimate = getattr(parts, part)
        out[name + suffix] = estimate.value
        out[f"{name}_se{suffix}"] = estimate.standard_error
    return out
