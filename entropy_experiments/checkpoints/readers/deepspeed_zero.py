"""Checkpoints of DeepSpeed ZeRO, stages 1 to 3: flat vectors of each process, named by the model
states beside them.

    global_step<N>/[bf16_|fp16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   process r's part of weights and moments
    global_step<N>/mp_rank_00_model_states.pt (stage 3: zero_pp_rank_0_...)   param_shapes: names and shapes in order, by group

Stages 1 and 2: of each parameter group the processes' vectors, laid end to end, hold the parameters
one after the other, each with its `param_alignment_paddings`, padded at the end. Stage 3: of every
parameter process r holds the r-th of W equal parts, the last one padded; groups may be cut into
several vectors. Source: deepspeed/utils/zero_to_fp32.py and runtime/zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_experiments.checkpoints.readers.adam_entries import count_of, lazy, optimizer_groups
from entropy_experiments.checkpoints.readers.flat_vectors import cut, is_vector
from entropy_experiments.checkpoints.readers.inert_pickle import Damaged, Record
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.trained_state import (
    AdamEntry,
    AdamState,
    LazyTensor,
    TrainedState,
    reading,
)
from entropy_experiments.checkpoints.readers.trainer_files import plain_schedule, schedule_beside, weights_beside
from entropy_experiments.checkpoints.readers.zero_files import (
    Shapes,
    files_by_rank,
    model_states,
    optimizer_of,
    param_shapes,
    stage_of,
)
from rl_training.errors import UserError
from rl_training.run.optimizer_state import WITHOUT_IT

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Of DeepSpeed's own Adams beside torch's keys.
_OWN = frozenset({"bias_correction", "step", "adam_w_mode", "set_grad_none"})


def read_zero(folder: Path, beside: Path) -> TrainedState:
    """A checkpoint of DeepSpeed.

    Args:
        folder: Where the files of ZeRO lie.
        beside: The checkpoint's folder, with the Trainer's files and saved weights, where there are
            any.

    Raises:
        UserError: For a missing process, another number of processes, tensor or expert parallelism,
            names that do not fit the vectors, and files that are damaged or hold anything but
            tensors and plain data.
    """
    paths = files_by_rank(folder)
    states = [optimizer_of(path) for path in paths]
    stage, world = stage_of(folder, states), len(paths)
    model_path, model = model_states(folder, stage, world)
    shapes = param_shapes(model_path, model)
    try:
        if stage == 3:
            adam, masters = _stage3(folder, paths, states, shapes)
        else:
            adam, masters = _stage2(folder, paths, states, shapes)
            _check_names(folder, states, shapes)
    except Damaged as error:
        raise UserError(f"{folder}: {error}; copy the checkpoint again") from error
    module = model.get("module")
    rest = {n: lazy(model_path, w) for n, w in module.items()} if isinstance(module, dict) and stage < 3 else {}
    rest = {n: w for n, w in rest.items() if isinstance(w, LazyTensor) and math.prod(w.shape)}
    _check_masters(model_path, masters, rest)
    step = model.get("global_steps")
    schedule = plain_schedule(model.get("lr_scheduler")) or schedule_beside(beside)
    return TrainedState(
        layout=f"DeepSpeed ZeRO-{stage}, {world} process{'es' if world > 1 else ''}",
        folder=beside,
        step=step if type(step) is int else adam.step,
        weights={**rest, **masters},
        adam=adam,
        weights_folder=weights_beside(beside),
        scheduler=schedule,
        ranks=world,
        origins={"weights": f"{folder.name}/*_optim_states.pt", "moments": f"{folder.name}/*_optim_states.pt"},
        notes=adam.notes,
    )


def _settings(folder: Path, groups: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Groups with the settings of torch's AdamW, and what is to be said of them. Raises UserError
    for another optimizer.
    """
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{folder}: its optimizer has no parameter groups: it is damaged; copy it again")
    notes, read = set(), []
    for group in groups:
        own = bool(group.keys() & _OWN)
        if own and group.get("bias_correction", True) is not True:
            raise UserError(f"{folder}: its Adam has bias_correction off, which torch's AdamW has not: {WITHOUT_IT}")
        settings = {key: value for key, value in group.items() if key not in _OWN}
        settings.setdefault("amsgrad", False)
        settings.setdefault("maximize", False)
        if "decoupled_weight_decay" not in settings and settings.get("weight_decay"):
            if group.get("adam_w_mode") is False:
                settings["decoupled_weight_decay"] = False
            elif own:
                settings["decoupled_weight_decay"] = True
                notes.add(
                    "DeepSpeed's Adam does not record whether weight decay is decoupled: taken as AdamW's (its default)"
                )
        read.append(settings)
    return read, tuple(sorted(notes))


