"""`--steps 1,4-6` as numbers."""

from __future__ import annotations

import re

from rl_training.errors import UserError

_MOST = 10**7


def parse_steps(text: str) -> list[int]:
    """Raises UserError for anything but positive numbers and ranges, separated by commas."""
    steps: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
        if not 1 <= first <= last <= _MOST:
            raise UserError(
                f"--steps {text}: {part.strip() or 'nothing'!r} is no step; give numbers and ranges, e.g. 1,4-6"
            )
        steps += range(first, last + 1)
    return steps
