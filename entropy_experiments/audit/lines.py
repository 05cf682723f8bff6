"""An audit in lines for a person: a table of logged and recomputed values, then what could not be
audited, then the verdict.
"""

from __future__ import annotations

import math

from entropy_experiments.audit.result import Audit
from entropy_experiments.audit.verdicts import AGREES, DIFFERS, RECOMPUTED, UNEXPLAINED, Finding


def audit_lines(audit: Audit) -> list[str]:
    """A row a metric and logged step, one line each."""
    lines = [f"audit of {audit.run}"]
    if audit.findings:
        table = [("metric", "step", "logged", "recomputed", "difference", "verdict"), *map(_row, audit.findings)]
        widths = [max(len(row[column]) for row in table) for column in range(5)]
        for row in table:
            cells = [row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in range(1, 5)), row[5]]
            lines.append("  ".join(cells).rstrip())
    lines += [f"NOT AUDITED {line}" for line in audit.unaudited]
    lines += [f"note: {line}" for line in audit.notes]
    return [*lines, verdict_line(audit)]


def verdict_line(audit: Audit) -> str:
    """How many numbers agree; which metrics do not, and why."""
    held = [f for f in audit.findings if f.status != RECOMPUTED]
    wrong = [f for f in held if f.status != AGREES]
    if not held:
        return "nothing could be audited"
    if not wrong:
        return f"all {len(held)} logged numbers that were audited agree with what was recomputed"
    parts = []
    for metric in dict.fromkeys(f.metric for f in wrong):
        of_it = [f for f in wrong if f.metric == metric]
        whole = sum(f.metric == metric for f in held)
        causes = list(dict.fromkeys(_verdict(f) for f in of_it if f.status == DIFFERS))
        if any(f.status == UNEXPLAINED for f in of_it):
            largest = max((abs(f.difference) for f in of_it if f.status == UNEXPLAINED), default=0.0)
            causes.append(f"unexplained (up to {largest:.2g})")
        parts.append(f"{metric} at {len(of_it)} of {whole}: {'; '.join(causes)}")
    return f"{len(wrong)} of {len(held)} logged numbers differ from what was recomputed. {'. '.join(parts)}"


def _row(f: Finding) -> tuple[str, str, str, str, str, str]:
    steps = str(f.step) if f.first_step == f.step else f"{f.first_step}-{f.step}"
    logged = "" if f.logged is None else _number(f.logged)
    difference = "" if f.logged is None else f"{f.difference:+.2g}"
    return f.metric, steps, logged, _number(f.recomputed), difference, _verdict(f)


def _verdict(f: Finding) -> str:
    if f.status == DIFFERS:
        return f.why
    if f.status == UNEXPLAINED:
        hint = f" (the number would be that of: {f.why}; which may be an accident)" if f.why else ""
        return f"unexplained: {f.difference:+.2g}, no definition that was tried explains it{hint}"
    return "agrees" if f.status == AGREES else ""


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
