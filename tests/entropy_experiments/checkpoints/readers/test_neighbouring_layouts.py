"""Folders near a layout that is read: read right from wherever they are named, or refused in a line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from entropy_experiments.checkpoints.foreign import foreign_layout
from entropy_experiments.checkpoints.readers.layouts import find_source, find_sources
from entropy_experiments.console.describe_source import describe
from entropy_experiments.console.import_source import import_run
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.test_refusals import resave

MEGATRON = "is a checkpoint of Megatron"
NAMED_AND_NOT_READ = {
    "Megatron beside a run": (["dist_ckpt/.metadata", "dist_ckpt/common.pt", "dist_ckpt/__0_0.distcp"], MEGATRON),
    "Megatron itself": ([".metadata", "common.pt", "__0_0.distcp"], MEGATRON),
    "Megatron of old": (["iter_0000010/mp_rank_00/model_optim_rng.pt"], MEGATRON),
    "Megatron by verl": (
        ["actor/ckpt_contents.json", "actor/optimizer/dist_ckpt/.metadata", "actor/model/huggingface/config.json"],
        MEGATRON + r" .*verl: model/huggingface.*preconditioning=none",
    ),
    "DeepSpeed, universal": (
        ["mp_rank_00_model_states.pt", "zero/model.norm.weight/exp_avg.pt"],
        r"universal checkpoint of DeepSpeed .*Import the global_step<N>/",
    ),
    "DeepSpeed, universal by its sign": (["latest_universal", "global_step4_universal/zero/a/fp32.pt"], "universal"),
    "DeepSpeed with experts": (
        [f"global_step4/{kind}_rank_0_mp_rank_00_optim_states.pt" for kind in ("zero_pp", "expp")],
        "experts spread over processes",
    ),
    "NeMo-RL in safetensors": (
        ["policy/weights/model/shard-00001.safetensors", "policy/optimizer/optim/.metadata"],
        r"NeMo-RL in shards of safetensors, which are not read: save by policy\.dtensor_cfg",
    ),
    "accelerate with two optimizers": (["optimizer.bin", "optimizer_1.bin"], r"several models .* \(optimizer_1.bin\)"),
    "accelerate with two models": (["optimizer_0/.metadata", "optimizer_1/.metadata"], "several models or optimizers"),
    "a file of one's own": (["ckpt.pt"], "is no checkpoint of a layout that is read"),
    "nothing": ([], "is no checkpoint of a layout that is read"),
}


@pytest.mark.parametrize("case", NAMED_AND_NOT_READ)
def test_what_is_not_read_is_named(case: str, tmp_path: Path) -> None:
    names, words = NAMED_AND_NOT_READ[case]
    folder = tmp_path / "source"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(UserError, match=words) as refused:
        import_run(folder, tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "part", "layout"),
    [
        (written.SHARDED, "optimizer_0", "accelerate or TRL, FSDP, sharded"),
        (written.SHARDED, "pytorch_model_fsdp_0", "accelerate or TRL, FSDP, sharded"),
        (written.VERL, "actor", "verl or SkyRL, FSDP2, 2 processes"),
        (written.VERL, "actor/huggingface", "verl or SkyRL, FSDP2, 2 processes"),
        (written.NEMO, "policy/weights", "torch DCP tree (NeMo-RL)"),
        (written.NEMO, "policy/optimizer", "torch DCP tree (NeMo-RL)"),
        (written.PRIME, "trainer", "torch DCP tree (prime-rl)"),
        ("zero2/checkpoint-4", "global_step4", "DeepSpeed ZeRO-2, 2 processes"),
    ],
)
def test_a_folder_named_too_deep_is_the_whole_checkpoint(formats: Path, name: str, part: str, layout: str) -> None:
    found = find_source(formats / name / part)
    assert found is not None
    state = found.read()
    assert state.layout == layout and state.adam is not None and len(state.adam.entries) == 20 and state.step == 4
    foreign = foreign_layout(formats / name / part)
    assert foreign is None or foreign.imported, "no file of it is Megatron's"


def test_of_deepspeed_the_step_that_latest_names(copied) -> None:
    folder = copied("zero2/checkpoint-4")
    (folder / "latest").write_text("global_step8")
    with pytest.raises(UserError, match="latest names global_step8, which is missing"):
        find_source(folder)
    (folder / "latest_universal").write_text("global_step4_universal")  # converted in place: the shards are still there
    assert foreign_layout(folder).name == "DeepSpeed"
    shutil.copytree(folder / "global_step4", folder / "global_step8")
    resave("global_step8/mp_rank_00_model_states.pt", lambda c: c.update(global_steps=8))(folder)
    assert [source.read().step for source in find_sources(folder)] == [4, 8], "several, as OpenRLHF keeps them"


def test_groups_of_deepspeed_over_some_processes_are_refused(copied) -> None:
    folder = copied("zero3/checkpoint-4")

    def experts(content: dict) -> None:
        content["optimizer_state_dict"]["ds_zero_partition_groups"] = [{"partition_count": 1, "partition_rank": 0}] * 2

    resave("zero_pp_rank_1_*optim*", experts)(folder)
    with pytest.raises(UserError, match="a group cut over 1 of 2 processes"):
        find_source(folder).read()


def test_verl_with_whole_weights_and_no_shards_of_them(formats: Path, copied, reference, tmp_path: Path) -> None:
    """save_contents=['optimizer', 'extra', 'hf_model']."""
    folder = copied(written.VERL) / "actor"
    for path in folder.glob("model_*"):
        path.unlink()
    with pytest.raises(UserError, match="the weights were not saved; save 'model' as well"):
        find_source(folder).read()
    shutil.copyfile(formats / written.TRAINER / "model.safetensors", folder / "huggingface" / "model.safetensors")
    made = import_run(folder, tmp_path / "run")[0]
    assert made.moments == 20 and made.record.origins["model.safetensors"].endswith("huggingface/model.safetensors")
    state = find_source(folder).read()
    names = [group["params"] for group in reference["groups"]]
    adam = state.adam.with_names(names)
    assert all(torch.equal(adam.first(key), moments["exp_avg"]) for key, moments in reference["moments"].items())


def test_a_step_that_no_name_says_is_said_to_be_the_optimizers(formats: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(formats / written.VERL / "actor", tmp_path / "kept" / "actor"))
    notes = find_source(folder).read().notes
    assert len(notes) == 1 and notes[0].startswith("no folder's name says its training step: 4, the optimizer's count")
    assert not find_source(formats / written.VERL / "actor").read().notes


def test_an_adapter_by_verl_without_its_configuration(copied, tmp_path: Path) -> None:
    """The newest verl writes lora_train_meta.json (rank and alpha) and no adapter_config.json."""
    folder = copied(written.VERL_LORA)
    shutil.rmtree(folder / "actor" / "lora_adapter")
    (folder / "actor" / "lora_train_meta.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    )
    with pytest.raises(
        UserError, match=r"are of an adapter, and no adapter_config.json.*put that .* into .*lora_adapter"
    ):
        import_run(folder, tmp_path / "run")


def test_a_state_by_another_name_is_said(formats: Path, tmp_path: Path) -> None:
    """torchtune's recipe_state.pt, and states under names of one's own, beside a saved model."""
    folder = Path(shutil.copytree(formats / "policy", tmp_path / "epoch_0"))
    for name in ("recipe_state.pt", "optimizer_state.pt"):
        torch.save({}, folder / name)
    found = describe(folder)
    text = "\n".join(found.lines)
    assert found.healthy and "optimizer: none" in text
    assert "recipe_state.pt may hold the optimizer's state, and is of no layout that is read" in text
    assert "optimizer_state.pt may hold" in text
