"""Optimizer states of FSDP1: one flat vector for each wrapped unit, cut among the processes, its
parameters named nowhere.

A unit's parameters lie one after the other in the order of the model, padded at the end to the
number of processes. Which parameters make up a unit is told only where the lengths allow one
reading: units are the decoder's layers, as trainers wrap them, and what is left is the root's,
which comes first. Source: torch.distributed.fsdp, _flat_param.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.flat_vectors import cut, is_vector
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor
from rl_training.errors import UserError

_LAYER = re.compile(r"(.*?\.(?:layers|h|blocks|block)\.\d+)\.")
_REMEDY = "save it by FSDP2 (actor.strategy=fsdp2), whose parameters have names, or analyse with preconditioning=none"


def is_flat(states: Sequence[Mapping[Any, Any]]) -> bool:
    """Whether all moments are vectors of this process alone, as FSDP1 keeps them."""
    moments = [entry.get("exp_avg") for state in states for entry in state.values() if isinstance(entry, dict)]
    return bool(moments) and all(map(is_vector, moments))


def unflatten(
    paths: Sequence[Path], states: Sequence[Mapping[Any, Any]], groups: Any, weights: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """The state dict by parameter names. weights: By name, in the model's order, with the shapes
    that are looked for.

    Raises UserError where the lengths of the vectors do not allow exactly one reading.
    """
    folder, world = paths[0].parent, len(paths)
    whole = all(isinstance(entry, dict) for state in states for entry in state.values())
    if not whole or not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{folder}: the optimizer's flat vectors are not those of Adam: {_REMEDY}")
    numbers = [key for group in groups for key in group.get("params", [])] if isinstance(groups, list) else []
    if any(list(state) != list(states[0]) for state in states) or sorted(map(str, states[0])) != sorted(
        map(str, numbers)
    ):
        raise UserError(
            f"{folder}: the optimizer's flat vectors differ between processes, or some are missing: {_REMEDY}"
        )
    if len(groups) != 1:
        raise UserError(
            f"{folder}: the optimizer's flat vectors (FSDP1) lie in {len(groups)} groups, and nothing names them: {_REMEDY}"
        )
    units = _units(folder, weights)
    by_text = {str(key): key for key in states[0]}
    vectors = [by_text[str(number)] for number in numbers]
    lengths = [-(-sum(math.prod(shape) for _, shape in unit) // world) for unit in units]
    found = [[_length(state[key]) for state in states] for key in vectors]
    if len(found) != len(units) or any(set(each) != {length} for each, length in zip(found, lengths, strict=True)):
        raise UserError(
            f"{folder}: the optimizer's flat vectors (FSDP1) have lengths that its decoder layers as units do not explain, so "
            f"that nothing says which parameter is where: {_REMEDY}"
        )
    entries: dict[str, Any] = {}
    for key, unit in zip(vectors, units, strict=True):
        offset = 0
        for name, shape in unit:
            entry = states[0][key]
            entries[name] = {"step": _step(entry)} | {
                field: cut(str(folder), [state[key][field] for state in states], offset, shape)
                for field in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                if field in entry
            }
            offset += math.prod(shape)
    return {"state": entries, "param_groups": [{**groups[0], "params": list(entries)}]}


def _units(folder: Path, weights: Mapping[str, LazyTensor]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of each unit: the root's first, then each layer's."""
    root: list[tuple[str, tuple[int, ...]]] = []
    layers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, weight in weights.items():
        matched = _LAYER.match(name)
        (root if matched is None else layers.setdefault(matched[1], [])).append((name, weight.shape))
    if not layers:
        raise UserError(
            f"{folder}: the optimizer's state is of flat vectors (FSDP1), and the model has no layers to cut by: {_REMEDY}"
        )
    # A tied head is listed a second time, and is no parameter of its own.
    tables = {shape for name, shape in root if "embed" in name or "wte" in name}
    tied = [item for item in root if not (item[0].endswith("lm_head.weight") and item[1] in tables)]
    return [tied, *layers.values()]


def _length(entry: Any) -> int:
    moments = [entry.get(field) for field in ("exp_avg", "exp_avg_sq")]
    lengths = {m.shape[0] for m in moments if isinstance(m, StoredTensor)}
    return lengths.pop() if len(lengths) == 1 else -1


def _step(entry: Any) -> Any:
    step = entry.get("step")
    return step.read().item() if isinstance(step, StoredTensor) and step.numel == 1 else step
