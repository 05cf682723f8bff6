"""How many layers a configuration asks for, read before anything is built of it: a number in a text file costs nothing, and a
model with so many layers takes for ever, without weights too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from rl_training.errors import UserError

_MOST = 4096
"""Layers or experts; models have up to a few hundred of either."""
_COUNTS = re.compile(r"(layers?|experts?|blocks|depth)$")


def refuse_endless_layers(name: str, source: str, local_files_only: bool = False) -> None:
    """Raises UserError for a configuration of more layers or experts than any model has, and what transformers raises for one
    that it cannot read.

    Args:
        name: what the user calls the model.
        source: its folder, or its id on the hub.
        local_files_only: fetch nothing from the hub.
    """
    content, _ = PretrainedConfig.get_config_dict(source, local_files_only=local_files_only)
    for key, count in _counts(content):
        if count > _MOST:
            raise UserError(
                f"{name}: its config.json has {key}={count}, and no model has more than {_MOST} of them: it is damaged or was "
                "tampered with; copy it again"
            )


def _counts(content: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    left = [content]
    while left:
        for key, value in left.pop().items():
            if isinstance(value, Mapping):
                left.append(value)
            elif isinstance(value, int | float) and _COUNTS.search(str(key)):
                yield str(key), value
