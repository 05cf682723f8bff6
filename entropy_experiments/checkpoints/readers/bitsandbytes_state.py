"""AdamW of bitsandbytes: moments in 8 bits, dequantised block by block, or in 32 bits, paged or
not.

    m = qmap1[state1] * absmax1[block]    v = qmap2[state2] * absmax2[block]    blocks of 256 elements (2048 before 0.44)

Small tensors and embeddings stay in 32 bits, where state1 and state2 are m and v themselves.
Source: bitsandbytes, optim/optimizer.py and functional.py (quantize_blockwise); its step is
AdamW's, with decay decoupled for Adam and AdamW alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.group_settings import checked_settings
from entropy_experiments.checkpoints.readers.trained_state import (
    AdamEntry,
    AdamState,
    LazyTensor,
    OptimizerGroup,
    reading,
)
from rl_training.errors import UserError
from rl_training.run.optimizer_state import WITHOUT_IT

_WRAPPED = "__bnb_optimizer_quant_state__"
_QUANTISED = frozenset({"qmap1", "qmap2", "absmax1", "absmax2"})
_FULL = frozenset({"step", "state1", "state2"})
_GROUP = frozenset({"lr", "betas", "eps", "weight_decay", "params"})
# Of other optimizers; AdamW's groups hold them as None or 0.
_UNUSED = ("alpha", "t_alpha", "t_beta3")
_HARMLESS = frozenset({"initial_lr", "param_names", "is_paged", *_UNUSED})
_BLOCKS = (256, 2048)


def is_bitsandbytes(entries: Mapping[Any, Mapping[str, Any]], groups: list[Mapping[str, Any]]) -> bool:
    """Whether an optimizer of bitsandbytes wrote it, AdamW or another."""
    keys = {key for entry in entries.values() for key in entry}
    return bool(keys & {_WRAPPED, "state1", "qmap1"}) or (not entries and any("t_alpha" in group for group in groups))


def from_bitsandbytes(
    where: Path, entries: Mapping[Any, Mapping[str, Any]], groups: list[Mapping[str, Any]]
) -> AdamState:
    """Its state as AdamW's; each moment is dequantised when it is read.

    Raises UserError for another optimizer of bitsandbytes, and for maps and blocks that do not fit.
    """
    read, quantised = {}, False
    for key, entry in entries.items():
        fields = {**{k: v for k, v in entry.items() if k != _WRAPPED}, **(entry.get(_WRAPPED) or {})}
        at = f"{where}, entry {str(key)[:80]!r}"
        if fields.keys() not in (_FULL, _FULL | _QUANTISED):
            odd = ", ".join(sorted(map(str, fields.keys() ^ _FULL)))
            raise UserError(f"{at} is of an optimizer of bitsandbytes that is not AdamW ({odd[:80]}): {WITHOUT_IT}")
        step = fields["step"].read().item() if isinstance(fields["step"], LazyTensor) else fields["step"]
        if not isinstance(step, int | float) or not 1 <= step < 1 << 40 or int(step) != step:
            raise UserError(f"{at}: its step is no count: it is damaged; copy it again")
        in_eight = "qmap1" in fields
        quantised = quantised or in_eight
        first, second = (_moment(at, fields, number, in_eight) for number in "12")
        if first.shape != second.shape:
            raise UserError(f"{at}: its moments have two shapes: it is damaged; copy it again")
        read[key] = AdamEntry(int(step), first, second)
    notes = (
        ("the moments were stored in 8 bits by bitsandbytes and are rounded as they were there",) if quantised else ()
    )
    return AdamState(read, tuple(_group(where, group) for group in groups), quantised, notes)


def _group(where: Path, group: Mapping[str, Any]) -> OptimizerGroup:
    odd = sorted(map(str, group.keys() - _GROUP - _HARMLESS)) + sorted(_GROUP - group.keys())
    odd += [name for name in _UNUSED if group.get(name)]
    betas = group.get("betas")
    if odd or not isinstance(betas, list | tuple) or len(betas) < 2 or any(betas[2:]):
        raise UserError(
            f"{where} is of an optimizer of bitsandbytes that is not AdamW ({', '.join(odd) or 'betas'}): {WITHOUT_IT}"
        )
    settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "initial_lr") if name in group}
    always = {"betas": list(betas[:2]), "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
    return OptimizerGroup(tuple(group["params"]), checked_settings(where, {**settings, **always}))


def _moment(at: str, fields: Mapping[str, Any], number: str, in_eight: bool) -> LazyTensor:
    state = fields[f"state{number}"]
    if not isinstance(state, LazyTensor) or (state.dtype != torch.uint8) == in_eight:
        raise UserError(f"{at}: state{number} is not what its optimizer keeps: it is damaged; copy it again")
    if not in_eight:
        return state
    qmap, absmax = fields[f"qmap{number}"], fields[f"absmax{number}"]
    if not isinstance(qmap, LazyTensor) or qmap.shape != (256,) or not isinstance(absmax, LazyTensor):
        raise UserError(f"{at}: qmap{number} has no 256 values: it is damaged; copy it again")
    count, blocks = math.prod(state.shape), math.prod(absmax.shape)
    sizes = [size for size in _BLOCKS if -(-count // size) == blocks]
    if len(absmax.shape) != 1 or not sizes:
        raise UserError(
            f"{at}: absmax{number} has {blocks} values for {count} elements, of blocks that bitsandbytes does not make "
            f"(8-bit without blocks, or another release): {WITHOUT_IT}"
        )
    # Fewer elements than the smallest block: one block, whatever its size.
    block = sizes[0]

    def read() -> Tensor:
        return dequantise(state.read(), qmap.read(), absmax.read(), block)

    return reading(at, state.shape, torch.float32, read)


def dequantise(state: Tensor, qmap: Tensor, absmax: Tensor, block: int) -> Tensor:
    """qmap[state] * absmax[block of the element].

    Args:
        state: uint8, any shape.
        qmap: (256,) values in [-1, 1].
        absmax: (number of blocks,) largest magnitude of each block.
        block: Elements of a block.

    Returns:
        float32 of the shape of `state`.
    """
    flat = qmap.float()[state.flatten().long()]
    scales = absmax.float().repeat_interleave(block)[: flat.numel()]
    return (flat * scales).reshape(state.shape)
