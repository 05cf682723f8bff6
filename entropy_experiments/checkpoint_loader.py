"""Load a checkpoint with its optimizer state: the policy, AdamW's moments by name, and the record of how it was trained.

Reads what the Hugging Face Trainer wrote (`adapter_model.safetensors` or a whole model, `optimizer.pt`, `scheduler.pt`,
`trainer_state.json`), and the sidecar of checkpoints of ours. Tensors are read with `weights_only=True`: no pickle of a
stranger is ever run, which is also why `training_args.bin` is not opened. Everything that can be checked before loading is
(entropy_experiments.checkpoints.validation), and `doctor` makes the same checks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropy_core.gradients import trainable_parameters
from entropy_experiments.checkpoints.adapter_file import adapter_weights, saved_embeddings, weight_shapes
from entropy_experiments.checkpoints.folder import Adapter, CheckpointRecord, resolve_checkpoint
from entropy_experiments.checkpoints.half_precision import HALF, holds_exactly
from entropy_experiments.checkpoints.loaded_policy import check_loaded_policy
from entropy_experiments.checkpoints.optimizer_names import match_names
from entropy_experiments.checkpoints.policy_outline import resize_vocabulary
from entropy_experiments.checkpoints.stored_moments import StoredMoments
from entropy_experiments.checkpoints.validation import Examined, examine_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.errors import UserError, first_line

if TYPE_CHECKING:
    from rl_training.models.device_map import DeviceMap


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: `model` in evaluation mode with its trainable parameters requiring gradients, `optimizer`
    AdamW's stored states of them by name (None where the checkpoint holds none, or they are not wanted), with the rates of the
    analysed step; `scheduler` its state dict.
    """

    model: nn.Module
    optimizer: StoredMoments | None
    scheduler: dict[str, Any] | None
    tokenizer: Any
    record: CheckpointRecord


def load_checkpoint(
    path: str | Path,
    model_name: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    require_optimizer: bool = True,
    device_map: DeviceMap | None = None,
    learning_rate: float | None = None,
    widened: bool = False,
) -> Checkpoint:
    """Load a checkpoint folder, or the latest checkpoint of a run folder.

    model_name: base model, where the checkpoint's own reference does not load. require_optimizer=False does without the
    optimizer's state, whatever lies there; `optimizer` is then None. dtype: other than the run's; widened: float32 where the
    run's is below, which holds its weights exactly. device_map: where the base model's parts go, in place of `device`; adapters
    and their moments lie where their layers are computed. learning_rate: of the analysed step, in place of the last step's; that
    of the first parameter group, to which others keep their ratio.

    Raises UserError for a missing, partial or changed checkpoint, an adapter whose base model is missing, optimizer state that
    is absent or not AdamW's, or whose entries cannot be matched to parameters with certainty, a learning rate that is not
    recorded; a policy that is not the one that was saved (entropy_experiments.checkpoints.loaded_policy); a device
    map that does not fit, or that would offload what is trained.
    """
    folder = resolve_checkpoint(path)
    found = examine_checkpoint(folder, model_name, learning_rate, with_optimizer=require_optimizer)
    found.refuse(require_optimizer)
    own = found.sidecar.dtype if found.sidecar else None
    precision = dtype or ("float32" if widened and own in HALF else own) or "float32"
    model, tokenizer = _load_policy(found, device, precision, own, device_map)
    check_loaded_policy(model, folder, found.sidecar, require_optimizer)
    record = CheckpointRecord(
        path=folder,
        step=found.step,
        model_name=found.model_name,
        sidecar=found.sidecar,
        log_history=found.log_history,
        learning_rates=found.learning_rates,
        imported=found.imported,
    )
    optimizer = _stored_moments(found, model) if require_optimizer else None
    return Checkpoint(model, optimizer, found.scheduler, tokenizer, record)


