"""The filtered training buffer: groups, what became of them, and the merging of several rounds of
generation.

A buffer always holds the same number N of sequences, because N stands in every weight: groups that
refilling could not replace stay in as *filler*, with zero advantage and so without gradient. See
docs/decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tensors of TRL's output that are padded on the left; all other matrices are aligned with
# completions, padded right.
_LEFT_PADDED = ("prompt_ids", "prompt_mask")


@dataclass
class GeneratedGroup:
    """One prompt's completions of one round: rows `rows` of that round's tensors, with what was
    decided about them.
    """

    round: int
    rows: range
    prompt: int
    draw_probability: float
    rewards: list[float]
    status: str


def pad_columns(tensor: Tensor, width: int, value: float, left: bool) -> Tensor:
    """(n, l) -> (n, width), filled with `value` on the given side."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=value)


def merge_rounds(
    outputs: Sequence[dict[str, Any]], chosen: Sequence[tuple[int, int]], pad_token_id: int
) -> dict[str, Any]:
    """Rows `chosen` (round, row) out of several rounds' outputs of TRL's generation, as one output
    of the same form.
    """
    merged: dict[str, Any] = {}
    for key, first in outputs[0].items():
        parts = [output[key] for output in outputs]
        if not isinstance(first, Tensor) or first.dim() == 0:
            continue
        if first.dim() == 2 and len({part.shape[1] for part in parts}) > 1:
            width = max(part.shape[1] for part in parts)
            fill = pad_token_id if key.endswith("_ids") else 0
            parts = [pad_columns(part, width, fill, key in _LEFT_PADDED) for part in parts]
        merged[key] = torch.stack([parts[number][row] for number, row in chosen])
    merged["num_items_in_batch"] = merged["completion_mask"].sum()
    return _without_empty_columns(merged)


def _without_empty_columns(output: dict[str, Any]) -> dict[str, Any]:
    """Drop padding that only rows not chosen needed."""
    for mask_key in ("prompt_mask", "completion_mask"):
        used = output[mask_key].any(0)
        prefix = mask_key.removesuffix("mask")
        for key, value in output.items():
            aligned = key.startswith(prefix) if prefix == "prompt_" else key not in _LEFT_PADDED
            if aligned and isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == len(used):
                output[key] = value[:, used]
    return output
