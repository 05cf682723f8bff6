"""What `doctor` says of another trainer's checkpoints before they are imported; no tensor is read but for checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entropy_experiments.checkpoints.foreign import foreign_layout
from entropy_experiments.checkpoints.imported import IMPORT_RECORD
from entropy_experiments.checkpoints.readers.layouts import find_sources
from entropy_experiments.checkpoints.readers.trained_state import TrainedState
from entropy_experiments.checkpoints.readers.trainer_files import SAVED_WEIGHTS
from rl_training.errors import UserError


def importable(folder: Path) -> bool:
    """Whether `doctor` should speak of importing: the checkpoint in the folder, or a run's last one, is of a layout that is read,
    and not one that is analysed as it is.
    """
    try:
        last = find_sources(folder)[-1].folder
    except (UserError, OSError):  # no folder, or one of no layout that is read
        return False
    if (last / "optimizer.pt").exists() or (last / IMPORT_RECORD).exists():
        return False
    foreign = foreign_layout(last)
    if foreign is not None:
        return foreign.imported
    return not any((last / name).exists() for name in (*SAVED_WEIGHTS, "adapter_config.json"))


@dataclass(frozen=True)
class SourceDiagnosis:
    """What is in a foreign checkpoint, or a run's last one. lines: for a person. layout: in words. healthy: whether it can be
    imported without more. command: how; None where it cannot. moments: whether Adam's come with it.
    """

    lines: list[str]
    layout: str
    healthy: bool
    command: str | None
    moments: bool = False


def describe(folder: Path) -> SourceDiagnosis:
    """What a foreign checkpoint holds and lacks, and whether it can be imported whole.

    Raises:
        UserError: Where it is no layout that is read.
    """
    sources = find_sources(folder)
    source = sources[-1]
    lines = [f"checkpoint {source.folder}"]
    if len(sources) > 1:
        lines.append(f"  the last of {len(sources)} checkpoints, which are imported together")
    try:
        state = source.read()
    except UserError as error:
        lines += [f"  MISSING {error}", "cannot be imported as it is"]
        foreign = foreign_layout(source.folder)
        return SourceDiagnosis(lines, "unreadable" if foreign is None else foreign.name, False, None)
    lines += [f"  {state.layout}", f"  step {'unknown' if state.step is None else state.step}", *_parts(state)]
    missing = _missing(state)
    lines += [f"  {note}" for note in (*state.notes, *((state.adam.notes) if state.adam else ()))]
    lines += [f"  MISSING {line}" for line in missing]
    command = f"entropy-experiments import {folder} --output RUN{' --model FOLDER' if missing and state.adam else ''}"
    lines.append(f"can be imported: {command}")
    return SourceDiagnosis(lines, state.layout, not missing, command, state.adam is not None)


def _parts(state: TrainedState) -> list[str]:
    saved = state.weights_folder is not None and any((state.weights_folder / n).exists() for n in SAVED_WEIGHTS)
    lines = [
        f"  weights: {'saved by save_pretrained' if saved else f'{len(state.weights)} tensors, gathered at import'}"
    ]
    if state.adam is None:
        return [
            *lines,
            "  optimizer: none; analyse with fisher_kernel.preconditioning=none and checkpoint.learning_rate",
        ]
    rates = ", ".join(f"{group.settings.get('lr', 0):g}" for group in state.adam.groups)
    names = "named in the files" if state.adam.named else "numbered; named by the model's order at import, and verified"
    lines.append(f"  AdamW: moments of {len(state.adam.entries)} parameters at step {state.adam.step}, {names}")
    lines.append(f"  parameter groups: {len(state.adam.groups)}, learning rates in the file {rates}")
    return lines


def _missing(state: TrainedState) -> list[str]:
    places = [place for place in (state.weights_folder, state.folder) if place is not None]
    lines = []
    if not any((place / name).exists() for place in places for name in ("config.json", "adapter_config.json")):
        lines.append("config.json and a tokenizer: give --model, a folder of save_pretrained or a name on the hub")
    elif not any((place / name).exists() for place in places for name in ("tokenizer.json", "tokenizer_config.json")):
        lines.append("a tokenizer (tokenizer.json): give --model, a folder of save_pretrained or a name on the hub")
    return lines
