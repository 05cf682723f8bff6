"""An `optimizer.pt` of bitsandbytes, in 8 or in 32 bits, as the state of torch's AdamW; any other
is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from entropy_experiments.checkpoints.readers.bitsandbytes_state import from_bitsandbytes, is_bitsandbytes
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor


@dataclass(frozen=True)
class Converted:
    """state: with exp_avg and exp_avg_sq. converted: whether bitsandbytes wrote it. rounded:
    whether 8 bits rounded it.
    """

    state: Any
    converted: bool = False
    rounded: bool = False


def as_adamw(path: Path, state: Any) -> Converted:
    """The state dict of an `optimizer.pt` as torch's AdamW has it, in float32 where it was in 8
    bits.

    Args:
        path: For messages.
        state: What torch.save wrote.

    Raises:
        UserError: For another optimizer of bitsandbytes than AdamW, or blocks and maps that do not
            fit.
    """
    entries, groups = (state.get("state"), state.get("param_groups")) if isinstance(state, dict) else (None, None)
    whole = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
    if not whole or not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return Converted(state)
    if not is_bitsandbytes(entries, groups) or not all(isinstance(group.get("params"), list) for group in groups):
        return Converted(state)
    lazy = {key: {k: _lazy(path, v) for k, v in entry.items()} for key, entry in entries.items()}
    found = from_bitsandbytes(path, lazy, groups)
    moments = {
        key: {"step": float(entry.step), "exp_avg": entry.first.read(), "exp_avg_sq": entry.second.read()}
        for key, entry in found.entries.items()
    }
    named = [{**group.settings, "params": list(group.keys)} for group in found.groups]
    return Converted({"state": moments, "param_groups": named}, True, found.quantised)


def _lazy(path: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lazy(path, v) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    return LazyTensor(tuple(value.shape), value.dtype, str(path), lambda: value)


def rounded_note(state: dict[str, Any]) -> str:
    """What is to be said of moments that 8 bits rounded."""
    squares = [entry["exp_avg_sq"] for entry in state["state"].values()]
    zeros = sum(int((v == 0).sum()) for v in squares) / max(sum(v.numel() for v in squares), 1)
    return (
        f"moments were stored in 8 bits (bitsandbytes) and are rounded; {zeros:.1%} of the second moments are 0 in "
        "them, whose P is 1/eps: the run's own step was as rounded"
    )
