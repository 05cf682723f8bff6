"""Files of torch.save, one for each process: verl and SkyRL under FSDP2 or FSDP1, and accelerate's
FSDP without DCP.

    model_world_size_<W>_rank_<r>.pt        the model's state dict: parameters by name, DTensors
    optim_world_size_<W>_rank_<r>.pt        the optimizer's: FSDP2 numbers parameters (DTensors), FSDP1 flat vectors (flat_units);
                                            flattened by name (`state.<name>.exp_avg`) by verl's VeOmni engine
    extra_state_world_size_<W>_rank_<r>.pt  schedule, step (SkyRL), random numbers
    huggingface/, lora_adapter/             configuration, tokenizer and, where asked for, whole weights; an adapter

Source: verl/utils/checkpoint/fsdp_checkpoint_manager.py, skyrl_train/distributed/fsdp_strategy.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.adam_entries import adam_state
from entropy_experiments.checkpoints.readers.dcp_trees import unflattened
from entropy_experiments.checkpoints.readers.flat_units import is_flat, unflatten
from entropy_experiments.checkpoints.readers.rank_shards import join
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from entropy_experiments.checkpoints.readers.trained_state import AdamState, LazyTensor, TrainedState
from entropy_experiments.checkpoints.readers.trainer_files import SAVED_WEIGHTS
from rl_training.errors import UserError

_PATTERN = re.compile(r"(model|optim|extra_state)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_STEPS = re.compile(r"global_step_?(\d{1,9})")
_INSIDE = ("actor", "policy")


def rank_files_folder(folder: Path) -> Path | None:
    """The folder itself, or its policy's folder, where it holds such files; None where neither
    does.
    """
    for place in (folder, *(folder / name for name in _INSIDE)):
        if place.is_dir() and any(_PATTERN.fullmatch(path.name) for path in place.iterdir()):
            return place
    return None


def read_rank_files(folder: Path) -> TrainedState:
    """A checkpoint of verl or SkyRL.

    Raises:
        UserError: For a missing process, files of two numbers of processes, parts that do not fit
            together, files that are damaged or hold anything but tensors and plain data.
    """
    # verl saves an adapter beside the shards, and names no configuration of it in huggingface/.
    adapter = folder / "lora_adapter"
    beside = adapter if (adapter / "adapter_config.json").is_file() else folder / "huggingface"
    saved = any((beside / name).exists() for name in SAVED_WEIGHTS)
    model, ranks = _files(folder, "model", may_lack=saved)
    weights = joined_weights(model) if model else {}
    optim, ranks = _files(folder, "optim", ranks or None)
    extra, notes = _extra(folder, ranks)
    adam = joined_adam(optim, weights) if optim else None
    if adam is not None and not adam.entries:
        adam = None
    step = extra.get("global_step") if type(extra.get("global_step")) is int else _step_of(folder)
    scheduler = extra.get("lr_scheduler")
    if step is None and adam is not None:
        notes = (
            *notes,
            f"no folder's name says its training step: {adam.step}, the optimizer's count, may be larger; rename it",
        )
    kinds = {"weights": "model" if model else "", "moments": "optim" if adam else ""}
    origins = {what: f"{kind}_world_size_{ranks}_rank_*.pt" for what, kind in kinds.items() if kind}
    return TrainedState(
        layout=f"verl or SkyRL, FSDP{_version(folder)}, {ranks} process{'es' if ranks > 1 else ''}",
        folder=folder,
        step=step if step is not None else (adam.step if adam else None),
        weights=weights,
        adam=adam,
        weights_folder=beside if beside.is_dir() else None,
        scheduler=scheduler if isinstance(scheduler, dict) else None,
        ranks=ranks,
        origins=origins,
        notes=notes,
    )


def joined_weights(paths: list[Path]) -> dict[str, LazyTensor]:
    """The model's state dict, out of every process's."""
    contents = [read_torch_file(path) for path in paths]
    contents = [content.get("model", content) if isinstance(content, dict) else content for content in contents]
    names = _same_keys(paths, contents)
    joined = {name: join(f"weight {name!r}", paths, [content[name] for content in contents]) for name in names}
    odd = next((name for name, value in joined.items() if not isinstance(value, LazyTensor)), None)
    if odd is not None:
        raise UserError(f"{paths[0]}: {str(odd)[:80]!r} is no tensor: it is damaged; copy it again")
    return joined


def joined_adam(paths: list[Path], weights: Mapping[str, LazyTensor]) -> AdamState | None:
    """The optimizer's state, out of every process's; None where no optimizer was saved (SkyRL
    writes an empty file).
    """
    contents = [read_torch_file(path) for path in paths]
    contents = [content.get("optimizer", content) if isinstance(content, dict) else content for content in contents]
    if all(content == {} for content in contents):
        return None
    if all(isinstance(content, dict) and content and _is_flattened(content) for content in contents):
        values = {key: join(f"{key[:120]!r}", paths, [content[key] for content in contents])
                  for key in _same_keys(paths, contents)}  # fmt: skip
        return adam_state(paths[0].parent, unflattened(values))
    if not all(isinstance(content, dict) and isinstance(content.get("state"), dict) for content in contents):
        raise UserError(f"{paths[0]} is not the state of an optimizer: it is damaged; copy it again")
    groups = [content.get("param_groups") for content in contents]
    if any(_plain(group) != _plain(groups[0]) for group in groups):
        raise UserError(
            f"{paths[0].parent}: the processes' parameter groups differ: their files are of two checkpoints"
        )
    states = [content["state"] for content in contents]
    if is_flat(states):
        return adam_state(paths[0].parent, unflatten(paths, states, groups[0], weights))
    keys = _same_keys(paths, states)
    entries = {key: {field: join(f"{field} of entry {key!r}", paths, [state[key][field] for state in states])
                     for field in _same_keys(paths, [state[key] for state in states])} for key in keys}  # fmt: skip
    return adam_state(paths[0].parent, {"state": entries, "param_groups": groups[0]})


def _is_flattened(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in content)


def _plain(groups: Any) -> Any:
    """Groups without what is not compared: the schedule's functions and tensors."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    return [{k: v for k, v in group.items() if isinstance(v, int | float | str | list | tuple)} for group in groups]


