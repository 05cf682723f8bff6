"""What the definitions of logged numbers have in common: one field for each choice, so that two
differ in named choices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Definition:
    """Of tokens, of batches, or of the probe's numbers; every field at its default is the one that
    the trainer states.
    """

    def changes(self, other: Self) -> list[tuple[str, Any]]:
        """(field, value) of this one where the two differ."""
        return [
            (f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)
        ]
