"""The record of a checkpoint that `import` made out of another trainer's: where each thing came
from, and the optimizer's groups.

Beside it lie the weights in the files of save_pretrained and `moments.safetensors`, exp_avg and
exp_avg_sq by the names of the parameters, so that a tensor is read from the file when it is asked
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open

from rl_training.configuration import StrictModel, validate_config
from rl_training.errors import UserError
from rl_training.files import read_json_object
from rl_training.run import record_ranges as of
from rl_training.run.checkpoint_digests import file_digest
from rl_training.run.sidecar import refuse_special_file

IMPORT_RECORD = "imported.json"
MOMENTS_FILE = "moments.safetensors"
_FIRST, _SECOND, _LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


class ImportedGroup(StrictModel):
    """A parameter group: names in the model's own order, and AdamW's settings as the source holds
    them.
    """

    names: of.Texts
    lr: float = Field(ge=0, le=1e3, allow_inf_nan=False)
    betas: list[float] = Field(min_length=2, max_length=2)
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool | None = None
    initial_lr: float | None = None


class ImportRecord(StrictModel):
    """What `import` found and did."""

    format: Literal[1]
    source: of.Text
    """Folder of the checkpoint that was imported, as it was called then."""
    layout: of.Text
    step: of.Step
    named_by: Literal["files", "order"]
    """Whether the source names its optimizer entries, or they were named by the model's order and
    verified by shapes.
    """
    quantised: bool
    """Whether the moments were stored in 8 bits, so that they are rounded."""
    groups: list[ImportedGroup]
    steps: dict[of.Text, of.Step]
    """Steps that each parameter's moments have seen; parameters without moments are not in it."""
    scheduler: of.Settings | None
    origins: dict[of.Text, of.Text]
    """File of this folder -> where it came from."""
    sha256: dict[of.Text, of.Digest]
    notes: list[of.Text]
    versions: dict[of.Text, of.Text]

    @property
    def names(self) -> list[list[str]]:
        """Of the optimizer's entries, by group."""
        return [list(group.names) for group in self.groups]


def read_import_record(folder: Path) -> ImportRecord | None:
    """The record of an imported checkpoint, None where there is none. Raises UserError for one that
    is damaged.
    """
    path = folder / IMPORT_RECORD
    if not path.exists():
        return None
    refuse_special_file(path)
    return validate_config(ImportRecord, read_json_object(path, "import the checkpoint again"), str(path))


def check_imported_files(folder: Path, record: ImportRecord) -> None:
    """Raises UserError, naming it, for a file that is not as it was at import: a linked one may
    have been written anew.
    """
    for name, digest in sorted(record.sha256.items()):
        path = folder / name
        if not path.is_file() or Path(name).name != name:
            raise UserError(f"{path} is gone (weights are linked from {record.source}): import the checkpoint again")
        if file_digest(path) != digest:
            raise UserError(
                f"{path} is not the file that was imported (its SHA-256 differs): it was written anew in {record.source}, or is "
                "damaged; import the checkpoint again"
            )


def moment_key(kind: str, name: str) -> str:
    """Name of a tensor in `moments.safetensors`."""
    return f"{kind}/{name}"


def imported_optimizer(folder: Path, record: ImportRecord) -> dict[str, Any]:
    """The state dict of torch's AdamW over the moments, which stay in the file until they are read.

    Raises:
        UserError: For a file of moments that is damaged, or has other parameters than the record.
    """
    path = folder / MOMENTS_FILE
    numbers = {name: number for number, name in enumerate(name for group in record.names for name in group)}
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            state = {}
            for name, step in record.steps.items():
                kinds = [kind for kind in (_FIRST, _SECOND, _LARGEST) if moment_key(kind, name) in keys]
                if name not in numbers or kinds[:2] != [_FIRST, _SECOND]:
                    raise UserError(
                        f"{path} and {IMPORT_RECORD} do not name the same parameters: import the checkpoint again"
                    )
                state[numbers[name]] = {"step": float(step)} | {k: file.get_tensor(moment_key(k, name)) for k in kinds}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): import the checkpoint again") from error
    return {"state": state, "param_groups": [_group(group, numbers) for group in record.groups]}


def _group(group: ImportedGroup, numbers: dict[str, int]) -> dict[str, Any]:
    settings = {k: v for k, v in group.model_dump().items() if k != "names" and v is not None}
    return {**settings, "params": [numbers[name] for name in group.names], "param_names": list(group.names)}
