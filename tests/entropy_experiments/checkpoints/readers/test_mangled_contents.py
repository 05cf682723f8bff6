"""Files that are whole, and hold something else than a checkpoint's: one value of each at a time is another thing.

Reading either refuses in one line or goes on without it; nothing else is raised, and no tensor of another shape comes out.
"""

import copy
import dataclasses
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_experiments.checkpoints.imported import IMPORT_RECORD, imported_optimizer, read_import_record
from entropy_experiments.checkpoints.readers.layouts import find_source
from entropy_experiments.console.describe_source import describe
from entropy_experiments.console.import_source import import_run
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.zero_layout import deepspeed_names

JUNK = (
    None,
    [],
    {},
    "",
    "x" * 300,
    -1,
    1 << 70,
    float("nan"),
    True,
    torch.zeros(2, 3),
    torch.zeros(3, dtype=torch.int64),
    ["a"],
    {"a": 1},
    (1,),
)
FILES = {
    "accelerate optimizer": (written.FULL, "optimizer.bin"),
    "accelerate weights": (written.FULL, "pytorch_model_fsdp.bin"),
    "Trainer": (written.TRAINER, "optimizer.pt"),
    "schedule": (written.SHARDED, "scheduler.pt"),
    "FSDP1": (written.FSDP1, "actor/optim_world_size_2_rank_1.pt"),
    "extra": (written.VERL, "actor/extra_state_world_size_2_rank_0.pt"),
    "ZeRO-2": ("zero2/checkpoint-4", "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "ZeRO-2 names": ("zero2/checkpoint-4", "global_step4/mp_rank_00_model_states.pt"),
    "ZeRO-3": ("zero3/checkpoint-4", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "ZeRO-3 names": ("zero3/checkpoint-4", "global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "OpenRLHF extra": (written.OPENRLHF, "dcp_checkpoint/_actor/extra_state.pt"),
    "DCP": (written.PRIME, "trainer/.metadata"),
    "verl configuration": (written.VERL, "actor/fsdp_config.json"),
    "trainer_state": (written.FULL, "trainer_state.json"),
}
EACH = 12


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place inside that can be set to something else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not type(value).__dataclass_params__.frozen:
        items = list(vars(value).items())
    elif isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mangle(value: Any, path: tuple, junk: Any) -> None:
    for key in path[:-1]:
        value = vars(value)[key] if dataclasses.is_dataclass(value) else value[key]
    if dataclasses.is_dataclass(value):
        setattr(value, path[-1], junk)
    else:
        value[path[-1]] = junk


def load(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.name == ".metadata":
        return pickle.loads(path.read_bytes())
    with deepspeed_names():
        return torch.load(path, weights_only=False)


def save(path: Path, content: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(content, default=str))
    elif path.name == ".metadata":
        path.write_bytes(pickle.dumps(content))
    else:
        with deepspeed_names():
            torch.save(content, path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_one_value_is_another_thing(copied, kind):
    name, inside = FILES[kind]
    folder = copied(name)
    path = folder / inside
    whole = load(path)
    chosen = random.Random(kind)
    where = [(), *places(whole)]
    for _ in range(EACH):
        place, junk = chosen.choice(where[:40] if chosen.random() < 0.5 else where), chosen.choice(JUNK)
        content = copy.deepcopy(whole)
        if place:
            mangle(content, place, junk)
        try:
            save(path, content if place else junk)
        except (RuntimeError, TypeError, AttributeError):  # torch itself will not write it
            continue
        try:
            state = find_source(folder).read()
            for what, tensor in state.tensors():
                values = tensor.read()
                assert tuple(values.shape) == tensor.shape, what
            describe(folder)
        except UserError as error:
            assert "\n" not in str(error), (place, junk)
        except Exception as error:
            raise AssertionError(f"{kind}: {place} = {str(junk)[:40]!r}: {type(error).__name__}: {error}") from error


@pytest.mark.filterwarnings("ignore")
def test_one_value_of_an_import_record_is_another_thing(formats, tmp_path):
    folder = import_run(formats / written.VERL, tmp_path / "run")[0].folder
    path = folder / IMPORT_RECORD
    whole, chosen = json.loads(path.read_text()), random.Random(0)
    where = list(places(whole))
    for _ in range(200):
        content, place = copy.deepcopy(whole), chosen.choice(where)
        mangle(content, place, chosen.choice([j for j in JUNK if not isinstance(j, torch.Tensor)]))
        path.write_text(json.dumps(content))
        try:
            record = read_import_record(folder)
            imported_optimizer(folder, record)
        except UserError as error:
            assert "\n" not in str(error)
