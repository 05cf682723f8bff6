"""Types below float32, and whether values are theirs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from entropy_core.formed import PIECE

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names in records, of weights and of mixed precision."""


def held_in(values: Iterable[Tensor]) -> str | None:
    """The type below float32 that all of the values are values of, bfloat16 before float16; None where they are of neither."""
    tensors = list(values)
    return next((name for name in ("bfloat16", "float16") if all(holds_exactly(t, HALF[name]) for t in tensors)), None)


def holds_exactly(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all of the values are values of `dtype`."""
    flat = values.detach().reshape(-1)
    return all(bool(torch.equal(piece, piece.to(dtype).to(piece.dtype))) for piece in flat.split(PIECE))
