"""The entropy probe's own numbers in a log, checked against recorded sequences and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropy_experiments.audit.causes import Window, exactly, in_words, where_known
from entropy_experiments.audit.logged_values import LoggedRow, rounding
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.probe_definitions import METRICS, PROBE_ALTERNATIVES, ProbeDefinition, ProbeMeans
from entropy_experiments.audit.recorded_run import RecordedRun
from entropy_experiments.audit.result import Audit, ranges
from entropy_experiments.audit.verdicts import judge
from rl_training.errors import UserError

_FLOAT32 = 2e-5
# Of a change of entropy, a small difference of large numbers whose weights are exponentials of sums
# over tokens.
_RELATIVE, _LEAST = 2e-3, 1e-5


def audit_probe(
    audit: Audit, run: RecordedRun, rows: Sequence[LoggedRow], auditable: Sequence[LoggedRow], policies: Policies
) -> None:
    """Adds findings on `entropy_probe/entropy`, `measured` and `measured_fixed_prefix`; says why
    there are none.
    """
    logged = [name for name in METRICS if any(f"entropy_probe/{name}" in row.values for row in auditable)]
    if not logged:
        return
    try:
        means = ProbeMeans(run, policies)
    except UserError as error:
        audit.unaudited.append(f"entropy_probe/*: {error}")
        return
    single = [row for row in auditable if row.first == row.step]
    known = [row for row in single if _same_sequences(means, row)]
    if other := [row.step for row in single if row not in known and "entropy_probe/weights_ess" in row.values]:
        audit.unaudited.append(
            f"entropy_probe/* at steps {ranges(other)}: the sequences it watched are not found again from config.yaml (another "
            "release, or a run that was resumed with other settings)"
        )
    for name in logged:
        right = ProbeDefinition(name)
        windows = [w for row in known if (w := _window(run, rows, row, name, means, policies)) is not None]
        choices = {
            **PROBE_ALTERNATIVES,
            "quantity": {k: v for k, v in PROBE_ALTERNATIVES["quantity"].items() if k != name},
        }
        value, key = where_known(means.value), f"entropy_probe/{name}"
        audit.findings += judge(
            key, right, choices, value, windows, exactly, lambda changes: in_words(changes, PROBE_ALTERNATIVES)
        )


def _same_sequences(means: ProbeMeans, row: LoggedRow) -> bool:
    logged = row.values.get("entropy_probe/weights_ess")
    return logged is not None and abs(logged - means.weights_ess(row.step)) <= 1e-4 * max(1.0, abs(logged))


def _window(
    run: RecordedRun, rows: Sequence[LoggedRow], row: LoggedRow, name: str, means: ProbeMeans, policies: Policies
) -> Window | None:
    key = f"entropy_probe/{name}"
    if key not in row.values or (name != "entropy" and policies.why_not(row.step) is not None):
        return None
    value = means.value(ProbeDefinition(name), row.steps)
    if math.isnan(value):
        return None
    written = rounding(rows, [key])
    rounded = _FLOAT32 * max(1.0, abs(value)) if name == "entropy" else _RELATIVE * abs(value) + _LEAST
    return Window(row.steps, row.values[key], value, written + rounded)
