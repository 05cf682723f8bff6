"""Files in the layout of DeepSpeed ZeRO, written without it; those in `stored` were written by DeepSpeed."""

import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class LossScaler:
    """Pickled under DeepSpeed's name."""

    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


LossScaler.__module__ = "deepspeed.runtime.fp16.loss_scaler"


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """Modules that pickle finds the class in."""
    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler"]
    made = {name: types.ModuleType(name) for name in names}
    made[names[-1]].LossScaler = LossScaler  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None) if module is None else sys.modules.update({name: module})


def write_zero(folder: Path, reference: dict[str, Any], stage: int, world: int = 2) -> None:
    """reference: weights, moments and groups by name."""
    weights, moments, groups = reference["weights"], reference["moments"], reference["groups"]
    place = folder / "global_step4"
    place.mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    names = [group["params"] for group in groups]
    shapes = [OrderedDict((n, weights[n].shape) for n in own) for own in names]
    kinds = {"fp32": weights, "exp_avg": {n: e["exp_avg"] for n, e in moments.items()}}
    kinds["exp_avg_sq"] = {n: e["exp_avg_sq"] for n, e in moments.items()}
    cut = _cut3 if stage == 3 else _cut2
    parts = {kind: [cut([values[n] for n in own], world) for own in names] for kind, values in kinds.items()}
    model = {
        "module": weights if stage < 3 else {n: torch.empty(0) for n in weights},
        "buffer_names": [], "param_shapes": shapes, "frozen_param_shapes": None, "shared_params": {}, "global_steps": 4,
        "lr_scheduler": None, "dp_world_size": world, "mp_world_size": 1, "ds_config": {}, "ds_version": "0.19.8",
    }  # fmt: skip
    settings = [{**{k: v for k, v in group.items() if k != "params"}, "params": [i]} for i, group in enumerate(groups)]
    step = next(iter(moments.values()))["step"]
    with deepspeed_names():
        for rank in range(world):
            entry = {
                i: {"step": step, "exp_avg": parts["exp_avg"][i][rank], "exp_avg_sq": parts["exp_avg_sq"][i][rank]}
                for i in range(len(names))
            }
            base, flat = {"state": entry, "param_groups": settings}, [vectors[rank] for vectors in parts["fp32"]]
            keys = (
                ("optimizer_state_dict", "fp32_flat_groups")
                if stage == 3
                else ("base_optimizer_state", "single_partition_of_fp32_groups")
            )
            state = {
                "zero_stage": stage,
                "partition_count": world,
                "loss_scaler": LossScaler(),
                keys[0]: base,
                keys[1]: flat,
            }
            torch.save({"optimizer_state_dict": state}, place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            if stage == 3:
                torch.save(model, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save(model, place / "mp_rank_00_model_states.pt")


def _cut2(tensors: list[Tensor], world: int) -> list[Tensor]:
    flat = torch.cat([t.flatten() for t in tensors])
    length = 2 * world * math.ceil(len(flat) / (2 * world))
    return list(torch.nn.functional.pad(flat, (0, length - len(flat))).clone().reshape(world, -1))


def _cut3(tensors: list[Tensor], world: int) -> list[Tensor]:
    pieces = []
    for t in tensors:
        each = math.ceil(t.numel() / world)
        pieces.append(torch.nn.functional.pad(t.flatten(), (0, each * world - t.numel())).reshape(world, each))
    return [torch.cat([piece[rank] for piece in pieces]).clone() for rank in range(world)]
