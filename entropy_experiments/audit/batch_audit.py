"""Lengths and rewards of a log checked against the recorded sequences: no checkpoint is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropy_experiments.audit.batch_definitions import BatchDefinition, BatchMeans
from entropy_experiments.audit.batch_definitions import alternatives as batch_alternatives
from entropy_experiments.audit.causes import Window, exactly, in_words
from entropy_experiments.audit.logged_values import LoggedRow, rounding
from entropy_experiments.audit.recorded_run import RecordedRun
from entropy_experiments.audit.result import Audit, ranges
from entropy_experiments.audit.rewards_again import score_again
from entropy_experiments.audit.verdicts import judge

# Float32 sums of integers and of rewards.
_EXACT = 2e-6


def _batch_metrics(run: RecordedRun, names: Sequence[str]) -> dict[str, BatchDefinition]:
    """Metrics of TRL by name, with their definitions."""
    known = {
        "completions/mean_length": BatchDefinition("length"),
        "completions/min_length": BatchDefinition("length", "min"),
        "completions/max_length": BatchDefinition("length", "max"),
        "completions/clipped_ratio": BatchDefinition("truncated"),
        "completions/mean_terminated_length": BatchDefinition("length", "mean", "terminated"),
        "completions/min_terminated_length": BatchDefinition("length", "min", "terminated"),
        "completions/max_terminated_length": BatchDefinition("length", "max", "terminated"),
        "reward": BatchDefinition("reward"),
        "reward_std": BatchDefinition("reward", "std"),
        "frac_reward_zero_std": BatchDefinition("no_difference"),
        "buffer/reward_first_round": BatchDefinition("reward", "mean", "first_round"),
        "buffer/reward_trained": BatchDefinition("reward", "mean", "kept", "pooled"),
    }
    functions = list(run.settings.reward_names)
    if not functions:  # rollouts/ keep the total alone
        named = [n for n in names if n.startswith("rewards/") and n.endswith("/mean")]
        functions = [named[0].removeprefix("rewards/").removesuffix("/mean")] if len(named) == 1 else []
    for n, name in enumerate(functions):
        known[f"rewards/{name}/mean"] = BatchDefinition(f"reward:{n}")
        known[f"rewards/{name}/std"] = BatchDefinition(f"reward:{n}", "std")
    return {name: d for name, d in known.items() if name in names}


def audit_batches(
    audit: Audit, run: RecordedRun, rows: Sequence[LoggedRow], wanted: Sequence[LoggedRow], trust: bool
) -> None:
    """Adds findings, and notes on how rewards compare with their function.

    Args:
        rows: all of the log.
        wanted: to be looked at.
    """
    names = sorted({name for row in rows for name in row.values})
    metrics, means = _batch_metrics(run, names), BatchMeans(run)
    written = rounding(rows, [*metrics, *(n for n in ("entropy", "kl") if n in names)])
    recorded = [row for row in wanted if all(step in run.steps for step in row.steps)]
    _say_missing(
        audit, "lengths and rewards", [r for r in wanted if r not in recorded], "its sequences are not recorded"
    )
    if any(n.startswith("reward") for n in metrics):
        audit.notes += score_again(run, [step for row in recorded for step in row.steps], trust)
    for name, right in metrics.items():
        windows = []
        for row in recorded:
            if name in row.values and not math.isnan(value := means.value(right, row.steps)):
                tolerance = written + _EXACT * max(1.0, abs(value))
                windows.append(Window(row.steps, row.values[name], value, tolerance, means.grain(right, row.steps)))
        choices = batch_alternatives(right, run)
        audit.findings += judge(
            name, right, choices, means.value, windows, exactly, lambda c, k=choices: in_words(c, k)
        )


def _say_missing(audit: Audit, what: str, rows: Sequence[LoggedRow], why: str) -> None:
    if rows:
        audit.unaudited.append(f"{what} of the log's rows at steps {ranges([r.step for r in rows])}: {why}")
