"""Policies whose weights are spread over processes: what can be looked into by forward passes, and what cannot.

Under torch's `fully_shard` (FSDP2) a forward pass gathers the weights of each module, and the outermost one keeps them until a
backward pass: after a pass without gradients the next one would see the weights from before the optimizer's step. They are given
back after each look.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from rl_training.errors import UserError


def is_spread(model: nn.Module) -> bool:
    """Whether any weight is in part in another process."""
    return _kind(model) is not None


def give_back(model: nn.Module) -> None:
    """Let go of weights that a forward pass without gradients has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_unwatchable(model: nn.Module) -> None:
    """Raises UserError where a forward pass may see weights from before the optimizer's step."""
    if (kind := _kind(model)) not in (None, "FSDP2"):
        raise UserError(
            f"mode=watch cannot look into weights that are spread over processes by {kind}: train with FSDP2 (fsdp_version: 2), "
            "DDP or ZeRO-2, or set entropy_probe.enabled=false"
        )


def refuse_gradients(model: nn.Module, asked: str) -> None:
    """Raises UserError where a gradient of entropy would need whole weights. asked: the setting that wants one."""
    if (kind := _kind(model)) is not None:
        raise UserError(
            f"{asked} takes gradients of whole weights, which {kind} spreads over processes: set mode=watch and "
            "predict_every=null, which measures by forward passes"
        )


def _kind(model: nn.Module) -> str | None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP1"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return "ZeRO-3"
    spread = any(type(p.data).__name__ == "DTensor" for p in model.parameters())
    if spread or any(isinstance(module, FSDPModule) for module in model.modules()):
        return "FSDP2" if any(isinstance(module, FSDPModule) for module in model.modules()) else "tensor parallelism"
    return None
