"""What a probe rests on between two steps, as a file of a checkpoint: running averages, their ages, known policies.

`entropy_probe-<rank>.probe` is in the format of safetensors; each process writes its own, since it holds a part of each gradient.
(The suffix is another, since programs that load models take every `*.safetensors` of a folder for weights.) A SHA-256 of the
tensors is in the header, where also stands which settings and parameters they are of. Everything is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entropy_core.fold_gradients import FoldGradients
from entropy_core.processes import Processes
from rl_training.files import opened_regular, write_whole_by
from rl_training.probe.running_gradient import RunningGradient

_FORMAT = "entropy probe, 1"
_GRADIENT, _SHARES = "gradient/", "shares/"
_LARGEST_HEADER = 64 << 20


@dataclass
class ProbeState:
    """Attributes:
    averages: by name of a gradient. steps_since: optimizer steps since the newest gradient was taken. no_parts: why steps of
    this optimizer have no known parts, found out by watching one. tensors, values: of others that watch beside it, for `load`.
    """

    averages: dict[str, RunningGradient] = field(default_factory=dict)
    steps_since: int = 0
    no_parts: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def state_path(checkpoint: Path, rank: int) -> Path:
    """The file of one process."""
    return checkpoint / f"entropy_probe-{rank}.probe"


def write_state(path: Path, state: ProbeState, settings: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all.

    Args:
        settings: what a run that goes on from it must have in common with this one; plain JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    weights = {}
    for key, average in state.averages.items():
        if average.value is None:
            continue
        weights[key] = average.weight
        for name, folds in average.value.folds.items():
            tensors[f"{_GRADIENT}{key}/{name}"] = folds.detach().cpu().contiguous()
        if average.value.shares is not None:
            tensors[f"{_SHARES}{key}"] = average.value.shares.detach().cpu().contiguous()
    about = {
        "format": _FORMAT, "settings": dict(settings), "weights": weights, "steps_since": state.steps_since,
        "no_parts": state.no_parts, "values": state.values, "sha256": _digest(tensors),
    }  # fmt: skip
    header = {"entropy_probe": json.dumps(about, allow_nan=False)}
    write_whole_by(path, lambda part: save_file(tensors, part, header))


def read_state(
    path: Path, settings: Mapping[str, Any], parameters: Mapping[str, Tensor], keep: float, processes: Processes
) -> ProbeState:
    """Read the file.

    Args:
        settings: as `write_state` had them.
        parameters: the trained ones, name -> tensor; gradients go to their devices.
        keep: of the averages. processes: that hold the other parts of every gradient.

    Raises:
        ValueError: saying what is wrong with it, or which settings are others.
        UserError: where it is no regular file.
    """
    about, tensors = _contents(path)
    if about.get("format") != _FORMAT or not isinstance(about.get("settings"), dict):
        raise ValueError("it is no record of a probe")
    for name in sorted(about["settings"].keys() | settings.keys()):
        then, now = about["settings"].get(name), settings.get(name)
        if then != now:
            raise ValueError(f"it is of {name}={then}, and here {name}={now}")
    if about.get("sha256") != _digest(tensors):
        raise ValueError("its numbers are not those that were written")
    weights, since, no_parts = about.get("weights"), about.get("steps_since"), about.get("no_parts")
    if not isinstance(weights, dict) or not isinstance(since, int) or since < 0 or isinstance(since, bool):
        raise ValueError("its weights or steps are missing")
    if not (no_parts is None or isinstance(no_parts, str)) or not isinstance(about.get("values"), dict):
        raise ValueError("it is incomplete")
    averages = {key: _average(key, weight, tensors, parameters, keep, processes) for key, weight in weights.items()}
    others = {name: t for name, t in tensors.items() if not name.startswith((_GRADIENT, _SHARES))}
    return ProbeState(averages, since, no_parts, others, about["values"])


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with opened_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST_HEADER:
        raise ValueError("its header is too long")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("entropy_probe", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(about, dict):
        raise ValueError("it is no record of a probe")
    return about, tensors


def _average(
    key: str,
    weight: Any,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    keep: float,
    processes: Processes,
) -> RunningGradient:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight of {key!r} is not positive")
    prefix = f"{_GRADIENT}{key}/"
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if found.keys() != parameters.keys():
        raise ValueError("it is of other trained parameters")
    counts = {t.shape[0] for t in found.values() if t.dim()}
    if len(counts) != 1:
        raise ValueError("its folds differ in number")
    for name, t in found.items():
        if t.shape[1:] != parameters[name].shape or not t.is_floating_point() or not bool(t.isfinite().all()):
            raise ValueError(f"the gradient of {name!r} has another shape, or is not finite")
    shares = tensors.get(f"{_SHARES}{key}")
    if shares is not None and not (shares.shape == (counts.pop(),) and abs(float(shares.sum()) - 1) < 1e-6):
        raise ValueError("the parts of its folds do not add up to 1")
    # Copied: memory that is aligned otherwise than torch's own is added up in another order.
    folds = {name: found[name].clone().to(parameter.device) for name, parameter in parameters.items()}
    return RunningGradient(keep, FoldGradients(folds, processes, shares), float(weight))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
