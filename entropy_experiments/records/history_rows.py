"""`training_history.json`: one row a logged or probed training step, ascending; see records/history.py for where they are from.

Logs and trainer states are strangers' files, so that a standard error here may be anything finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from entropy_experiments.records.record import Count, Finite, Number, Record, Rows


class HistoryRow(Record):
    """One training step. Rates and sums of the probe are in nats per token; a field is absent where nothing was logged."""

    step: Count
    """The training step, counted from 1."""
    entropy: Number = None
    """Entropy as the trainer logged it, nats per token: of the sequences it trained on."""
    entropy_se: Number = None
    """Its standard error."""
    entropy_df: Number = None
    """Degrees of freedom behind that."""
    reward: Number = None
    """Mean reward, of all prompts where that was logged."""
    reward_se: Number = None
    """Its standard error."""
    reward_df: Number = None
    """Degrees of freedom behind that."""
    probe_entropy: Number = Field(None, alias="probe/entropy")
    """Entropy of the sequences that the probe watched, before any was left out, nats per token."""
    probe_entropy_se: Number = Field(None, alias="probe/entropy_se")
    """Its standard error."""
    probe_predicted: Number = Field(None, alias="probe/predicted")
    """Predicted change of entropy by this step, nats per token."""
    probe_predicted_se: Number = Field(None, alias="probe/predicted_se")
    """Its standard error."""
    probe_predicted_df: Number = Field(None, alias="probe/predicted_df")
    """Degrees of freedom behind that."""
    probe_predicted_deviations: Rows[Finite] | None = Field(None, alias="probe/predicted_deviations")
    """Deviations of the prediction by fold, nats per token, from which sums over steps have their errors."""
    probe_batch: Number = Field(None, alias="probe/batch")
    """Part of the prediction by this step's batch."""
    probe_momentum: Number = Field(None, alias="probe/momentum")
    """Part of the prediction by momentum."""
    probe_decay: Number = Field(None, alias="probe/decay")
    """Part of the prediction by weight decay."""
    probe_measured: Number = Field(None, alias="probe/measured")
    """Measured change of entropy by this step, nats per token."""
    probe_measured_se: Number = Field(None, alias="probe/measured_se")
    """Its standard error."""
    probe_measured_df: Number = Field(None, alias="probe/measured_df")
    """Degrees of freedom behind that."""
    probe_measured_over: Number = Field(None, alias="probe/measured_over")
    """Steps up to this one that it is the mean of, where it was measured by forward passes."""
    probe_watched_for: Number = Field(None, alias="probe/watched_for")
    """Steps that a sequence is watched for at most, so that entropies of so many steps err alike."""
    probe_measured_deviations: Rows[Finite] | None = Field(None, alias="probe/measured_deviations")
    """Deviations of the steps' measured change by fold of held-out prompts, nats per token: sums have their errors from them."""
    probe_ess: Number = Field(None, alias="probe/ess")
    """Effective sample size of the measurement, in sequences."""
    probe_low_ess: Number = Field(None, alias="probe/low_ess")
    """1 where that is below half of the sequences, which is in no sum; else 0."""
    probe_mean_of: Count | None = Field(None, alias="probe/mean_of")
    """The row's probe values are means over so many steps; absent where they are this step's own."""


def values_of(rows: Sequence[HistoryRow], field: str) -> np.ndarray:
    """One field of the rows as (len(rows),) float64, NaN where nothing was logged."""
    values = [getattr(row, field) for row in rows]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
