"""Prompts that the probe cannot draw fresh completions of, as the trainer would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_training.algs.model_inputs import row_beyond_text
from rl_training.errors import UserError

# Attributes of a GRPOTrainer by which something else than the policy writes into completions, and the arguments they come from.
_ENVIRONMENTS = {"tools": "tools", "environment_factories": "environment_factory", "rollout_func": "rollout_func"}


def environment_of(trainer: Any) -> str | None:
    """The argument by which the trainer lets tools or an environment write into completions, or None."""
    return next((argument for name, argument in _ENVIRONMENTS.items() if getattr(trainer, name, None)), None)


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
