"""A checkpoint of another trainer, made into one of ours: weights linked or gathered, moments by
name, and where each came from.

The folder is made under another name, examined by the very checks that an analysis makes, and only
then takes its own.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entropy_experiments.checkpoints.adapter_file import weight_shapes
from entropy_experiments.checkpoints.carried_record import carry_record
from entropy_experiments.checkpoints.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter, read_json
from entropy_experiments.checkpoints.imported import (
    IMPORT_RECORD,
    MOMENTS_FILE,
    ImportedGroup,
    ImportRecord,
    moment_key,
)
from entropy_experiments.checkpoints.optimizer_names import match_names
from entropy_experiments.checkpoints.policy_outline import outline_policy
from entropy_experiments.checkpoints.readers.trained_state import AdamState, LazyTensor, TrainedState
from entropy_experiments.checkpoints.readers.trainer_files import SAVED_WEIGHTS
from entropy_experiments.checkpoints.safetensors_stream import write_tensors
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from rl_training.files import link_to, write_json_whole
from rl_training.models.load import outline_of_configuration
from rl_training.models.source import is_on_the_hub
from rl_training.run.checkpoint_digests import file_digest
from rl_training.run.sidecar import SIDECAR_NAME

_CONFIGURATION = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "trainer_state.json",
    "adapter_config.json",
)  # fmt: skip
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module"})
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay", "initial_lr")


@dataclass(frozen=True)
class Imported:
    """What was made: the folder, its record, and how many tensors of each kind. to_give: what an analysis will have to be told
    of its learning rate, None where it is known.
    """

    folder: Path
    record: ImportRecord
    weights: int
    moments: int
    to_give: str | None = None


def fill_checkpoint(
    state: TrainedState, source: Path, folder: Path, model: str | None, beside: Mapping[str, str] | None = None
) -> Imported:
    """Fill a folder with a checkpoint of ours. The caller removes it where this fails.

    Args:
        state: As a reader gave it.
        source: The folder that the user named, for the record.
        folder: Where to put it, on the final path's file system.
        model: Folder or name with configuration and tokenizer, where the source has none.
        beside: Files that lie there already -> where they came from.

    Raises:
        UserError: Where something is missing or damaged, or does not fit together.
    """
    origins = dict(beside or {})
    _configuration(state, folder, model, origins)
    linked = _link_weights(state, folder, origins)
    adapter_config = (folder / ADAPTER_CONFIG).exists()
    weights = {_clean(name): tensor for name, tensor in state.weights.items()}
    if linked:
        _compare_weights(folder, weights, linked)
    elif weights:
        _write_weights(state, folder, weights, adapter_config, origins)
    else:
        raise UserError(
            f"{state.folder} holds no weights: copy the files of save_pretrained (model.safetensors) into it"
        )
    groups, steps = _write_moments(state, folder, model, origins)
    if (carried := carry_record(state.folder, folder, groups)) is not None:
        origins[SIDECAR_NAME] = carried
    record = ImportRecord(
        format=1,
        source=str(source),
        layout=state.layout,
        step=state.step or 0,
        named_by="files" if state.adam is None or state.adam.named else "order",
        quantised=state.adam is not None and state.adam.quantised,
        groups=groups,
        steps=steps,
        scheduler=_plain(dict(state.scheduler)) if state.scheduler is not None else None,
        origins=origins,
        sha256={p.name: file_digest(p) for p in sorted((*folder.glob("*.safetensors"), *folder.glob("*.parquet")))},
        notes=[*state.notes, *(n for n in (state.adam.notes if state.adam else ()) if n not in state.notes)],
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    write_json_whole(folder / IMPORT_RECORD, record.model_dump(mode="json"))
    count = len(weights) or sum(len(weight_shapes(folder / name)) for name in linked if name.endswith(".safetensors"))
    return Imported(folder, record, count, len(steps))


def _write_moments(
    state: TrainedState, folder: Path, model: str | None, origins: dict[str, str]
) -> tuple[list[ImportedGroup], dict[str, int]]:
    """Write the moments by name; the optimizer's groups, and the steps that each parameter's moments have seen."""
    if state.adam is None:
        return [], {}
    adam = _under_own_names(state, folder, model)
    write_tensors(folder / MOMENTS_FILE, _moment_tensors(adam))
    origins[MOMENTS_FILE] = f"{state.folder}: {state.origins.get('moments', 'its optimizer')}"
    return _groups(adam), {str(name): entry.step for name, entry in adam.entries.items()}


def _configuration(state: TrainedState, folder: Path, model: str | None, origins: dict[str, str]) -> None:
    """Configuration and tokenizer: the source's own first, then the named model's."""
    own = (state.weights_folder, state.folder, state.folder / "huggingface")
    places = [place for place in own if place is not None]
    named = Path(model) if model is not None and Path(model).is_dir() else None
    for place in [*places, *([named] if named is not None else [])]:
        for name in _CONFIGURATION:
            if (place / name).is_file() and not (folder / name).exists():
                shutil.copyfile(place / name, folder / name)
                origins[name] = str(place / name)
    if (
        not (folder / "config.json").exists()
        and not (folder / ADAPTER_CONFIG).exists()
        and model is not None
        and named is None
    ):
        _from_the_hub(model, folder, origins)
    if model is not None and (folder / ADAPTER_CONFIG).exists():
        _base_as_told(folder / ADAPTER_CONFIG, str(named.resolve()) if named is not None else model, origins)
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{state.folder} has no configuration of its model (config.json): give --model, a folder of save_pretrained "
            "or a name on the hub, from which the run started"
        )


def _base_as_told(path: Path, model: str, origins: dict[str, str]) -> None:
    """Let the adapter's configuration name the base model that --model names: where it was trained is another place."""
    content = read_json(path)
    if isinstance(content, dict) and content.get("base_model_name_or_path") != model:
        write_json_whole(path, {**content, "base_model_name_or_path": model})
        origins[path.name] = f"{origins[path.name]}, its base model by --model"


