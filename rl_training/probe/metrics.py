"""The names under which a step's predicted and measured changes are logged."""

from __future__ import annotations

from rl_training.probe.change import EntropyChange, StepParts

_PARTS = {"total": "predicted", "batch": "batch", "momentum": "momentum", "decay": "decay"}


def metrics_of(change: EntropyChange) -> dict[str, float]:
    """Name -> value, nats per token unless the name says `_per_completion`; what is unknown is left out.

    predicted, batch, momentum, decay and their `_se`; entropy; same_tokens; measured, measured_se, measured_fixed_prefix;
    ess, and low_ess where it is less than half the sequences, so that the measurement is not to be trusted (1, else 0);
    weights_ess; predictor_<name>.
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
        values["low_ess"] = float(not change.measured.trustworthy)
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
