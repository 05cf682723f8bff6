"""Every layout is read back equal to the moments and weights that were gathered when it was written."""

import os

import pytest
import torch

from entropy_experiments.checkpoints.readers.accelerate_fsdp import lazy_inside
from entropy_experiments.checkpoints.readers.adam_entries import adam_state
from entropy_experiments.checkpoints.readers.layouts import find_source, find_sources
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.stored.write_zero import HERE, STAGES
from tests.entropy_experiments.checkpoints.readers.zero_layout import deepspeed_names
from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes

LAYOUTS = {
    written.VERL: "verl or SkyRL, FSDP2, 2 processes",
    written.PRIME: "torch DCP tree (prime-rl)",
    written.OPENRLHF: "torch DCP tree (OpenRLHF FSDP2 or like it)",
    written.TITAN: "torch DCP tree (torchtitan)",
    written.FULL: "accelerate or TRL, FSDP, full",
    written.SHARDED: "accelerate or TRL, FSDP, sharded",
    written.RANKED: "accelerate or TRL, FSDP, sharded",
    written.TRAINER: "HF Trainer",
    written.NEMO: "torch DCP tree (NeMo-RL)",
    written.VEOMNI: "verl or SkyRL, FSDP2, 2 processes",
    written.STATE: "accelerate, save_state",
    "zero1/checkpoint-4": "DeepSpeed ZeRO-1, 2 processes",
    "zero2/checkpoint-4": "DeepSpeed ZeRO-2, 2 processes",
    "zero3/checkpoint-4": "DeepSpeed ZeRO-3, 2 processes",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_the_gathered_state(formats, reference, name):
    state = find_source(formats / name).read()
    assert state.layout == LAYOUTS[name]
    assert state.step == written.STEPS
    names = [group["params"] for group in reference["groups"]]
    adam = state.adam if state.adam.named else state.adam.with_names(names)
    assert [set(group.keys) for group in adam.groups] == [set(own) for own in names]
    for group, wanted in zip(adam.groups, reference["groups"], strict=True):
        for key in ("lr", "eps", "weight_decay", "amsgrad"):
            assert group.settings[key] == wanted[key], key
        assert tuple(group.settings["betas"]) == tuple(wanted["betas"])
    assert adam.entries.keys() == reference["moments"].keys()
    for key, moments in reference["moments"].items():
        assert adam.entries[key].step == int(moments["step"])
        assert torch.equal(adam.first(key), moments["exp_avg"]), key
        assert torch.equal(adam.second(key), moments["exp_avg_sq"]), key
    for key, weight in state.weights.items():
        assert torch.equal(weight.read(), reference["weights"][key]), key
    if name not in (written.TRAINER, written.STATE):
        assert state.weights.keys() >= set(sum(names, []))
    assert sum(1 for _ in state.tensors()) == len(state.weights) + 2 * len(adam.entries)


def test_flat_vectors_of_fsdp1_are_told_apart_by_the_layers(formats, reference):
    """The same steps taken under FSDP1: equal but for the order of its sums."""
    state = find_source(formats / written.FSDP1).read()
    assert state.layout.startswith("verl or SkyRL, FSDP1")
    assert state.adam.named and len(state.adam.groups) == 1
    assert state.adam.entries.keys() == reference["moments"].keys()
    alike = 0
    for key, moments in reference["moments"].items():
        first, second = state.adam.first(key), state.adam.second(key)
        assert torch.allclose(
            first, moments["exp_avg"], rtol=1e-2, atol=1e-2 * float(moments["exp_avg"].abs().max())
        ), key
        assert torch.allclose(
            second, moments["exp_avg_sq"], rtol=1e-2, atol=1e-3 * float(moments["exp_avg_sq"].max())
        ), key
        alike += 1
    assert alike == 20


@pytest.mark.parametrize("name", STAGES)
def test_files_that_deepspeed_wrote(name):
    """Weights as its own zero_to_fp32 has them; moments as torch's AdamW has them after the same clipped steps."""
    state = find_source(HERE / name).read()
    stage, bf16 = STAGES[name]
    assert state.layout == f"DeepSpeed ZeRO-{stage}, 2 processes" and state.step == 3
    expected = torch.load(HERE / name / "expected.pt")
    moments = expected["moments"]
    assert state.adam.entries.keys() == moments.keys() and len(state.adam.groups) == 2
    for key, entry in moments.items():
        assert torch.equal(state.weight(key), expected["weights"][key]), key
        assert state.adam.entries[key].step == 3
        for found, wanted in ((state.adam.first(key), entry["exp_avg"]), (state.adam.second(key), entry["exp_avg_sq"])):
            tolerance = 0.05 if bf16 else 1e-6
            assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), key


