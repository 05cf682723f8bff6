"""What lies in a checkpoint folder: which parts it has and lacks, and its step; nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entropy_experiments.checkpoints.foreign import ForeignLayout, foreign_layout, is_foreign_run
from entropy_experiments.checkpoints.imported import IMPORT_RECORD, MOMENTS_FILE, ImportRecord, read_import_record
from rl_training.errors import UserError
from rl_training.files import read_regular
from rl_training.run.sidecar import SIDECAR_NAME, Sidecar, read_sidecar, refuse_special_file

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LEFT_BY_THE_TRAINER = ("optimizer.pt", "scheduler.pt", "training_args.bin")
# What lies in a checkpoint and in no adapter's own subfolder; and what lies beside such subfolders.
_OF_A_CHECKPOINT = ("trainer_state.json", "optimizer.pt", "tokenizer_config.json", "training_args.bin")
_BESIDE_NAMED_ADAPTERS = ("README.md", *_OF_A_CHECKPOINT)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known about how the checkpoint came to be. `sidecar` is None for checkpoints of plain TRL, and `learning_rates`,
    those its last step was taken with by parameter group, are empty where nothing says them. `imported` is the record of a
    checkpoint that `import` made.
    """

    path: Path
    step: int
    model_name: str
    sidecar: Sidecar | None
    log_history: list[dict[str, Any]]
    learning_rates: tuple[float, ...] = ()
    imported: ImportRecord | None = None

    @property
    def optimizer_record(self) -> Literal["none", "names", "digest"]:
        """What the sidecar says of the optimizer's entries: their names, and the digest of the very file as well."""
        if self.imported is not None:
            return "names" if self.imported.named_by == "files" else "none"
        if self.sidecar is None:
            return "none"
        return "digest" if "optimizer.pt" in self.sidecar.sha256 else "names"

    @property
    def run_dir(self) -> Path:
        return self.path.parent


def existing_folder(path: str | Path) -> Path:
    """The folder as given. Raises UserError where it is absent, or a file."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: name a checkpoint folder (.../checkpoint-40) or a run folder")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the checkpoint folder it lies in")
    return folder


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder as given, or the latest `checkpoint-*` of a run folder. Raises UserError where there is none."""
    folder = existing_folder(path)
    if (folder / "trainer_state.json").exists():
        return folder
    numbered = sorted(
        (int(m.group(1)), child) for child in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", child.name))
    )
    if numbered:
        return numbered[-1][1]
    if _is_model_folder(folder) or foreign_layout(folder) is not None:
        return folder
    if is_foreign_run(folder):
        raise UserError(f"{folder} holds checkpoints of another trainer: {import_it(folder)}")
    raise UserError(f"{folder} is neither a checkpoint (no trainer_state.json) nor a run with checkpoint-* folders")


