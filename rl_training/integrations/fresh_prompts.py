"""Prompts that the probe cannot draw fresh completions of, as the trainer would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_training.errors import UserError
from rl_training.generation.drawn_tokens import environment_of
from rl_training.generation.model_inputs import row_beyond_text


def refuse_prompts(trainer: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Raises UserError where fresh completions of these rows would not be those that the trainer draws."""
    if (argument := environment_of(trainer)) is not None:
        raise UserError(
            f"rollouts=fresh: the trainer has {argument}, and the probe cannot run an environment for completions of its own; "
            "watch the run's own with rollouts=current or rollouts=previous_step"
        )
    for row in rows:
        if (kind := row_beyond_text(row)) is not None:
            raise UserError(
                f"rollouts=fresh: a prompt holds more than text ({kind}), which the probe does not pass on; give it rows of text "
                "alone (attach_entropy_probe(rows=...))"
            )