def bitsandbytes(name: str):
    path = HERE / f"{name}.pt"
    content = read_torch_file(path)
    content["state"] = {k: {f: lazy_inside(path, v) for f, v in e.items()} for k, e in content["state"].items()}
    return adam_state(path, content)


def test_eight_bit_moments_are_those_that_bitsandbytes_dequantises():
    adam, expected = bitsandbytes("adamw_8bit"), torch.load(HERE / "adamw_8bit_expected.pt")
    assert adam.quantised and adam.notes
    assert [group.settings["weight_decay"] for group in adam.groups] == [0.01, 0.01]
    for key in adam.entries:
        assert torch.equal(adam.first(key), expected[f"{key}/1"]), key
        assert torch.equal(adam.second(key), expected[f"{key}/2"]), key
    assert {adam.entries[key].step for key in adam.entries} == {5}


def test_paged_moments_are_plain():
    adam = bitsandbytes("adamw_paged_32bit")
    assert not adam.quantised and len(adam.entries) == 3
    assert bool((adam.second(2) > 0).all())


def test_another_optimizer_of_bitsandbytes_is_named():
    with pytest.raises(UserError, match="optimizer of bitsandbytes that is not AdamW"):
        bitsandbytes("lion_8bit")


def test_a_run_is_all_of_its_steps(formats, tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        (run / f"global_step_{step}").mkdir(parents=True)
        (run / f"global_step_{step}" / "actor").symlink_to(formats / written.VERL / "actor")
    assert [source.folder.name for source in find_sources(run)] == ["global_step_2", "global_step_10"]
    assert [source.folder.name for source in find_sources(formats / "prime")] == ["step_4"]
    with pytest.raises(UserError, match="no checkpoint of a layout that is read"):
        find_sources(tmp_path)


@pytest.mark.long
def test_three_processes_cut_unevenly(tmp_path):
    """Rows that three do not divide: 99, 32 and 16 of them."""
    save_tiny_policy(tmp_path / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, written.FOLDER, str(tmp_path))
        in_two_processes(written.write_formats, size=3)
    reference = torch.load(tmp_path / "reference.pt")
    names = [group["params"] for group in reference["groups"]]
    for name in (written.VERL, written.PRIME, written.TITAN, written.SHARDED, written.RANKED):
        state = find_source(tmp_path / name).read()
        adam = state.adam if state.adam.named else state.adam.with_names(names)
        for key, moments in reference["moments"].items():
            assert torch.equal(state.weight(key), reference["weights"][key]), (name, key)
            assert torch.equal(adam.second(key), moments["exp_avg_sq"]), (name, key)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_adams_of_deepspeed_count_in_the_group(copied, corrected):
    """FusedAdam and DeepSpeedCPUAdam, to their documented layout; without bias correction it is another step."""
    folder = copied("zero2/checkpoint-4")
    for path in folder.rglob("*_optim_states.pt"):
        with deepspeed_names():
            content = torch.load(path, weights_only=False)
            base = content["optimizer_state_dict"]["base_optimizer_state"]
            for entry in base["state"].values():
                del entry["step"]
            kept = ("lr", "betas", "eps", "weight_decay", "params")
            own = {"step": 4, "bias_correction": corrected}
            base["param_groups"] = [{k: group[k] for k in kept} | own for group in base["param_groups"]]
            torch.save(content, path)
    if not corrected:
        with pytest.raises(UserError, match="bias_correction off"):
            find_source(folder).read()
        return
    state = find_source(folder).read()
    assert {entry.step for entry in state.adam.entries.values()} == {4}
    assert state.adam.groups[0].settings["decoupled_weight_decay"] is True
    assert "does not record whether weight decay is decoupled" in state.notes[0]