def _from_the_hub(model: str, folder: Path, origins: dict[str, str]) -> None:
    if not is_on_the_hub(model):
        raise UserError(f"--model {model} is no folder and no name on the hub")
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model} does not load: {str(error).splitlines()[0]}") from error
    origins["config.json"] = model


def _link_weights(state: TrainedState, folder: Path, origins: dict[str, str]) -> list[str]:
    """Names of the files of save_pretrained that were linked; [] where there are none."""
    place = state.weights_folder
    if place is None or not any((place / name).exists() for name in SAVED_WEIGHTS):
        return []
    names = [ADAPTER_WEIGHTS] if (place / ADAPTER_WEIGHTS).exists() else []
    if not names and (place / "model.safetensors.index.json").exists():
        index = read_json(place / "model.safetensors.index.json")
        mapped = index.get("weight_map") if isinstance(index, dict) else None
        listed = sorted(set(mapped.values())) if isinstance(mapped, dict) else []
        if not listed or not all(isinstance(name, str) and Path(name).name == name for name in listed):
            raise UserError(f"{place}/model.safetensors.index.json names no files: it is damaged; copy it again")
        names = ["model.safetensors.index.json", *listed]
    names = names or ["model.safetensors"]
    for name in names:
        path = (place / name).resolve()
        if not path.is_file():
            raise UserError(f"{place / name} is missing: the weights are partial; copy it again")
        link_to(path, folder / name)
        origins[name] = str(place / name)
    return names


def _compare_weights(folder: Path, shards: Mapping[str, LazyTensor], linked: Sequence[str]) -> None:
    """Raises UserError where the trainer's own weights, rounded, are not those of the saved files
    under the same names.
    """
    for name in linked:
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():
                    mine = shards.get(key) or shards.get(_adapter_name(key))
                    if mine is not None and not _same(mine.read(), file.get_tensor(key)):
                        raise UserError(
                            f"{folder / name}: {key!r} is not the weight that {mine.origin} holds under this name: names "
                            "were changed, or the files are of two checkpoints; copy it again"
                        )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged ({str(error).splitlines()[0]}): copy it again") from error


def _same(master: Tensor, saved: Tensor) -> bool:
    """Equal once the finer of the two is rounded to the other's precision."""
    if master.shape != saved.shape:
        return False
    coarse = saved.dtype if saved.dtype.itemsize <= master.dtype.itemsize else master.dtype
    return torch.equal(master.to(coarse), saved.to(coarse))


def _adapter_name(key: str) -> str:
    """Name in the model of a weight in an adapter's file."""
    start, _, last = key.rpartition(".")
    return f"{start}.default.{last}"


