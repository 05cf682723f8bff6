"""Load a checkpoint with its optimizer state: the policy, AdamW's moments by name, and the record of how it was trained.

Reads what the Hugging Face Trainer wrote (`adapter_model.safetensors` or a whole model, `optimizer.pt`, `scheduler.pt`,
`trainer_state.json`), and the sidecar of checkpoints of ours. Tensors are read with `weights_only=True`: no pickle of a
stranger is ever run, which is also why `training_args.bin` is not opened.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropy_core.gradients import trainable_parameters
from entropy_experiments.config import CheckpointOverrides
from entropy_experiments.loaded_policy import check_loaded_policy
from entropy_experiments.optimizer_mapping import match_names
from rl_training.checkpoint_format import SIDECAR_NAME, Sidecar, read_sidecar
from rl_training.errors import UserError

if TYPE_CHECKING:
    from rl_training.device_map import DeviceMap

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known about how the checkpoint came to be. `sidecar` is None for checkpoints of plain TRL."""

    path: Path
    step: int
    model_name: str
    sidecar: Sidecar | None
    log_history: list[dict[str, Any]]

    @property
    def run_dir(self) -> Path:
        return self.path.parent


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: `model` in evaluation mode with its trainable parameters requiring gradients, `optimizer` a
    torch AdamW over them with the stored moments (None where the checkpoint holds none), `scheduler` its state dict.
    """

    model: nn.Module
    optimizer: torch.optim.AdamW | None
    scheduler: dict[str, Any] | None
    tokenizer: Any
    record: CheckpointRecord


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder as given, or the latest `checkpoint-*` of a run folder. Raises UserError where there is none."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: name a checkpoint folder (.../checkpoint-40) or a run folder")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the checkpoint folder it lies in")
    if (folder / "trainer_state.json").exists():
        return folder
    numbered = sorted(
        (int(m.group(1)), child) for child in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", child.name))
    )
    if not numbered and _is_model_folder(folder):
        return folder
    if not numbered:
        raise UserError(f"{folder} is neither a checkpoint (no trainer_state.json) nor a run with checkpoint-* folders")
    return numbered[-1][1]


def _is_model_folder(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() or (folder / "config.json").exists()


def missing_parts(folder: Path) -> list[str]:
    """One line for each thing an analysis needs that the checkpoint folder lacks, with how to get it."""
    missing = []
    if (folder.parent / "rollouts").is_dir() and not (folder / SIDECAR_NAME).exists():
        missing.append(
            f"{SIDECAR_NAME}, which this project's trainer writes last: the checkpoint was cut short while saving"
        )
    if (folder / "adapter_config.json").exists():
        if not (folder / "adapter_model.safetensors").exists():
            missing.append(
                "adapter_model.safetensors (adapter weights): the checkpoint is partial; copy it again, or train on"
            )
    elif not any((folder / name).exists() for name in _WEIGHT_FILES):
        missing.append("model weights (adapter_config.json or model.safetensors): the checkpoint is partial")
    if not (folder / "trainer_state.json").exists():
        missing.append("trainer_state.json: the checkpoint is partial, or only a saved model")
    if not (folder / "optimizer.pt").exists():
        missing.append(
            "optimizer.pt (Adam's moments): saved with save_only_model=True? Train with save_only_model=False, or analyse with "
            "entropy_analysis.fisher_kernel.preconditioning=none"
        )
    return missing


def load_checkpoint(
    path: str | Path,
    model_name: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    require_optimizer: bool = True,
    device_map: DeviceMap | None = None,
) -> Checkpoint:
    """Load a checkpoint folder, or the latest checkpoint of a run folder.

    model_name: base model, where the checkpoint's own reference does not load. require_optimizer=False accepts checkpoints
    without optimizer state; `optimizer` is then None. dtype: other than the run's. device_map: where the base model's parts
    go, in place of `device`; adapters and their moments lie where their layers are computed.

    Raises UserError for a missing or partial checkpoint, an adapter whose base model is missing, optimizer state that is
    absent or not Adam's, or whose entries cannot be matched to parameters beyond doubt; a policy that is not the one that was
    saved (entropy_experiments.loaded_policy); a device map that does not fit, or that would offload what is trained.
    """
    folder = resolve_checkpoint(path)
    missing = missing_parts(folder)
    if not require_optimizer:
        missing = [line for line in missing if not line.startswith("optimizer.pt")]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}")
    sidecar = read_sidecar(folder)
    trainer_state = read_trainer_state(folder)
    name = model_name or _base_model_name(folder, sidecar)
    model, tokenizer = _load_policy(folder, name, sidecar, device, dtype, device_map)
    check_loaded_policy(model, folder, sidecar)
    record = CheckpointRecord(
        path=folder,
        step=int(trainer_state["global_step"]),
        model_name=name,
        sidecar=sidecar,
        log_history=list(trainer_state.get("log_history", [])),
    )
    optimizer = _load_optimizer(folder, model, sidecar, record) if (folder / "optimizer.pt").exists() else None
    return Checkpoint(model, optimizer, _load_scheduler(folder), tokenizer, record)


def device_map(settings: CheckpointOverrides) -> DeviceMap | None:
    """Where an analysis' configuration places the parts of the base model; None for one device."""
    if settings.device_map is None:
        return None
    from rl_training.device_map import DeviceMap

    return DeviceMap(settings.device_map, settings.max_memory, settings.offload_folder)


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's own state. Raises UserError where it is damaged."""
    state = read_json(folder / "trainer_state.json")
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise UserError(
            f"{folder / 'trainer_state.json'} names no global_step: the checkpoint is damaged; copy it again"
        )
    return state


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint. Raises UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; copy it again") from error


