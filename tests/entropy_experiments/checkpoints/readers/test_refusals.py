"""What is missing, mixed, cut short or renamed is refused by name, in one line, before anything is analysed."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from entropy_experiments.checkpoints.readers.layouts import find_source
from entropy_experiments.console.import_source import import_run
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.zero_layout import deepspeed_names

ZERO2, ZERO3 = "zero2/checkpoint-4", "zero3/checkpoint-4"


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[-1]


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: first(folder, pattern).unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = first(folder, pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    return change


def one_twice(folder: Path) -> None:
    """A process's file over another's."""
    shutil.copyfile(first(folder, "model_*_rank_1.pt"), first(folder, "model_*_rank_0.pt"))


def other_order(folder: Path) -> None:
    """Two names change places in one process's file (its DTensors can be loaded in its process group alone)."""
    path = first(folder, "model_*_rank_1.pt")
    a, b = b"model.layers.0.self_attn.q_proj.weight", b"model.layers.1.self_attn.q_proj.weight"
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            if name.endswith("data.pkl"):
                assert a in data and b in data
                data = data.replace(a, b"\1" * len(a)).replace(b, a).replace(b"\1" * len(a), b)
            archive.writestr(name, data)


def world(pattern: str) -> Callable[[Path], None]:
    """The files say that they are of two processes, and one of another run of three joins them."""

    def change(folder: Path) -> None:
        path = first(folder, pattern)
        shutil.copyfile(
            path, path.with_name(path.name.replace("world_size_2", "world_size_3").replace("rank_1", "rank_2"))
        )

    return change


