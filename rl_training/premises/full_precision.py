"""A trainer's model without its mixed precision, and how closely numbers of a run can agree with
those computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """The model's own forward inside: mixed precision would quantise log-ratios until small changes
    go flat.
    """
    wrapped = model.__dict__.get("forward")
    original = model.__dict__.get("_original_forward")
    if wrapped is None or original is None:  # accelerate wraps the forward only under mixed precision
        yield
        return
    model.__dict__["forward"] = original
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped


@dataclass(frozen=True)
class Agreement:
    """What the rounding of a run's precision explains.

    Attributes:
        gradient: of the relative error of a gradient.
        logprob: of the mean difference of a token's log-probability, nats.
    """

    precision: str
    gradient: float
    logprob: float


_FULL = Agreement("float32", 1e-3, 1e-3)
# A GPU's TF32 matrix products keep 10 bits, as float16 does; bfloat16 keeps 7. Errors of a whole
# network are some ten times the rounding of one product.
_TF32 = Agreement("TF32", 1e-2, 5e-3)
_FLOAT16 = Agreement("float16", 2e-2, 2e-2)
_BFLOAT16 = Agreement("bfloat16", 5e-2, 5e-2)


def agreement(dtype: torch.dtype, mixed_precision: str = "no") -> Agreement:
    """The agreement to ask of weights of `dtype`, computed under accelerate's `mixed_precision`
    ("no", "bf16", "fp16", ...).
    """
    if dtype == torch.bfloat16 or mixed_precision not in ("no", "fp16"):
        return _BFLOAT16
    if dtype == torch.float16 or mixed_precision == "fp16":
        return _FLOAT16
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return _TF32 if dtype == torch.float32 and tf32 else _FULL


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type with the fewest digits among a model's weights, trained or not."""
    found = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)
