"""Whether the settings of a parameter group are AdamW's, before anything is computed or printed of
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_training.errors import UserError

_SETTINGS = ("lr", "eps", "weight_decay", "initial_lr")
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")


def checked_settings(where: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same settings. Raises UserError unless they are numbers and flags, as AdamW's are; their
    ranges are looked at later.
    """
    betas = settings.get("betas")
    pair = betas if isinstance(betas, list | tuple) and len(betas) == 2 else (None,)
    values = [*(settings[name] for name in _SETTINGS if settings.get(name) is not None), *pair]
    flags = [settings[name] for name in _FLAGS if settings.get(name) is not None]
    required = all(settings.get(name) is not None for name in ("lr", "eps", "weight_decay"))
    if not required or not all(map(_is_number, values)) or not all(isinstance(flag, bool) for flag in flags):
        raise UserError(
            f"{where}: its parameter groups have no settings of AdamW (rates, betas, eps, decay): copy it again"
        )
    return settings


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e30
