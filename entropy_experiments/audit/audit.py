"""Hold a run's log against what its recorded sequences and checkpoints give, metric by metric and step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from entropy_experiments.audit.batch_definitions import BatchDefinition, BatchMeans
from entropy_experiments.audit.batch_definitions import alternatives as batch_alternatives
from entropy_experiments.audit.causes import Cause, Window, find_causes
from entropy_experiments.audit.logged_values import LoggedRow, logged_rows, rounding
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import RecordedRun, read_run
from entropy_experiments.audit.token_definitions import ALTERNATIVES, TokenDefinition, TokenMeans
from entropy_experiments.audit.token_precision import TokenPrecision
from rl_training.errors import UserError

AGREES, DIFFERS, UNEXPLAINED, RECOMPUTED = "agrees", "differs", "unexplained", "recomputed"
# Relative difference between two float32 computations of one number, with a wide margin.
_FLOAT32 = 2e-5
# Of KL, a small difference of large numbers.
_FLOAT32_OF_KL, _LEAST_OF_KL = 1e-3, 1e-6
# Float32 sums of integers and of rewards.
_EXACT = 2e-6
_WINDOWS_SEARCHED = 6


# Shown beside what was logged, of everything that was generated.
_SHOWN = {
    "entropy of all drawn tokens": TokenDefinition(sequences="generated", average="tokens"),
    "surprisal of all drawn tokens": TokenDefinition("surprisal", sequences="generated", average="tokens"),
}


@dataclass(frozen=True)
class Finding:
    """One logged number. why: the cause where it differs, or what to know where it agrees. status: see the constants above."""

    metric: str
    first_step: int
    step: int
    logged: float | None
    recomputed: float
    tolerance: float
    status: str
    why: str = ""

    @property
    def difference(self) -> float:
        return math.nan if self.logged is None else self.logged - self.recomputed


@dataclass
class Audit:
    """What was found. unaudited: what could not be held against anything, and how to make it auditable, a line each."""

    run: Path
    findings: list[Finding] = field(default_factory=list)
    unaudited: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether no number differs."""
        return all(f.status in (AGREES, RECOMPUTED) for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, NaN as null."""
        rows = [{**asdict(f), "difference": f.difference} for f in self.findings]
        plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        return {
            "run": str(self.run),
            "agrees": self.agrees,
            "findings": plain,
            "unaudited": self.unaudited,
            "notes": self.notes,
        }


def audit_run(path: str | Path, device: str = "auto", steps: Sequence[int] | None = None, trust: bool = False) -> Audit:
    """Audit the log of a run folder. steps: optimizer steps to look at, all by default. trust: whether the task that the record
    names may open files and import, to score completions anew.

    Raises UserError where the folder holds no run, no log or no recorded sequences, or none of the wanted steps.
    """
    run = read_run(path)
    return audit_recorded(run, Policies(run, device), steps, trust)


def audit_recorded(
    run: RecordedRun, policies: Policies, steps: Sequence[int] | None = None, trust: bool = False
) -> Audit:
    """`audit_run` of a run that was read already."""
    rows = logged_rows(run.log)
    wanted = [r for r in rows if steps is None or any(s in r.steps for s in steps)]
    if not wanted:
        asked = (
            ""
            if steps is None
            else f" for the steps asked for (logged are {_ranges([r.step for r in rows]) or 'none'})"
        )
        raise UserError(
            f"{run.folder}: its log has no training metrics{asked}: set logging_steps, and name logged steps"
        )
    audit = Audit(run.folder)
    _audit_batches(audit, run, rows, wanted, trust)
    _audit_tokens(audit, run, rows, wanted, policies)
    _say_what_is_left(audit, rows)
    return audit


# ---------------------------------------------------------------------- lengths and rewards
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
    }
    functions = list(run.settings.reward_names)
    if not functions:  # rollouts/ keep the total alone
        named = [n for n in names if n.startswith("rewards/") and n.endswith("/mean")]
        functions = [named[0].removeprefix("rewards/").removesuffix("/mean")] if len(named) == 1 else []
    for n, name in enumerate(functions):
        known[f"rewards/{name}/mean"] = BatchDefinition(f"reward:{n}")
        known[f"rewards/{name}/std"] = BatchDefinition(f"reward:{n}", "std")
    return {name: d for name, d in known.items() if name in names}


def _audit_batches(
    audit: Audit, run: RecordedRun, rows: Sequence[LoggedRow], wanted: Sequence[LoggedRow], trust: bool
) -> None:
    from entropy_experiments.audit.rewards_again import score_again

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
                windows.append(Window(row.steps, row.values[name], value, tolerance))
        choices = batch_alternatives(right, run)
        audit.findings += _judge(
            name, right, choices, means.value, windows, lambda d: 0.0, lambda c, k=choices: _plain(c, k)
        )


def _plain(changes: Sequence[tuple[str, Any]], choices: Mapping[str, Mapping[Any, str]]) -> str:
    return " and ".join(choices[name][value] for name, value in changes)


# ---------------------------------------------------------------------- means over tokens
def _audit_tokens(
    audit: Audit, run: RecordedRun, rows: Sequence[LoggedRow], wanted: Sequence[LoggedRow], policies: Policies
) -> None:
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
    if "kl" in metrics and policies.why_not(0) is None:
        for row in auditable:  # one policy after the other: each is loaded once
            means.value(TokenDefinition(policy="beginning"), row.steps)
    shown = {}
    for row in auditable:
        for name, definition in _SHOWN.items():
            shown[name, row.step] = means.value(definition, row.steps)
            means.value(TokenDefinition(), row.steps)
    for name, right in metrics.items():
        if name == "kl" and (why := policies.why_not(0)) is not None:
            audit.unaudited.append(f"kl: its reference policy cannot be had: {why}")
            continue
        written = rounding(rows, [name])
        windows = []
        for row in auditable:
            if name in row.values and not math.isnan(value := means.value(right, row.steps)):
                rounded = (
                    _FLOAT32_OF_KL * abs(value) + _LEAST_OF_KL if name == "kl" else _FLOAT32 * max(1.0, abs(value))
                )
                tolerance = written + rounded + precision.of_run(row.steps, right)
                windows.append(Window(row.steps, row.values[name], value, tolerance))
        choices = _token_choices(run, right)
        slack = precision.slack([w.steps for w in windows])
        audit.findings += _judge_tokens(name, right, choices, means, windows, slack, run)
    for row in auditable:
        for name in _SHOWN:
            audit.findings.append(Finding(name, row.first, row.step, None, shown[name, row.step], math.nan, RECOMPUTED))
    audit.notes += policies.notes
    if any(not run.record(step).order_known for row in auditable for step in row.steps):
        audit.notes.append(
            "which sequences were in which micro-batch is not recorded (an older release made this run), so `entropy`, a mean of "
            "micro-batches' means, is known up to the tolerance given"
        )


def _lacking(run: RecordedRun, policies: Policies, row: LoggedRow) -> str | None:
    """Why the token metrics of a row cannot be audited, with the remedy; None where they can."""
    missing = [step for step in row.steps if step not in run.steps]
    if missing:
        return f"step {row.step}: the sequences of step{'s' if len(missing) > 1 else ''} {_ranges(missing)} are not recorded"
    without = {step - 1: why for step in row.steps if (why := policies.why_not(step - 1)) is not None}
    if not without:
        return None
    needed = f"the polic{'ies' if len(without) > 1 else 'y'} after step{'s' if len(without) > 1 else ''} {_ranges(list(without))}"
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
    slack: Callable[[Any], float],
    run: RecordedRun,
) -> list[Finding]:
    from entropy_experiments.audit.token_definitions import words

    def value(definition: TokenDefinition, steps: range) -> float:
        try:
            return means.value(definition, steps)
        except UserError:  # a policy that this alternative needs is not there
            return math.nan

    differing = [w for w in windows if w.differs]
    searched = _some(differing)
    if differing and not find_causes(right, choices, value, searched, slack, pairs_too=False):
        from entropy_experiments.audit.solved_temperature import solve_temperature

        if (found := solve_temperature(right, value, searched)) is not None:
            choices = {**choices, "temperature": [*choices["temperature"], found]}
    return _judge(name, right, choices, value, windows, slack, lambda c: words(c, run.settings))


# ---------------------------------------------------------------------- verdicts
def _judge(
    name: str,
    right: Any,
    choices: Mapping[str, Any],
    value: Callable[[Any, range], float],
    windows: Sequence[Window],
    slack: Callable[[Any], float],
    say: Callable[[Sequence[tuple[str, Any]]], str],
) -> list[Finding]:
    listed = {key: list(values) for key, values in choices.items()}
    differing = [w for w in windows if w.differs]
    named, hints = _explain(right, listed, value, differing, slack, say) if differing else ({}, {})
    out = []
    for w in windows:
        key = w.steps[-1]
        status = AGREES if not w.differs else DIFFERS if key in named else UNEXPLAINED
        why = named.get(key, hints.get(key, "")) if w.differs else ""
        out.append(Finding(name, w.steps[0], key, w.logged, w.right, w.tolerance, status, why))
    return out


def _explain(
    right: Any,
    choices: Mapping[str, Sequence[Any]],
    value: Callable[[Any, range], float],
    differing: Sequence[Window],
    slack: Callable[[Any], float],
    say: Callable[[Sequence[tuple[str, Any]]], str],
) -> tuple[dict[int, str], dict[int, str]]:
    """(causes, what would explain single numbers), by the last step of the window.

    A cause is one for all numbers that differ; else for several of them, each of which it explains alone. What fits one number of
    several is no cause: with so many alternatives something always fits somewhere.
    """
    joint = find_causes(right, choices, value, _some(differing), slack)
    joint = [c for c in joint if all(_holds(c, right, value, w, slack) for w in differing)]
    if joint:
        return {w.steps[-1]: _sentence(joint, say) for w in differing}, {}
    fitting = {w.steps[-1]: find_causes(right, choices, value, [w], slack, pairs_too=False) for w in _some(differing)}
    counts = Counter(cause.changes for causes in fitting.values() for cause in causes)
    named, hints = {}, {}
    for step, causes in fitting.items():
        most = max((counts[c.changes] for c in causes), default=0)
        best = [c for c in causes if counts[c.changes] == most]
        if best:
            (named if most > 1 else hints)[step] = _sentence(best, say)
    return named, hints


def _holds(cause: Cause, right: Any, value: Any, window: Window, slack: Callable[[Any], float]) -> bool:
    definition = replace(right, **dict(cause.changes))
    return abs(value(definition, window.steps) - window.logged) <= max(window.tolerance, slack(definition))


def _sentence(causes: Sequence[Cause], say: Callable[[Sequence[tuple[str, Any]]], str]) -> str:
    said = list(dict.fromkeys(say(c.changes) for c in causes))
    if len(said) == 1:
        return said[0]
    return "one of these, which the numbers cannot tell apart: " + "; ".join(said)


def _some(windows: Sequence[Window]) -> list[Window]:
    """At most so many, evenly taken: each alternative is computed at each."""
    if len(windows) <= _WINDOWS_SEARCHED:
        return list(windows)
    return [windows[round(i * (len(windows) - 1) / (_WINDOWS_SEARCHED - 1))] for i in range(_WINDOWS_SEARCHED)]


def _say_missing(audit: Audit, what: str, rows: Sequence[LoggedRow], why: str) -> None:
    if rows:
        audit.unaudited.append(f"{what} of the log's rows at steps {_ranges([r.step for r in rows])}: {why}")


def _say_what_is_left(audit: Audit, rows: Sequence[LoggedRow]) -> None:
    """Names in the log that nothing was held against."""
    seen = {f.metric for f in audit.findings} | {"epoch", "step", "total_flos"}
    left = sorted({name for row in rows for name in row.values} - seen)
    if left:
        audit.notes.append("logged, and not audited: " + ", ".join(left))


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1 to 3, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