def load_as_configured(path: str | Path, config: FisherAnalysisConfig, device: str | None = None) -> Checkpoint:
    """The checkpoint as an analysis wants it. device: in place of the configured one. Raises UserError as `load_checkpoint`."""
    settings = config.checkpoint
    placed = None
    if settings.device_map is not None:
        from rl_training.models.device_map import DeviceMap

        placed = DeviceMap(settings.device_map, settings.max_memory, settings.offload_folder)
    return load_checkpoint(
        path,
        settings.model,
        device or settings.device,
        settings.dtype,
        require_optimizer=config.entropy_analysis.fisher_kernel.preconditioning != "none",
        device_map=placed,
        learning_rate=settings.learning_rate,
        widened=True,
    )


def _load_policy(
    found: Examined, device: str, precision: str, trained_in: str | None, device_map: DeviceMap | None
) -> tuple[nn.Module, Any]:
    from entropy_experiments.checkpoints.offloading import read_again_in_backward
    from rl_training.models.device_map import PlacementError
    from rl_training.models.load import load_model_and_tokenizer, read_tokenizer

    folder = found.folder
    try:
        # A run with an adapter rounded its base model when it loaded it, whatever that is saved in; what a run trained whole is
        # saved as its optimizer has it.
        rounded = trained_in in HALF and precision != trained_in and found.adapter is not None
        first = trained_in if rounded and trained_in and device_map is None else precision
        model, tokenizer = load_model_and_tokenizer(found.model_name, first, device, device_map=device_map)
        if rounded and device_map is None:
            model.to(getattr(torch, precision))
    except PlacementError:
        raise
    except UserError as error:
        raise UserError(
            f"the base model of {folder} does not load: {error}; name another with checkpoint.model=..."
        ) from error
    if rounded and device_map is not None:
        _refuse_finer_base(model, found, str(trained_in))
    if found.adapter is not None:
        _add_tokens(model, found.adapter, folder)
        model = _attach_adapter(model, found.adapter.folder, found.adapter.name)
    else:
        model.requires_grad_(True)
    if device_map is not None:
        _refuse_offloaded_training(model, folder)
        read_again_in_backward(model)
    if (folder / "tokenizer_config.json").exists():
        own = read_tokenizer(folder)
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


def _refuse_finer_base(model: nn.Module, found: Examined, trained_in: str) -> None:
    """Raises UserError where a base model that is placed by a device map has digits that the run's had not."""
    finer = [
        n for n, p in model.named_parameters() if p.device.type != "meta" and not holds_exactly(p, HALF[trained_in])
    ]
    if finer:
        raise UserError(
            f"{found.folder} was trained on its base model in {trained_in}, and {found.model_name} is saved with more digits "
            f"({finer[0]!r}): save the base model in that precision and name it with checkpoint.model=..., or leave "
            "checkpoint.device_map out"
        )


def _add_tokens(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Rows for tokens that were added before training, which the adapter's file brings."""
    shapes = weight_shapes(adapter_weights(adapter.folder))
    if hasattr(model, "hf_device_map") and saved_embeddings(shapes):
        raise UserError(
            f"{folder} has embeddings of its own, which checkpoint.device_map cannot place: load it on one device"
        )
    resize_vocabulary(model, shapes, folder)


def _attach_adapter(model: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    from peft import PeftModel
    from safetensors import SafetensorError

    from entropy_experiments.checkpoints.offloading import place_adapters, placement_hidden
    from rl_training.models.load import disable_dropout

    where = str(folder)
    try:
        with warnings.catch_warnings(), placement_hidden(model):
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("ignore", message="(?s).*to a meta parameter.*no-op")  # these are read again
            adapted = PeftModel.from_pretrained(model, where, adapter_name=name, is_trainable=True)
            place_adapters(adapted, where)
    except (SafetensorError, RuntimeError, ValueError, OSError, UserWarning) as error:
        line = first_line(error)
        raise UserError(f"the adapter in {where} does not fit its base model or is damaged: {line}") from error
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


def _stored_moments(found: Examined, model: nn.Module) -> StoredMoments:
    state = found.optimizer_state
    assert state is not None, "examine_checkpoint reads it wherever it is required"
    names = match_names(model, state, found.recorded_names)
    return StoredMoments(found.optimizer_path, state, names, found.learning_rates, trainable_parameters(model))