def _base_model_name(folder: Path, sidecar: Sidecar | None) -> str:
    if not (folder / "adapter_config.json").exists():
        return str(folder)
    if sidecar is not None:
        return sidecar.model_name
    return str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])


def _load_policy(
    folder: Path, name: str, sidecar: Sidecar | None, device: str, dtype: str | None, device_map: DeviceMap | None
) -> tuple[nn.Module, Any]:
    from entropy_experiments.offloaded_layers import read_again_in_backward
    from rl_training.device_map import PlacementError
    from rl_training.models import load_model_and_tokenizer

    if sidecar is not None and sidecar.quantization is not None:
        raise UserError(
            f"{folder} was trained quantised ({sidecar.quantization}); loaded without, it is another policy. Quantised "
            "checkpoints cannot be analysed"
        )
    try:
        precision = dtype or (sidecar.dtype if sidecar else "float32")
        model, tokenizer = load_model_and_tokenizer(name, precision, device, device_map=device_map)
    except PlacementError:
        raise
    except UserError as error:
        raise UserError(
            f"the base model of {folder} does not load: {error}; name another with checkpoint.model=..."
        ) from error
    if (folder / "adapter_config.json").exists():
        model = _attach_adapter(model, folder)
    else:
        model.requires_grad_(True)
    if device_map is not None:
        _refuse_offloaded_training(model, folder)
        read_again_in_backward(model)
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if own.chat_template is None:  # plain TRL saves none for models without; the prepared one has a default
            own.chat_template = tokenizer.chat_template
        if own.pad_token is None:
            own.pad_token = tokenizer.pad_token
        tokenizer = own
    model.eval()
    broken = [n for n, p in trainable_parameters(model).items() if not bool(torch.isfinite(p).all())]
    if broken:
        raise UserError(
            f"{folder}: parameter {broken[0]!r} holds NaN or infinite values; the run diverged before this step"
        )
    return model, tokenizer


def _attach_adapter(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel
    from safetensors import SafetensorError

    from entropy_experiments.offloaded_layers import place_adapters, placement_hidden
    from rl_training.models import disable_dropout

    try:
        with warnings.catch_warnings(), placement_hidden(model):
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("ignore", message="(?s).*to a meta parameter.*no-op")  # these are read again
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
            place_adapters(adapted, str(folder))
    except (SafetensorError, RuntimeError, ValueError, OSError, UserWarning) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"the adapter in {folder} does not fit its base model or is damaged: {line}") from error
    disable_dropout(adapted)
    return adapted


def _refuse_offloaded_training(model: nn.Module, folder: Path) -> None:
    """Raises UserError where the device map offloads trained parameters."""
    trained = trainable_parameters(model)
    offloaded = [name for name, p in trained.items() if p.device.type == "meta"]
    if offloaded:
        raise UserError(
            f"checkpoint.device_map offloads {len(offloaded)} of the {len(trained)} parameters that {folder} trains, e.g. "
            f"{offloaded[0]!r}, and what lies on no device cannot be trained: give their modules a device (of a LoRA "
            "checkpoint all frozen layers may be offloaded)"
        )


def _load_optimizer(
    folder: Path, model: nn.Module, sidecar: Sidecar | None, record: CheckpointRecord
) -> torch.optim.AdamW:
    path = folder / "optimizer.pt"
    state = _load_tensors(path)
    _check_adam(path, state)
    names = match_names(model, state, sidecar.optimizer_parameter_names if sidecar else None)
    parameters = trainable_parameters(model)
    groups = [
        {
            **{k: v for k, v in stored.items() if k not in ("params", "param_names")},
            "params": [parameters[n] for n in group],
        }
        for stored, group in zip(state["param_groups"], names, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, _rates_used(record, len(groups)), strict=True):
        group["lr"] = rate if rate is not None else group["lr"]
    return optimizer


def _check_adam(path: Path, state: Any) -> None:
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise UserError(f"{path} is not an optimizer state (no 'state' and 'param_groups')")
    if not state["state"]:
        raise UserError(f"{path} holds no moments: it was saved before the first step; take a later checkpoint")
    entry = next(iter(state["state"].values()))
    if not {"exp_avg", "exp_avg_sq", "step"} <= entry.keys():
        raise UserError(
            f"{path} is not the state of Adam or AdamW (entries hold {', '.join(sorted(entry))}): only these can be split"
        )


def _rates_used(record: CheckpointRecord, groups: int) -> list[float | None]:
    """The learning rate the last step was taken with: the saved groups already hold the next step's, perhaps 0."""
    if record.sidecar is not None:
        return list(record.sidecar.learning_rates_used)
    logged = [entry["learning_rate"] for entry in record.log_history if "learning_rate" in entry]
    return [float(logged[-1]) if logged else None] * groups


def _load_scheduler(folder: Path) -> dict[str, Any] | None:
    path = folder / "scheduler.pt"
    return _load_tensors(path) if path.exists() else None


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file; each is the same news
        raise UserError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}): it is damaged, or holds objects that would have "
            "to be executed; copy it again"
        ) from error
