"""Hold a run's log against what its recorded sequences and checkpoints give, metric by metric and
step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entropy_experiments.audit.batch_audit import audit_batches
from entropy_experiments.audit.logged_values import LoggedRow, logged_rows
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.probe_audit import audit_probe
from entropy_experiments.audit.recorded_run import RecordedRun, read_run
from entropy_experiments.audit.result import Audit, ranges
from entropy_experiments.audit.token_audit import audit_tokens
from rl_training.errors import UserError


def audit_run(path: str | Path, device: str = "auto", steps: Sequence[int] | None = None, trust: bool = False) -> Audit:
    """Audit the log of a run folder.

    Args:
        steps: optimizer steps to look at, all by default.
        trust: whether the task that the record names may open files and import, to score
            completions anew.

    Raises:
        UserError: the folder holds no run, no log or no recorded sequences, or none of the wanted
            steps.
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
            "" if steps is None else f" for the steps asked for (logged are {ranges([r.step for r in rows]) or 'none'})"
        )
        raise UserError(
            f"{run.folder}: its log has no training metrics{asked}: set logging_steps, and name logged steps"
        )
    audit = Audit(run.folder)
    audit_batches(audit, run, rows, wanted, trust)
    auditable = audit_tokens(audit, run, rows, wanted, policies)
    audit_probe(audit, run, rows, auditable, policies)
    audit.notes += policies.notes
    _say_what_is_left(audit, rows)
    return audit


def _say_what_is_left(audit: Audit, rows: Sequence[LoggedRow]) -> None:
    """Names in the log that nothing was compared with."""
    seen = {f.metric for f in audit.findings} | {"epoch", "step", "total_flos"}
    left = sorted({name for row in rows for name in row.values} - seen)
    if left:
        groups: dict[str, list[str]] = {}
        for name in left:
            groups.setdefault(name.split("/")[0] if "/" in name else name, []).append(name)
        shown = [names[0] if len(names) == 1 else f"{group}/* ({len(names)})" for group, names in groups.items()]
        audit.notes.append("logged, and not audited: " + ", ".join(shown))
