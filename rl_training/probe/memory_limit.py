"""A bound on what the probe may hold beside activations, kept before anything is taken."""

from __future__ import annotations

from rl_training.errors import UserError


def refuse_beyond(limit: int | None, needed: int, what: str, remedy: str) -> None:
    """Compare what a setting needs with `memory_limit`.

    Args:
        limit: bytes; None for no limit.
        needed: bytes.
        what: the setting, as the user wrote it.
        remedy: what to do instead.

    Raises:
        UserError: where more is needed than the limit.
    """
    if limit is not None and needed > limit:
        raise UserError(
            f"entropy_probe.{what} holds up to {needed / 1e9:,.1f} GB beside activations, more than memory_limit "
            f"({limit / 1e9:,.1f} GB): {remedy}, or raise memory_limit"
        )