def resave(pattern: str, edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = first(folder, pattern)
        with deepspeed_names():
            content = torch.load(path, weights_only=False)
            edit(content)
            torch.save(content, path)

    return change


def shuffled(names: dict) -> None:
    """Two parameters of one shape change names."""
    a, b = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    items = [({a: b, b: a}.get(name, name), value) for name, value in names.items()]
    names.clear()
    names.update(items)


def partition(content: dict) -> None:
    content["optimizer_state_dict"]["partition_count"] = 4


def shorter(content: dict) -> None:
    entry = content["state"][1]
    entry.update({key: entry[key][:-1].clone() for key in ("exp_avg", "exp_avg_sq")})


def without_a_unit(content: dict) -> None:
    content["state"].pop(1)


def of_four(folder: Path) -> None:
    path = first(folder, "fsdp_config.json")
    path.write_text(json.dumps({"FSDP_version": 1, "world_size": 4}))


def renamed_shapes(content: dict) -> None:
    shuffled(content["param_shapes"][0])


CASES = {
    "verl, a process missing": (written.VERL, remove("optim_*_rank_1.pt"), "optim_world_size_2_rank_1.pt is missing"),
    "verl, its weights missing": (written.VERL, remove("model_*_rank_1.pt"), "model_world_size_2_rank_1.pt is missing"),
    "verl, another run's process": (written.VERL, world("model_*_rank_1.pt"), "files of 2 and 3 processes"),
    "verl, one rank twice": (written.VERL, one_twice, "same process"),
    "verl, cut short": (written.VERL, cut("optim_*_rank_1.pt"), "optim_world_size_2_rank_1.pt cannot be read"),
    "verl, another order": (written.VERL, other_order, "same parameters in the same order"),
    "FSDP1, a process missing": (
        written.FSDP1,
        remove("optim_*_rank_0.pt"),
        "optim_world_size_2_rank_1.pt|rank_0.pt is missing",
    ),
    "FSDP1, another run's process": (written.FSDP1, world("optim_*_rank_1.pt"), "files of 2 and 3 processes"),
    "FSDP1, another world": (written.FSDP1, of_four, "fsdp_config.json is of 4 processes, the files are of 2"),
    "FSDP1, cut short": (written.FSDP1, cut("optim_*_rank_1.pt"), "optim_world_size_2_rank_1.pt cannot be read"),
    "FSDP1, another order": (written.FSDP1, other_order, "same parameters in the same order"),
    "FSDP1, a vector cut": (written.FSDP1, resave("optim_*_rank_1.pt", shorter), "as units do not explain"),
    "FSDP1, a unit missing": (
        written.FSDP1,
        resave("optim_*_rank_0.pt", without_a_unit),
        "differ between processes, or some are missing",
    ),
    "VeOmni, a process missing": (
        written.VEOMNI,
        remove("optim_*_rank_1.pt"),
        "optim_world_size_2_rank_1.pt is missing",
    ),
    "VeOmni, cut short": (
        written.VEOMNI,
        cut("optim_*_rank_0.pt"),
        "optim_world_size_2_rank_1.pt|rank_0.pt cannot be read",
    ),
    "NeMo-RL, a process missing": (written.NEMO, remove("optimizer/__1_0.distcp"), "optimizer/__1_0.distcp is missing"),
    "NeMo-RL, the optimizer's description missing": (
        written.NEMO,
        remove("optimizer/.metadata"),
        "metadata cannot be read",
    ),
    "NeMo-RL, cut short": (written.NEMO, cut("weights/__0_0.distcp"), "weights/__0_0.distcp has .* it was cut short"),
    "save_state, cut short": (written.STATE, cut("optimizer.bin"), "optimizer.bin cannot be read"),
    "prime-rl, a process missing": (written.PRIME, remove("__1_0.distcp"), "__1_0.distcp is missing"),
    "prime-rl, cut short": (written.PRIME, cut("__1_0.distcp"), "__1_0.distcp has .* it was cut short"),
    "prime-rl, description cut short": (written.PRIME, cut(".metadata"), ".metadata cannot be read: .* cut short"),
    "torchtitan, a process missing": (written.TITAN, remove("__0_0.distcp"), "distcp is missing"),
    "OpenRLHF, a process missing": (written.OPENRLHF, remove("__1_0.distcp"), "__1_0.distcp is missing"),
    "accelerate, a process missing": (written.SHARDED, remove("__1_0.distcp"), "__1_0.distcp is missing"),
    "accelerate, its description missing": (written.SHARDED, remove("optimizer_0/.metadata"), "metadata is missing"),
    "accelerate full, cut short": (written.FULL, cut("optimizer.bin"), "optimizer.bin cannot be read"),
    "accelerate by rank, a process missing": (
        written.RANKED,
        remove("optimizer_0_rank0.bin"),
        "optimizer_0_rank0.bin is missing",
    ),
    "ZeRO-2, a process missing": (ZERO2, remove("zero_pp_rank_1_*optim*"), "is of 2 processes, and there are 1 files"),
    "ZeRO-2, the first missing": (
        ZERO2,
        remove("zero_pp_rank_0_*optim*"),
        "no .*zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
    "ZeRO-2, another world": (ZERO2, resave("zero_pp_rank_1_*optim*", partition), "is of 4 processes"),
    "ZeRO-2, names missing": (ZERO2, remove("mp_rank_00_model_states.pt"), "model_states.pt is missing"),
    "ZeRO-2, cut short": (ZERO2, cut("zero_pp_rank_1_*optim*"), "optim_states.pt cannot be read"),
    "ZeRO-2, names exchanged": (ZERO2, resave("*model_states.pt", renamed_shapes), "names were changed"),
    "ZeRO-3, a process missing": (ZERO3, remove("zero_pp_rank_1_*optim*"), "is of 2 processes, and there are 1 files"),
    "ZeRO-3, cut short": (ZERO3, cut("zero_pp_rank_0_*optim*"), "optim_states.pt cannot be read"),
    "Trainer, cut short": (written.TRAINER, cut("optimizer.pt"), "optimizer.pt cannot be read"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_is_refused_by_name(copied, case):
    name, change, words = CASES[case]
    folder = copied(name)
    change(folder)
    with pytest.raises(UserError) as refused:
        find_source(folder).read()
    assert re.search(words, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [written.PRIME, written.TITAN, written.SHARDED, written.FULL])
def test_no_configuration_is_asked_for(formats, tmp_path, name):
    with pytest.raises(UserError, match=r"has no configuration of its model \(config.json\): give --model"):
        import_run(formats / name, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_another_model_is_refused(formats, tmp_path):
    other = Path(shutil.copytree(formats / "policy", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="has no 'model.layers.2"):
        import_run(formats / written.PRIME, tmp_path / "run", str(other))
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(UserError, match="config.json wants"):
        import_run(formats / written.PRIME, tmp_path / "run", str(other))
