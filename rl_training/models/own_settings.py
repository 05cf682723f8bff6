"""A model's own settings of generation, which `generate` takes where it is told nothing else: under peft's wrappers too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def model_settings_of(model: Any) -> Any:
    """The model's own `generation_config` as `model.generate` will have it, None where there is none.

    An adapter's wrapper that was given one hands it to the model inside whenever it generates, in place of that model's own.
    """
    return next((settings for _, settings in _given(model)), None)


@contextmanager
def model_settings(model: Any, settings: Any) -> Iterator[None]:
    """Inside, `model.generate` takes what is left open from these settings, and no wrapper puts others in their place.

    Args:
        settings: a GenerationConfig; None changes nothing.
    """
    kept = [] if settings is None else _given(model)
    for holder, _ in kept:
        holder.generation_config = settings
    try:
        yield
    finally:
        for holder, found in kept:
            holder.generation_config = found


def _holders(model: Any) -> list[Any]:
    """The model and what its adapters are around, the outermost first."""
    found = [model]
    while callable(inner := getattr(found[-1], "get_base_model", None)) and inner() is not found[-1]:
        found.append(inner())
    return found


def _given(model: Any) -> list[tuple[Any, Any]]:
    """(holder, its settings), the outermost first, of those that have any."""
    holders = _holders(model)
    found = [(holder, _own_settings(holder, holder is holders[-1])) for holder in holders]
    return [(holder, settings) for holder, settings in found if settings is not None]


def _own_settings(holder: Any, innermost: bool) -> Any:
    """What the holder itself was given: a wrapper hands on the attributes of what is inside. Its settings count where its
    `generate` speaks of them (of peft's wrappers only those of a named task put theirs in the place of others).
    """
    if innermost:
        return getattr(holder, "generation_config", None)
    code = getattr(inspect.unwrap(getattr(type(holder), "generate", _own_settings)), "__code__", None)
    return vars(holder).get("generation_config") if code is None or "generation_config" in code.co_names else None
