"""Entropy, KL and the sampler of a log checked against the recorded tokens under the run's own
policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from entropy_experiments.audit.causes import Slack, Window, exactly, find_causes, where_known
from entropy_experiments.audit.logged_values import LoggedRow, rounding
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import RecordedRun
from entropy_experiments.audit.result import Audit, ranges
from entropy_experiments.audit.sampler import SAMPLER_DEFINITION, SAMPLER_METRIC, check_sampler, sampler_windows
from entropy_experiments.audit.solved_temperature import solve_temperature
from entropy_experiments.audit.token_definitions import ALTERNATIVES, TokenDefinition, TokenMeans, words
from entropy_experiments.audit.token_precision import TokenPrecision
from entropy_experiments.audit.verdicts import RECOMPUTED, Finding, judge, some

# Relative difference between two float32 computations of one number, with a wide margin.
_FLOAT32 = 2e-5
# Of KL, a small difference of large numbers.
_FLOAT32_OF_KL, _LEAST_OF_KL = 1e-3, 1e-6
# Shown beside what was logged, of everything that was generated.
ENTROPY_OF_ALL = "entropy of all drawn tokens"
# Relative gap between entropy of the loss and of everything that is said.
_WORTH_A_LINE = 0.01
_SHOWN = {
    ENTROPY_OF_ALL: TokenDefinition(sequences="generated", average="tokens"),
    "surprisal of all drawn tokens": TokenDefinition("surprisal", sequences="generated", average="tokens"),
}


def audit_tokens(
    audit: Audit, run: RecordedRun, rows: Sequence[LoggedRow], wanted: Sequence[LoggedRow], policies: Policies
) -> list[LoggedRow]:
    """Adds findings, notes, and what could not be audited.

    Args:
        rows: all of the log.
        wanted: to be looked at. Returns the rows whose policies can be had.
    """
    means = TokenMeans(run, policies)
    precision = TokenPrecision(run, policies, means)
    metrics = {"entropy": TokenDefinition()}
    if run.settings.beta != 0.0:
        metrics["kl"] = TokenDefinition(quantity="k3")
    auditable = []
    for row in wanted:
        lacking = _lacking(run, policies, row)
        if lacking:
            audit.unaudited.append(lacking)
        else:
            auditable.append(row)
    shown = _all_means(means, auditable, "kl" in metrics and policies.why_not(0) is None)
    for name, right in metrics.items():
        if name == "kl" and (why := policies.why_not(0)) is not None:
            audit.unaudited.append(f"kl: its reference policy cannot be had: {why}")
            continue
        windows = _windows(name, right, means, precision, rows, auditable)
        choices = _token_choices(run, right)
        audit.findings += _judge_tokens(name, right, choices, means, windows, precision.slack, run)
    for row in auditable:
        for name in _SHOWN:
            if not math.isnan(value := shown[name, row.step]):  # a step may generate nothing
                audit.findings.append(Finding(name, row.first, row.step, None, value, math.nan, RECOMPUTED))
    _audit_sampler(audit, run, policies, means, auditable)
    _say_what_the_loss_leaves_out(audit)
    if any(not run.record(step).order_known for row in auditable for step in row.steps):
        audit.notes.append(
            "which sequences were in which micro-batch is not recorded (an older release made this run), so `entropy`, a mean of "
            "micro-batches' means, is known up to the tolerance given"
        )
    return auditable


def _all_means(means: TokenMeans, rows: Sequence[LoggedRow], of_beginning: bool) -> dict[tuple[str, int], float]:
    """(name of _SHOWN, step) -> its mean; one policy after the other, so that each is loaded once.

    of_beginning: whether the policy that the run began with is needed too.
    """
    if of_beginning:
        for row in rows:
            means.value(TokenDefinition(policy="beginning"), row.steps)
    shown = {}
    for row in rows:
        for name, definition in _SHOWN.items():
            shown[name, row.step] = means.value(definition, row.steps)
            means.value(TokenDefinition(), row.steps)
    return shown


def _windows(
    name: str,
    right: TokenDefinition,
    means: TokenMeans,
    precision: TokenPrecision,
    rows: Sequence[LoggedRow],
    auditable: Sequence[LoggedRow],
) -> list[Window]:
    """What was logged beside what is recomputed, each with its tolerance. rows: all of the log."""
    written, windows = rounding(rows, [name]), []
    for row in auditable:
        if name in row.values and not math.isnan(value := means.value(right, row.steps)):
            rounded = _FLOAT32_OF_KL * abs(value) + _LEAST_OF_KL if name == "kl" else _FLOAT32 * max(1.0, abs(value))
            tolerance = written + rounded + precision.of_run(row.steps, right)
            windows.append(Window(row.steps, row.values[name], value, tolerance))
    return windows


def _say_what_the_loss_leaves_out(audit: Audit) -> None:
    """TRL's entropy is of the loss; where filtering or masking makes that another number than the
    policy's, say so.
    """
    whole = {f.step: f.recomputed for f in audit.findings if f.metric == ENTROPY_OF_ALL}
    gaps = {f.step: whole[f.step] - f.recomputed for f in audit.findings if f.metric == "entropy" and f.step in whole}
    if not gaps:
        return
    step = max(gaps, key=lambda s: abs(gaps[s]))
    if abs(gaps[step]) > _WORTH_A_LINE * abs(whole[step]):
        audit.notes.append(
            f"`entropy` is of the tokens in the loss, as TRL defines it; of all drawn tokens it is another number, by up to "
            f"{gaps[step]:+.3g} nats (step {step}: {whole[step]:.4g}): filtered or masked sequences, and means of micro-batches"
        )


def _audit_sampler(
    audit: Audit, run: RecordedRun, policies: Policies, means: TokenMeans, auditable: list[LoggedRow]
) -> None:
    if not auditable:
        return
    found, notes = check_sampler(run, policies, auditable)
    windows = sampler_windows(run, means, auditable)
    choices = {
        "quantity": ["entropy"],
        "temperature": [1.0],
        "tokens": ["foreign", "without_eos", "late"],
        "policy": ["after", "stale", "beginning"],
    }
    audit.findings += found
    audit.findings += _judge_tokens(SAMPLER_METRIC, SAMPLER_DEFINITION, choices, means, windows, exactly, run)
    audit.notes += notes


def _lacking(run: RecordedRun, policies: Policies, row: LoggedRow) -> str | None:
    """Why the token metrics of a row cannot be audited, with the remedy; None where they can."""
    missing = [step for step in row.steps if step not in run.steps]
    if missing:
        return f"step {row.step}: the sequences of step{'s' if len(missing) > 1 else ''} {ranges(missing)} are not recorded"
    without = {step - 1: why for step in row.steps if (why := policies.why_not(step - 1)) is not None}
    if not without:
        return None
    needed = f"the polic{'ies' if len(without) > 1 else 'y'} after step{'s' if len(without) > 1 else ''} {ranges(list(without))}"
    mean = "" if row.first == row.step else f" (its row averages steps {row.first} to {row.step})"
    remedy = "a checkpoint before each audited step (save_steps=1; training.save_every=1)"
    return f"step {row.step}{mean}: entropy needs {needed}: {next(iter(without.values()))}; train with {remedy}"


def _token_choices(run: RecordedRun, right: TokenDefinition) -> dict[str, list[Any]]:
    choices = {name: list(values) for name, values in ALTERNATIVES.items()}
    of_kl = ["k3", "k1", "k2", "k3_reversed"]
    choices["quantity"] = of_kl if right.quantity == "k3" else ["surprisal", "squared"]
    choices["precision"] = (
        ["bf16"] if run.settings.mixed_precision == "no" and run.settings.dtype == "float32" else ["float32"]
    )
    if right.quantity == "k3":
        choices["policy"] = ["after", "stale", "generation"]
    return choices


def _judge_tokens(
    name: str,
    right: TokenDefinition,
    choices: dict[str, list[Any]],
    means: TokenMeans,
    windows: Sequence[Window],
    slack: Slack,
    run: RecordedRun,
) -> list[Finding]:
    value = where_known(means.value)
    differing = [w for w in windows if w.differs]
    searched = some(differing)
    causes = find_causes(right, choices, value, searched, slack, pairs_too=False) if differing else []
    if differing and not any(c.convincing for c in causes):
        if (found := solve_temperature(right, value, searched)) is not None:
            choices = {**choices, "temperature": [*choices["temperature"], found]}
    return judge(name, right, choices, value, windows, slack, lambda c: words(c, run.settings))
