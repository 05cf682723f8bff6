"""What an audit found, for the command line and for whoever reads its JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entropy_experiments.audit.verdicts import AGREES, RECOMPUTED, Finding


@dataclass
class Audit:
    """What was found.

    Attributes:
        unaudited: what could not be compared with anything, and how to make it auditable, a line
            each.
    """

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


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1 to 3, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