def _is_model_folder(folder: Path) -> bool:
    if (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists():
        return True
    return bool(adapter_folders(folder)) and any((folder / name).exists() for name in _BESIDE_NAMED_ADAPTERS)


def adapter_folders(folder: Path) -> list[Path]:
    """Where PEFT put adapters: the folder itself for the one called "default", a subfolder for others."""
    own = [folder] if (folder / ADAPTER_CONFIG).exists() else []
    inside = (p for p in folder.iterdir() if p.is_dir() and (p / ADAPTER_CONFIG).exists())
    return own + sorted(p for p in inside if not any((p / name).exists() for name in _OF_A_CHECKPOINT))


@dataclass(frozen=True)
class Adapter:
    """The trained adapter of a checkpoint: where its files lie, and what PEFT calls it."""

    folder: Path
    name: str


def find_adapter(folder: Path, sidecar: Sidecar | None) -> Adapter | None:
    """The adapter that was trained, None for a whole model. Raises UserError where it is not clear which one of several it is."""
    found = [Adapter(p, "default" if p == folder else p.name) for p in adapter_folders(folder)]
    if sidecar is not None:
        trained = [name for group in sidecar.optimizer_parameter_names for name in group]
        named = [a for a in found if any(f".{a.name}." in f"{name}." for name in trained)]
        found = named or found
    if len(found) > 1 and found[0].name == "default":  # TRL keeps its reference beside it, under a name
        found = found[:1]
    if len(found) > 1:
        found = [a for a in found if a.name != "ref"]
    if len(found) > 1:
        names = ", ".join(a.name for a in found)
        raise UserError(
            f"{folder} holds several adapters ({names}), and nothing says which was trained: move the others out of it"
        )
    return found[0] if found else None


def checkpoint_step(folder: Path) -> int:
    """Steps taken: the Trainer's count, else the sidecar's, else the number in the folder's name; 0 where nothing says.

    Raises UserError for files that are damaged or disagree.
    """
    sidecar = read_sidecar(folder)
    if not (folder / "trainer_state.json").exists():
        if sidecar is not None:
            return sidecar.step
        imported = read_import_record(folder)
        if imported is not None:
            return imported.step
        numbered = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        return int(numbered.group(1)) if numbered else 0
    step = int(read_trainer_state(folder)["global_step"])
    if sidecar is not None and sidecar.step != step:
        raise UserError(
            f"{folder / SIDECAR_NAME} is of step {sidecar.step}, trainer_state.json of step {step}: files of two checkpoints are "
            "mixed; copy the checkpoint again"
        )
    return step


def missing_parts(folder: Path) -> list[str]:
    """One line for each thing an analysis needs that the checkpoint folder lacks, with how to get it.

    Lines that begin with "optimizer.pt" are of the optimizer's state alone: preconditioning=none does without.
    """
    missing = []
    foreign, imported = foreign_layout(folder), (folder / IMPORT_RECORD).exists()
    sidecar_missing = not (folder / SIDECAR_NAME).exists()
    adapters = adapter_folders(folder)
    if (folder.parent / "rollouts").is_dir() and sidecar_missing and not imported:
        missing.append(
            f"{SIDECAR_NAME}, which this project's trainer writes last: the checkpoint was cut short while saving"
        )
    if adapters:
        if not any((a / ADAPTER_WEIGHTS).exists() for a in adapters):
            advice = _without_adapter_weights(adapters) if foreign is None else _how_else(foreign, folder)
            missing.append(f"{ADAPTER_WEIGHTS} (adapter weights): {advice}")
    elif not any((folder / name).exists() for name in _WEIGHT_FILES):
        advice = "the checkpoint is partial" if foreign is None else _how_else(foreign, folder)
        missing.append(f"model weights (adapter_config.json or model.safetensors): {advice}")
    trained = not sidecar_missing or any((folder / name).exists() for name in _LEFT_BY_THE_TRAINER)
    if not (folder / "trainer_state.json").exists() and trained:
        missing.append("trainer_state.json, which the Trainer writes last: the checkpoint is partial; copy it again")
    if not (folder / "optimizer.pt").exists() and not (imported and (folder / MOMENTS_FILE).exists()):
        missing.append(f"optimizer.pt (Adam's moments): {_without_optimizer(folder, trained)}")
    return missing


def _how_else(foreign: ForeignLayout, folder: Path) -> str:
    return f"{foreign.what}: {import_it(folder)}" if foreign.imported else f"{foreign.what}. {foreign.weights}"


def import_it(folder: Path) -> str:
    """The remedy for a layout that is read, in words."""
    return (
        f"make a run of this project out of it by `entropy-experiments import {folder} --output RUN`, and analyse RUN"
    )


def _without_adapter_weights(adapters: Sequence[Path]) -> str:
    if any((a / "adapter_model.bin").exists() for a in adapters):
        return "adapter_model.bin is a pickle; load it with PEFT and save it again by save_pretrained"
    return "the checkpoint is partial; copy it again, or train on"


def _without_optimizer(folder: Path, trained: bool) -> str:
    alone = "analyse with entropy_analysis.fisher_kernel.preconditioning=none"
    foreign = foreign_layout(folder)
    if foreign is not None and foreign.imported:
        return f"{foreign.what}: {import_it(folder)}"
    if foreign is not None:
        return f"{foreign.what}, whose optimizer state is not read; {alone}"
    if (folder / IMPORT_RECORD).exists():
        return f"the checkpoint that was imported held none; {alone} and checkpoint.learning_rate=..."
    if not (folder / "trainer_state.json").exists() and not trained:
        return f"the folder holds a saved model and no training state; {alone} and checkpoint.learning_rate=..."
    sidecar = read_sidecar(folder)
    if sidecar is not None and "optimizer.pt" in sidecar.sha256:
        return f"it was saved, and is gone; copy the checkpoint again, or {alone}"
    return f"saved with save_only_model=True? Train with save_only_model=False, or {alone}"


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's own state, {} where there is none. Raises UserError where it is damaged."""
    path = folder / "trainer_state.json"
    if not path.exists():
        return {}
    state = read_json(path)
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{path} names no global_step: the checkpoint is damaged; copy it again")
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise UserError(f"{path}: log_history is no list of rows: the checkpoint is damaged; copy it again")
    return state


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint. Raises UserError where it cannot be read."""
    refuse_special_file(path)
    try:
        return json.loads(read_regular(path).decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; copy it again") from error
