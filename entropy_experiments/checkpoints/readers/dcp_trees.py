"""One DCP folder that holds model and optimizer: prime-rl, OpenRLHF's FSDP2, torchtitan, and others
that save one tree; or two, policy/weights and policy/optimizer, of NeMo-RL's dtensor workers.

    app.model.<name>                 <name>                                  weights        (torchtitan: at the top)
    app.optimizers.state.<name>.exp_avg     optimizer.state.<name>.exp_avg  moments
    app.optimizers.param_groups.<i>.lr      optimizer.param_groups.<name>.lr  settings, by group or, flattened, by parameter
    app.scheduler.last_epoch         lr_scheduler.last_epoch                 schedule
    app.progress.step                train_state.step                        step
    model.<name>, optim.optim.state.<name>.exp_avg, optim.sched.last_epoch    NeMo-RL

Source: torch.distributed.checkpoint.state_dict (get_state_dict, flattened or not);
prime_rl/trainer/ckpt.py; openrlhf/utils/fsdp2/checkpoint.py; torchtitan/components/checkpoint.py;
nemo_rl/utils/native_checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.adam_entries import adam_state
from entropy_experiments.checkpoints.readers.dcp_folder import DcpFolder, is_dcp_folder, open_dcp
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from entropy_experiments.checkpoints.readers.trained_state import AdamState, LazyTensor, TrainedState
from rl_training.errors import UserError

_OPTIMIZER = re.compile(r"((?:.*?\.)?optim(?:izers?)?)\.(state|param_groups)\.(.+)\.([^.]+)")
_STEPS = re.compile(r"(?:step[-_]?|global_step_?|checkpoint-)(\d{1,9})")
_INSIDE = ("trainer", "dcp_checkpoint/_actor", "dcp_checkpoint", "_actor", "actor", "policy")
_SCHEDULES = ("app.scheduler", "scheduler", "lr_scheduler", "app.lr_scheduler", "optim.sched")
_STEP_NAMES = ("app.progress.step", "train_state.step", "progress.step", "step", "app.step")


def dcp_tree_folder(folder: Path) -> Path | None:
    """The folder itself, or where these trainers put the tree inside it; None where there is
    none.
    """
    return next((place for place in (folder, *(folder / name for name in _INSIDE)) if is_dcp_folder(place)), None)


def tree_in_two_folders(folder: Path) -> tuple[Path, Path | None] | None:
    """Where weights and optimizer lie in a step of NeMo-RL; None where they do not.

    Raises:
        UserError: For weights that are shards of safetensors.
    """
    inside = folder.parent if folder.name in ("weights", "optimizer") else folder
    for place in (inside, inside / "policy"):
        weights, optimizer = place / "weights", place / "optimizer"
        if is_dcp_folder(weights):
            return weights, optimizer if optimizer.is_dir() else None
        if optimizer.is_dir() and (weights / "model").is_dir():
            raise UserError(
                f"{weights} is of NeMo-RL in shards of safetensors, which are not read: save by policy.dtensor_cfg._v2=false, or "
                "take its consolidated weights and analyse with entropy_analysis.fisher_kernel.preconditioning=none"
            )
    return None


def read_dcp_tree(folder: Path, optimizer: Path | None = None) -> TrainedState:
    """A tree of prime-rl, OpenRLHF, torchtitan or one like theirs.

    Args:
        folder: Where it lies, or its weights.
        optimizer: Where the optimizer's part lies, if apart.

    Raises:
        UserError: For a tree that is damaged, whose parts are missing, or whose weights cannot be
            told from its optimizer.
    """
    tree = open_dcp(folder)
    weights = _weights(tree)
    if not weights:
        raise UserError(
            f"{folder}: this distributed checkpoint holds no weights: name the folder that holds model and optimizer"
        )
    rest = tree if optimizer is None else open_dcp(optimizer)
    adam = dcp_adam(rest)
    extra = folder / "extra_state.pt"
    beside = read_torch_file(extra) if extra.is_file() else {}
    schedule = _object(rest, _SCHEDULES) or (beside.get("scheduler") if isinstance(beside, dict) else None)
    step = next((value for name in _STEP_NAMES if type(value := tree.value(name)) is int), _step_in_name(folder))
    return TrainedState(
        layout=f"torch DCP tree ({'NeMo-RL' if optimizer else _writer(tree)})",
        folder=folder,
        weights_folder=_tokenizer_beside(folder),
        step=step if step is not None else (adam.step if adam else None),
        weights=weights,
        adam=adam,
        scheduler=schedule if isinstance(schedule, dict) else None,
        origins={"weights": ".metadata, *.distcp"} | ({"moments": ".metadata, *.distcp"} if adam else {}),
    )


def _tokenizer_beside(folder: Path) -> Path | None:
    beside = folder.parent / "tokenizer"
    return beside if (beside / "tokenizer_config.json").is_file() else None


def _writer(tree: DcpFolder) -> str:
    if any(name.startswith("app.progress.") for name in tree.objects):
        return "prime-rl"
    if any(name.startswith("app.") for name in tree.tensors):
        return "OpenRLHF FSDP2 or like it"
    return (
        "torchtitan"
        if any(name.startswith("train_state.") for name in (*tree.tensors, *tree.objects))
        else "model and optimizer"
    )


def _weights(tree: DcpFolder) -> dict[str, LazyTensor]:
    """What lies under `model`, else everything at the top that is not the optimizer's or the
    schedule's.
    """
    for prefix in ("app.model.", "model_state.", "app.model_state."):
        found = {name.removeprefix(prefix): t for name, t in tree.tensors.items() if name.startswith(prefix)}
        if found:
            return found
    top = {name: t for name, t in tree.tensors.items() if not _OPTIMIZER.fullmatch(name) and not name.startswith(
        ("app.", "lr_scheduler.", "scheduler.", "train_state.", "dataloader.", "progress."))}  # fmt: skip
    # A plain {"model": ...} puts one more `model.` before every name, an `lm_head` or a norm at the top included.
    inner = {name.removeprefix("model."): t for name, t in top.items() if name.startswith("model.")}
    nested = len(inner) == len(top) and any(name.startswith(("model.", "lm_head.", "base_model.")) for name in inner)
    return inner if nested else top


def dcp_adam(tree: DcpFolder) -> AdamState | None:
    """The state of AdamW of a folder; None where it holds no optimizer's."""
    found: dict[str, Any] = {}
    prefixes = set()
    for name in (*tree.tensors, *tree.objects):
        matched = _OPTIMIZER.fullmatch(name)
        if matched is None:
            continue
        prefix, kind = matched.groups()[:2]
        prefixes.add(prefix)
        tensor = tree.tensors.get(name) if kind == "state" else None
        found[name.removeprefix(f"{prefix}.")] = tree.value(name) if tensor is None else tensor
    if not found:
        return None
    if len(prefixes) > 1:
        raise UserError(
            f"{tree.folder} holds {len(prefixes)} optimizers ({', '.join(sorted(prefixes))[:80]}): only one is read"
        )
    return adam_state(tree.folder, unflattened(found))


def unflattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of torch's optimizer from `state.<name>.<field>` and `param_groups.<number or name>.<field>`."""
    entries: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        kind, _, rest = name.partition(".")
        of, _, field = rest.rpartition(".")
        (entries if kind == "state" else groups).setdefault(of, {})[field] = value
    numbered = all(of.isdecimal() for of in groups)
    listed = [groups[of] for of in sorted(groups, key=int)] if numbered else _grouped(entries, groups)
    return {"state": entries, "param_groups": listed}


def _grouped(entries: Mapping[str, Any], groups: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups from settings that are flattened by parameter: parameters of equal settings are
    one.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in [*entries, *(name for name in groups if name not in entries)]:
        settings = groups.get(name, {})
        found.setdefault(repr(sorted(settings.items(), key=str))[:4000], {**settings, "params": []})["params"].append(
            name
        )
    return list(found.values())


def _object(tree: DcpFolder, names: tuple[str, ...]) -> dict[str, Any] | None:
    """A dict that was flattened one level deep, put together again."""
    for prefix in names:
        keys = [
            name for name in tree.objects if name.startswith(f"{prefix}.") and name.count(".") == prefix.count(".") + 1
        ]
        if keys:
            return {name.rpartition(".")[2]: tree.value(name) for name in keys}
    return None


def _step_in_name(folder: Path) -> int | None:
    for place in (folder, *list(folder.parents)[:3]):
        matched = _STEPS.fullmatch(place.name)
        if matched:
            return int(matched[1])
    return None
