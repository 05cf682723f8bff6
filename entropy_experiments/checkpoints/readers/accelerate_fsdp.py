"""Checkpoints of accelerate and TRL under FSDP, version 1 or 2.

    FULL_STATE_DICT     optimizer.bin: the optimizer's state dict by names; pytorch_model_fsdp.bin: weights
                        (accelerate's save_state without FSDP has an optimizer.bin as well, its entries numbered)
    SHARDED_STATE_DICT  optimizer_0/ and pytorch_model_fsdp_0/: DCP folders, under `optimizer.` and `model.`
                        or, without DCP, optimizer_0_rank<r>.bin and
                        pytorch_model_fsdp_0_rank<r>.bin

Beside them lie the Trainer's own files, and save_pretrained's where weights were gathered.
Source: accelerate/utils/fsdp_utils.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.adam_entries import adam_state, lazy
from entropy_experiments.checkpoints.readers.dcp_folder import is_dcp_folder, open_dcp
from entropy_experiments.checkpoints.readers.dcp_trees import dcp_adam
from entropy_experiments.checkpoints.readers.rank_files import joined_adam, joined_weights
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from entropy_experiments.checkpoints.readers.trained_state import AdamState, LazyTensor, TrainedState
from entropy_experiments.checkpoints.readers.trainer_files import schedule_beside, step_beside, weights_beside
from rl_training.errors import UserError

_FULL_MODEL, _FULL_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
_SHARDED_MODEL, _SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_RANK = re.compile(r"(optimizer_0|pytorch_model_fsdp_0|optimizer|pytorch_model_fsdp)_rank(\d{1,6})\.bin")


def is_accelerate_fsdp(folder: Path) -> bool:
    """Whether FSDP's files of accelerate lie in it."""
    names = (_FULL_MODEL, _FULL_OPTIMIZER, _SHARDED_MODEL, _SHARDED_OPTIMIZER)
    return any((folder / name).exists() for name in names) or any(_RANK.fullmatch(p.name) for p in folder.iterdir())


def read_accelerate_fsdp(folder: Path) -> TrainedState:
    """A checkpoint of accelerate or TRL under FSDP, full or sharded.

    Raises:
        UserError: For a missing process, files that are damaged, or hold anything but tensors and
            plain data.
    """
    _refuse_several(folder)
    ranked = _by_rank(folder)
    origins: dict[str, str] = {}
    beside = weights_beside(folder)
    weights: dict[str, LazyTensor] = {}
    if (folder / _SHARDED_MODEL).is_dir():
        tensors = open_dcp(folder / _SHARDED_MODEL).tensors
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        origins["weights"] = _SHARDED_MODEL
    elif (folder / _FULL_MODEL).exists():
        weights = _full_weights(folder / _FULL_MODEL)
        origins["weights"] = _FULL_MODEL
    elif "pytorch_model_fsdp" in ranked:
        weights = joined_weights(ranked["pytorch_model_fsdp"])
        origins["weights"] = "pytorch_model_fsdp_*rank*.bin"
    adam: AdamState | None = None
    if is_dcp_folder(folder / _SHARDED_OPTIMIZER):
        adam = dcp_adam(open_dcp(folder / _SHARDED_OPTIMIZER))
        origins["moments"] = _SHARDED_OPTIMIZER
    elif (folder / _SHARDED_OPTIMIZER).is_dir():
        raise UserError(f"{folder / _SHARDED_OPTIMIZER}/.metadata is missing: the checkpoint is partial; copy it again")
    elif (folder / _FULL_OPTIMIZER).exists():
        adam = adam_state(folder / _FULL_OPTIMIZER, _lazily(folder / _FULL_OPTIMIZER))
        origins["moments"] = _FULL_OPTIMIZER
    elif "optimizer" in ranked:
        adam = joined_adam(ranked["optimizer"], weights)
        origins["moments"] = "optimizer_*rank*.bin"
    step = step_beside(folder)
    full = _FULL_OPTIMIZER in origins.values()
    plain = full and not weights and adam is not None and not adam.named
    return TrainedState(
        layout="accelerate, save_state" if plain else f"accelerate or TRL, FSDP, {'full' if full else 'sharded'}",
        folder=folder,
        step=step if step is not None else (adam.step if adam else None),
        weights=weights,
        adam=adam,
        weights_folder=beside,
        scheduler=schedule_beside(folder),
        origins=origins,
    )


def _refuse_several(folder: Path) -> None:
    for name in ("optimizer_1", "optimizer_1.bin", "pytorch_model_fsdp_1"):
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds several models or optimizers ({name}), and nothing says which is the policy's"
            )


def _full_weights(path: Path) -> dict[str, LazyTensor]:
    found = {name: lazy(path, value) for name, value in _dict(path).items()}
    if not all(isinstance(value, LazyTensor) for value in found.values()):
        raise UserError(f"{path} holds more than tensors: it is damaged; copy it again")
    return found


def _lazily(path: Path) -> dict[str, Any]:
    """The state dict, its entries' tensors lazy."""
    content = _dict(path)
    state = content.get("state")
    if isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values()):
        content["state"] = {key: {k: lazy_inside(path, v) for k, v in entry.items()} for key, entry in state.items()}
    return content


def lazy_inside(path: Path, value: Any) -> Any:
    """As `lazy`, one level of dict down as well (bitsandbytes wraps its tensors so)."""
    return {k: lazy(path, v) for k, v in value.items()} if isinstance(value, dict) else lazy(path, value)


def _dict(path: Path) -> dict[str, Any]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict: it is damaged; copy it again")
    return content


def _by_rank(folder: Path) -> dict[str, list[Path]]:
    """optimizer, pytorch_model_fsdp -> the processes' files. Raises UserError where one is
    missing.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        matched = _RANK.fullmatch(path.name)
        if matched:
            found.setdefault(matched[1].removesuffix("_0"), {})[int(matched[2])] = path
    counts = {kind: max(ranks) + 1 for kind, ranks in found.items()}
    world = max(counts.values(), default=0)
    for _kind, ranks in found.items():
        missing = [rank for rank in range(world) if rank not in ranks]
        if missing:
            example = next(iter(ranks.values())).name
            name = re.sub(r"_rank\d+", f"_rank{missing[0]}", example)
            raise UserError(
                f"{folder / name} is missing: {world} processes wrote one file each of a kind; copy those of every node"
            )
    return {kind: [ranks[rank] for rank in sorted(ranks)] for kind, ranks in found.items()}
