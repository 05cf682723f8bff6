"""What a launcher (accelerate launch, torchrun) says in the environment, for those who must know before any group is joined."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rl_training.errors import UserError


def world_size(environ: Mapping[str, str] | None = None) -> int:
    """How many processes were launched together; 1 where there is no launcher. Raises UserError as `launcher_number`."""
    return launcher_number("WORLD_SIZE", 1, environ)


def is_first() -> bool:
    """Whether this is the first process of its launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def launcher_number(name: str, default: int, environ: Mapping[str, str] | None = None) -> int:
    """An environment variable of a launcher; `default` where it is unset or empty. Raises UserError where it is no number."""
    text = (os.environ if environ is None else environ).get(name, "").strip()
    if not text:
        return default
    if not text.isdigit():
        raise UserError(f"the environment variable {name} is {text!r}, which is no whole number")
    return int(text)
