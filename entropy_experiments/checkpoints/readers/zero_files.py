"""The files of a DeepSpeed checkpoint: which there are, of how many processes, and the names and
shapes that they record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.allowed_names import sizes
from entropy_experiments.checkpoints.readers.inert_pickle import Damaged, Record
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from rl_training.errors import UserError
from rl_training.run.optimizer_state import WITHOUT_IT

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_STEP_FOLDER = re.compile(r"global_step(\d{1,9})")
_INSIDE = ("actor", "_actor", "policy")

Shapes = list[dict[str, tuple[int, ...]]]
"""Names and shapes by group, in the vectors' order."""


def zero_folder(folder: Path) -> Path | None:
    """Where the files lie: the folder itself, that named by `latest`, or the newest global_step<N>;
    None where there are none.
    """
    for place in (folder, *(folder / name for name in _INSIDE)):
        if place.is_dir():
            found = _files_in(place)
            if found is not None:
                return found
    return None


def _files_in(place: Path) -> Path | None:
    if any(_OPTIM.fullmatch(path.name) for path in place.iterdir()):
        return place
    steps = {
        path.name: int(m[1]) for path in place.iterdir() if (m := _STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    latest = place / "latest"
    tag = (
        latest.read_text(encoding="utf-8", errors="replace")[:200].strip()
        if latest.is_file() and latest.stat().st_size < 1000
        else ""
    )
    if _STEP_FOLDER.fullmatch(tag) and tag not in steps:
        raise UserError(f"{latest} names {tag}, which is missing: copy it as well, or name the folder of another step")
    chosen = tag if tag in steps else max(steps, key=lambda name: steps[name], default=None)
    inside = None if chosen is None else place / chosen
    return (
        inside
        if inside is not None and any(_OPTIM.fullmatch(p.name) or _MODEL.fullmatch(p.name) for p in inside.iterdir())
        else None
    )


def files_by_rank(folder: Path) -> list[Path]:
    """Every process's file, by rank. Raises UserError where one is missing, or the model was cut
    otherwise as well.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("expp_rank_"):
            raise UserError(f"{path} is of experts spread over processes, which is not read: {WITHOUT_IT}")
        matched = _OPTIM.fullmatch(path.name)
        if matched and int(matched[2]):
            raise UserError(f"{path} is of a model cut by tensor parallelism, which is not read: {WITHOUT_IT}")
        if matched and int(matched[1]) in found:
            raise UserError(
                f"{folder} holds {found[int(matched[1])].name} and {path.name}: two checkpoints are mixed; keep one"
            )
        if matched:
            found[int(matched[1])] = path
    missing = [rank for rank in range(max(found, default=-1) + 1) if rank not in found]
    if not found or missing:
        raise UserError(
            f"{folder} has no *zero_pp_rank_{(missing or [0])[0]}_mp_rank_00_optim_states.pt: every process wrote one; copy "
            "those of every node"
        )
    return [found[rank] for rank in sorted(found)]


def optimizer_of(path: Path) -> dict[str, Any]:
    """The optimizer's state in a process's file. Raises UserError where it has none."""
    content = read_torch_file(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no optimizer_state_dict: it is damaged; copy it again")
    return state


def stage_of(folder: Path, states: list[dict[str, Any]]) -> int:
    """ZeRO's stage. Raises UserError where the files are of another number of processes."""
    world = len(states)
    for rank, state in enumerate(states):
        counts = state.get("partition_count", world)
        for count in counts if isinstance(counts, list) else [counts]:
            if count != world:
                raise UserError(
                    f"{folder}: rank {rank}'s file is of {str(count)[:20]} processes, and there are {world} files: a file is "
                    "missing, or is of another checkpoint; copy those of every node"
                )
        for part in state.get("ds_zero_partition_groups") or ():
            if isinstance(part, dict) and part.get("partition_count", world) != world:
                raise UserError(
                    f"{folder}: rank {rank}'s file has a group cut over {str(part.get('partition_count'))[:20]} of {world} "
                    f"processes (experts or MiCS), which is not read: {WITHOUT_IT}"
                )
    stages = {_number(state.get("zero_stage", 1)) for state in states}  # BF16_Optimizer does as stage 1 and names none
    if len(stages) > 1 or not stages <= {1, 2, 3}:
        raise UserError(f"{folder}: its files are of no one stage of ZeRO: two checkpoints are mixed; copy it again")
    return int(stages.pop() or 0)


def _number(value: Any) -> int | None:
    """ZeroStageEnum is an integer with a name."""
    value = value.arguments[0] if isinstance(value, Record) and value.arguments else value
    return value if type(value) is int else None


def model_states(folder: Path, stage: int, world: int) -> tuple[Path, dict[str, Any]]:
    """(the file that names the parameters, its content). Raises UserError where it is absent, or of
    another checkpoint.
    """
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    path = folder / name
    if not path.exists():
        raise UserError(f"{path} is missing, which names the parameters: the checkpoint is partial; copy it again")
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no model states: it is damaged; copy it again")
    if content.get("mp_world_size", 1) not in (1, None):
        raise UserError(f"{path} is of a model cut by tensor parallelism, which is not read: {WITHOUT_IT}")
    recorded = content.get("dp_world_size", world)
    if recorded != world:
        raise UserError(
            f"{path} is of {str(recorded)[:20]} processes, and there are files of {world}: two checkpoints are "
            "mixed; copy it again"
        )
    return path, content


def param_shapes(path: Path, model: Mapping[str, Any]) -> Shapes:
    """Names and shapes by group, in the vectors' order."""
    listed = model.get("param_shapes")
    try:
        if not isinstance(listed, list) or not listed or not all(isinstance(group, dict) for group in listed):
            raise Damaged("it has no param_shapes, which name the parameters")
        shapes = [{str(name): sizes(shape) for name, shape in group.items()} for group in listed]
        names = [name for group in shapes for name in group]
        if len(set(names)) < len(names):
            raise Damaged("it names a parameter twice")
    except Damaged as error:
        raise UserError(f"{path}: {error}: it is damaged; copy it again") from error
    return shapes