def _vectors(paths: Sequence[Path], values: list[Any], what: str) -> list[StoredTensor]:
    if not all(map(is_vector, values)):
        rank = next(rank for rank, value in enumerate(values) if not is_vector(value))
        raise Damaged(
            f"{paths[rank].name} has no flat vector of {what} (another optimizer than Adam, or an elastic checkpoint)"
        )
    return values


def _base(paths: Sequence[Path], states: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The wrapped optimizer's state dict of each process."""
    found: list[dict[str, Any]] = []
    for path, state in zip(paths, states, strict=True):
        base = state.get(key)
        if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
            raise Damaged(
                f"{path.name} has no {key} of Adam (an elastic checkpoint is not read: save with elastic_checkpoint false)"
            )
        found.append(base)
    return found


def _moments(
    paths: Sequence[Path], bases: list[dict[str, Any]], number: int
) -> tuple[dict[str, list[StoredTensor]], Any]:
    """exp_avg and exp_avg_sq of the vector `number`, of every process, and the steps it has
    seen.
    """
    entries = [base["state"].get(number, base["state"].get(str(number))) for base in bases]
    if not all(isinstance(entry, dict) and entry.keys() <= {*_MOMENTS, "step"} for entry in entries):
        raise Damaged(f"the state of vector {number} is not that of Adam, or of no step yet")
    vectors = {name: _vectors(paths, [entry.get(name) for entry in entries], name) for name in _MOMENTS}
    steps = {_step(paths[0], entry, base, number) for entry, base in zip(entries, bases, strict=True)}
    if len(steps) > 1:
        raise Damaged("the processes have seen different numbers of steps: their files are of two checkpoints")
    lengths = {v.shape[0] for both in vectors.values() for v in both}
    if len(lengths) > 1:
        raise Damaged(f"the flat vectors of {_MOMENTS[0]} and {_MOMENTS[1]} have different lengths")
    return vectors, steps.pop()


def _step(path: Path, entry: Mapping[str, Any], base: Mapping[str, Any], number: int) -> int:
    step = entry.get("step")
    if step is None:  # FusedAdam counts in the group
        groups = base.get("param_groups")
        step = groups[min(number, len(groups) - 1)].get("step") if isinstance(groups, list) and groups else None
    return count_of(path, number, lazy(path, step))


def _stage2(
    folder: Path, paths: list[Path], states: list[dict[str, Any]], shapes: Shapes
) -> tuple[AdamState, dict[str, LazyTensor]]:
    bases = _base(paths, states, "base_optimizer_state")
    settings, notes = _settings(folder, bases[0].get("param_groups"))
    if len(settings) != len(shapes):
        raise Damaged(
            f"param_shapes has {len(shapes)} groups, the optimizer {len(settings)}: the files are of two checkpoints"
        )
    paddings = states[0].get("param_alignment_paddings")
    masters = [state.get("single_partition_of_fp32_groups") for state in states]
    entries: dict[str | int, AdamEntry] = {}
    weights: dict[str, LazyTensor] = {}
    for g, group in enumerate(shapes):
        vectors, step = _moments(paths, bases, g)
        flat = _vectors(paths, [m[g] if isinstance(m, list) and g < len(m) else None for m in masters], "weights")
        pads = paddings[g] if isinstance(paddings, list) and g < len(paddings) else [0] * len(group)
        if not isinstance(pads, list) or len(pads) != len(group) or not all(type(p) is int and p >= 0 for p in pads):
            raise Damaged("its paddings do not fit its parameters")
        offset = 0
        for (name, shape), pad in zip(group.items(), pads, strict=True):
            first, second = (cut(f"{folder} ({name})", vectors[m], offset, shape) for m in _MOMENTS)
            entries[name] = AdamEntry(step, first, second)
            weights[name] = cut(f"{folder} ({name})", flat, offset, shape)
            offset += math.prod(shape) + pad
        have = sum(v.shape[0] for v in vectors["exp_avg"])
        if not 0 <= have - offset <= 2 * len(paths) * 512:
            raise Damaged(
                f"group {g} names {offset} elements, and the processes' vectors hold {have}: a part is missing, or it "
                "is of another checkpoint"
            )
    listed = [{**s, "params": list(group)} for s, group in zip(settings, shapes, strict=True)]
    return AdamState(entries, optimizer_groups(folder, listed), notes=notes), weights


def _stage3(
    folder: Path, paths: list[Path], states: list[dict[str, Any]], shapes: Shapes
) -> tuple[AdamState, dict[str, LazyTensor]]:
    bases = _base(paths, states, "optimizer_state_dict")
    settings, notes = _settings(folder, bases[0].get("param_groups"))
    masters = [m for state in states if isinstance(m := state.get("fp32_flat_groups"), list)]
    world = len(paths)
    if len(masters) < world or any(len(m) != len(shapes) for m in masters):
        raise Damaged(
            f"param_shapes has {len(shapes)} groups, the vectors have other ones: the files are of two checkpoints"
        )
    entries: dict[str | int, AdamEntry] = {}
    weights: dict[str, LazyTensor] = {}
    for k, group in enumerate(shapes):
        vectors, step = _moments(paths, bases, k)
        flat = _vectors(paths, [m[k] for m in masters], "weights")
        offset = 0
        for name, shape in group.items():
            each = -(-math.prod(shape) // world)
            first, second, weight = (
                _gathered(f"{folder} ({name})", of, offset, each, shape)
                for of in (vectors["exp_avg"], vectors["exp_avg_sq"], flat)
            )
            entries[name], weights[name] = AdamEntry(step, first, second), weight
            offset += each
        if any(v.shape[0] != offset for v in (*vectors["exp_avg"], *flat)):
            raise Damaged(
                f"vector {k} names {offset} elements of each process, and they hold {flat[0].shape[0]}: a "
                "part is missing, or it is of another checkpoint"
            )
    listed = []
    for group in settings:
        numbers = group.get("params")
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < len(shapes) for n in numbers):
            raise Damaged("its parameter groups do not say which vectors are theirs")
        listed.append({**group, "params": [name for n in numbers for name in shapes[n]]})
    return AdamState(entries, optimizer_groups(folder, listed), notes=notes), weights


def _gathered(origin: str, vectors: list[StoredTensor], offset: int, each: int, shape: tuple[int, ...]) -> LazyTensor:
    """A parameter of stage 3: the same stretch of every process's vector, the last one's padding
    left out.
    """
    if any(offset + each > vector.shape[0] for vector in vectors):
        raise Damaged("the flat vectors of the processes end before their last parameter")

    def read() -> Tensor:
        whole = torch.cat([vector.read_part(offset, offset + each) for vector in vectors])
        return whole[: math.prod(shape)].reshape(shape)

    return reading(origin, shape, vectors[0].dtype, read)


def _check_names(folder: Path, states: list[dict[str, Any]], shapes: Shapes) -> None:
    """Raises Damaged where a process's own record of what lies where in its vector says otherwise
    than param_shapes.
    """
    for rank, state in enumerate(states):
        mappings = state.get("param_slice_mappings")
        if not isinstance(mappings, list) or len(mappings) != len(shapes):
            continue
        for group, mapping in zip(shapes, mappings, strict=True):
            named = [name for name in group if name in mapping] if isinstance(mapping, dict) else []
            starts = [_number_of(mapping[name]) for name in named]
            if not isinstance(mapping, dict) or len(named) < len(mapping) or starts != sorted(starts):
                odd = next((str(n) for n in mapping if n not in group), named[0] if named else "")
                raise Damaged(
                    f"rank {rank}'s file does not have the parameters in the order of the model states, e.g. {odd[:80]!r}: names "
                    "were changed, or the files are of two checkpoints"
                )
            for name, address in mapping.items():
                if (
                    isinstance(address, Record)
                    and len(address.arguments) == 2
                    and address.arguments[0] > math.prod(group[name])
                ):
                    raise Damaged(f"rank {rank}'s file has {name[:80]!r} longer than its shape: names were changed")


def _number_of(address: Any) -> int:
    """Where in its process's vector a parameter begins: fragment_address(numel, start)."""
    arguments = address.arguments if isinstance(address, Record) else ()
    return arguments[1] if len(arguments) == 2 and all(type(n) is int for n in arguments) else 0


def _check_masters(path: Path, masters: Mapping[str, LazyTensor], module: Mapping[str, LazyTensor]) -> None:
    """Raises UserError where a float32 weight, rounded, is not the weight that the model states
    hold under its name.
    """
    for name, master in masters.items():
        saved = module.get(name)
        if saved is None:
            continue
        if saved.shape != master.shape or not torch.equal(master.read().to(saved.dtype), saved.read()):
            raise UserError(
                f"{path}: the weight {name[:80]!r} is not the one that the optimizer's files hold under its name: names "
                "were changed, or the files are of two checkpoints; copy it again"
            )