def _same_keys(paths: list[Path], contents: list[Any]) -> list[Any]:
    """Keys on which all processes agree, in the first one's order."""
    for path, content in zip(paths, contents, strict=True):
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no state dict: it is damaged; copy it again")
        if list(content) != list(contents[0]):
            odd = next(iter(content.keys() ^ contents[0].keys()), next(iter(content), ""))
            raise UserError(
                f"{path} does not name the same parameters in the same order as {paths[0].name}, e.g. {str(odd)[:80]!r}: they "
                "are of two checkpoints; copy them again"
            )
    return list(contents[0])


def _files(folder: Path, kind: str, ranks: int | None = None, may_lack: bool = False) -> tuple[list[Path], int]:
    """A kind's files by rank, and the number of processes; may_lack: there need be none of the model. Raises UserError where one
    is missing, or a rank too many is there.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        matched = _PATTERN.fullmatch(path.name)
        if matched and matched[1] == kind:
            found.setdefault(int(matched[2]), {})[int(matched[3])] = path
    if not found and (may_lack or kind != "model"):
        return [], ranks or 0
    if not found:
        raise UserError(
            f"{folder} has no model_world_size_*_rank_*.pt: the weights were not saved; save 'model' as well"
        )
    worlds = sorted(found)
    if len(worlds) > 1 or (ranks is not None and worlds != [ranks]):
        numbers = " and ".join(map(str, sorted({*worlds, *([] if ranks is None else [ranks])})))
        raise UserError(
            f"{folder} holds {kind} files of {numbers} processes: two checkpoints are mixed; keep the files of one run in it"
        )
    world = worlds[0]
    recorded = _recorded_world(folder)
    if recorded is not None and recorded != world:
        raise UserError(
            f"{folder}/fsdp_config.json is of {recorded} processes, the files are of {world}: two checkpoints are "
            "mixed; copy it again"
        )
    missing = [rank for rank in range(world) if rank not in found[world]]
    if missing or len(found[world]) > world:
        name = f"{kind}_world_size_{world}_rank_{(missing or [world])[0]}.pt"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder / name}{more} is missing: {world} processes wrote {world} files each of a kind; copy those of every node"
            if missing
            else f"{folder} holds {kind} files of ranks beyond {world}: two checkpoints are mixed; copy it again"
        )
    return [found[world][rank] for rank in range(world)], world


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "fsdp_config.json"
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: it is damaged; copy it again") from error
    return content if isinstance(content, dict) else {}


def _recorded_world(folder: Path) -> int | None:
    world = _config(folder).get("world_size")
    return world if type(world) is int else None


def _version(folder: Path) -> str:
    version = _config(folder).get("FSDP_version")
    return str(version) if type(version) is int else ""


def _extra(folder: Path, ranks: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The first process's schedule and step, and what is to be said of them: the weights and
    moments do without.
    """
    path = folder / f"extra_state_world_size_{ranks}_rank_0.pt"
    if not path.exists():
        return {}, ()
    try:
        content = read_torch_file(path)
    except UserError as error:  # users' own state lies in it, of any class
        return {}, (f"without its schedule: {error}",)
    return (content if isinstance(content, dict) else {}), ()


def _step_of(folder: Path) -> int | None:
    """The step in the name of the folder, or of the one it lies in."""
    for name in (folder.name, folder.parent.name):
        matched = _STEPS.fullmatch(name)
        if matched:
            return int(matched[1])
    return None
