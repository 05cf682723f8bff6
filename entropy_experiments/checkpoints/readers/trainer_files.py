"""What the Trainer of transformers lays beside every optimizer's files: step, schedule, and the
files of save_pretrained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from rl_training.errors import UserError
from rl_training.run.sidecar import refuse_special_file

_MOST_JSON = 1 << 30
SAVED_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def read_json_dict(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file. Raises UserError where it cannot be read."""
    if not path.exists():
        return {}
    refuse_special_file(path)
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError("it is larger than any checkpoint's")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object: the checkpoint is damaged; copy it again")
    return content


def step_beside(folder: Path) -> int | None:
    """global_step of trainer_state.json; None without it."""
    step = read_json_dict(folder / "trainer_state.json").get("global_step")
    return step if type(step) is int and step >= 0 else None


def schedule_beside(folder: Path) -> dict[str, Any] | None:
    """scheduler.pt (of accelerate's save_state scheduler.bin), plain data; None without it."""
    path = next((p for name in ("scheduler.pt", "scheduler.bin") if (p := folder / name).exists()), None)
    return None if path is None else plain_schedule(read_torch_file(path))


def plain_schedule(content: Any) -> dict[str, Any] | None:
    """A schedule's state without the tensors that it may hold."""
    if not isinstance(content, dict):
        return None
    return {str(k): v for k, v in content.items() if not isinstance(v, StoredTensor)}


def weights_beside(folder: Path) -> Path | None:
    """The folder, where save_pretrained's weights or at least a model's configuration lie in it."""
    names = (*SAVED_WEIGHTS, "config.json", "adapter_config.json")
    return folder if any((folder / name).exists() for name in names) else None