def _write_weights(
    state: TrainedState, folder: Path, weights: Mapping[str, LazyTensor], is_adapter: bool, origins: dict[str, str]
) -> None:
    """The weights as save_pretrained would write them: of an adapter its own, of a model one file
    without tied copies.
    """
    where = f"{state.folder}: {state.origins.get('weights', 'its weights')}"
    if is_adapter:
        own = {name.replace(".default.", "."): tensor for name, tensor in weights.items() if ".default." in name}
        own = own or {name: tensor for name, tensor in weights.items() if "lora_" in name}
        if not own:
            raise UserError(
                f"{where} holds no weights of an adapter, and {ADAPTER_CONFIG} describes one: copy it again"
            )
        write_tensors(folder / ADAPTER_WEIGHTS, own)
        origins[ADAPTER_WEIGHTS] = where
        return
    if any(".lora_A." in name for name in weights):
        raise UserError(
            f"{where} are of an adapter, and no adapter_config.json describes it (verl writes lora_train_meta.json alone): put "
            f"that of the run's LoraConfig.save_pretrained into {state.folder / 'lora_adapter'}"
        )
    model = outline_of_configuration(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = _in_words_of(weights, shapes, where)
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise UserError(
            f"{where} has no {missing[0]!r} ({len(missing)} of the model's weights are missing): config.json is of another "
            "model, or the weights are named as in another code; save them by save_pretrained beside it"
        )
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(
                f"{where}: {name!r} is {found[name].shape}, config.json wants {shape}: it is of another model"
            )
    buffers = {name for name, _ in model.named_buffers()}
    write_tensors(folder / "model.safetensors", {n: t for n, t in found.items() if n in shapes or n in buffers})
    origins["model.safetensors"] = where


def _in_words_of(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Tensors under the model's own names, where all have one prefix more or less (a wrapper's
    attribute).
    """
    if found.keys() >= wanted.keys() or not wanted:
        return dict(found)
    longest = max(wanted, key=len)
    for name in found:
        for whole, part in ((name, longest), (longest, name)):
            prefix = whole.removesuffix(part)
            if whole == part or not whole.endswith(f".{part}"):
                continue
            changed = {n.removeprefix(prefix) if whole is name else f"{prefix}{n}": t for n, t in found.items()}
            if changed.keys() >= wanted.keys() and len(changed) == len(found):
                return changed
    return dict(found)


def _clean(name: str) -> str:
    """A parameter's name without what FSDP, DDP and torch.compile put around modules."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)


def _under_own_names(state: TrainedState, folder: Path, model: str | None) -> AdamState:
    """The optimizer's state under the names of the model as it will be loaded, each group in the
    model's order.
    """
    assert state.adam is not None
    adapter = find_adapter(folder, None)
    base = str(folder) if adapter is None else (model or _base_of(folder))
    outline = outline_policy(folder, base, adapter, False)
    order = {name: place for place, (name, p) in enumerate(outline.named_parameters()) if p.requires_grad}
    adam = state.adam
    numbers = sum(len(group.keys) for group in adam.groups)
    adam = adam.without_idle(lambda key: numbers > len(order) if isinstance(key, int) else _clean(key) not in order)
    if not adam.named:
        adam = adam.with_names(match_names(outline, _as_torch(adam), None))
    else:
        adam = adam.with_keys(_clean)
        keys = {str(key): key for group in adam.groups for key in group.keys}
        own = _in_words_of(keys, order, state.layout)
        renamed = {str(old): new for new, old in own.items()}
        adam = adam.with_keys(lambda name: renamed.get(name, name))
    shapes = {name: tuple(p.shape) for name, p in outline.named_parameters()}
    _check_names(state, adam, order, shapes)
    sorted_groups = [replace(g, keys=tuple(sorted(g.keys, key=lambda k: order[str(k)]))) for g in adam.groups]
    return replace(adam, groups=tuple(sorted_groups))


def _check_names(state: TrainedState, adam: AdamState, order: Mapping[str, int], shapes: Mapping[str, Any]) -> None:
    """Raises UserError unless the optimizer's parameters are the model's trained ones, shape by
    shape.
    """
    names = [str(key) for group in adam.groups for key in group.keys]
    odd = sorted(set(names) ^ order.keys())
    if odd:
        which = (
            "the optimizer's state has it, the model does not"
            if odd[0] in names
            else "the model trains it, the optimizer has no entry"
        )
        raise UserError(
            f"{state.folder}: the optimizer's parameters are not the model's trained ones, e.g. {odd[0]!r} ({which}): "
            "config.json or the adapter is of another run"
        )
    for name, entry in adam.entries.items():
        if entry.first.shape != shapes[str(name)] or entry.second.shape != shapes[str(name)]:
            raise UserError(
                f"{entry.first.origin}: the moments of {name!r} are {entry.first.shape}, the parameter is {shapes[str(name)]}: "
                "names were changed, or the files are of another model"
            )


def _as_torch(adam: AdamState) -> dict[str, Any]:
    """Groups and shapes as `match_names` looks at them: on the meta device, no moment is read."""
    state = {key: {"exp_avg": torch.empty(entry.first.shape, device="meta")} for key, entry in adam.entries.items()}
    return {"state": state, "param_groups": [{"params": list(group.keys)} for group in adam.groups]}


def _base_of(folder: Path) -> str:
    content = read_json(folder / ADAPTER_CONFIG)
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder}/{ADAPTER_CONFIG} names no base model: give --model")
    return name


def _groups(adam: AdamState) -> list[ImportedGroup]:
    groups = []
    for group in adam.groups:
        settings = {name: group.settings[name] for name in _SETTINGS if group.settings.get(name) is not None}
        if "betas" in settings:
            settings["betas"] = list(settings["betas"])
        named = {"names": [str(key) for key in group.keys], **settings}
        groups.append(validate_config(ImportedGroup, named, "the optimizer's parameter group"))
    return groups


def _moment_tensors(adam: AdamState) -> dict[str, LazyTensor]:
    found = {}
    for name, entry in adam.entries.items():
        found[moment_key("exp_avg", str(name))] = entry.first
        found[moment_key("exp_avg_sq", str(name))] = entry.second
        if entry.largest is not None:
            found[moment_key("max_exp_avg_sq", str(name))] = entry.largest
    return found


def _plain(value: Any) -> Any:
    """What JSON has; anything else of a schedule's state is left out as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if len(str(k)) < 200}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value[:10_000]]
    return value if isinstance(value, str | bool | int | float | None) and value == value else None
