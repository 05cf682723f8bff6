"""Every kind of adapter in PEFT's registry, and every option of LoRA: loaded as it was trained, or refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.adapter_file import LORA_OPTIONS, SUPPORTED, read_adapter_config
from entropy_experiments.console.doctor import NO, diagnose
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoint_zoo import adamw, lora, plain_checkpoint, trainer_groups

pytestmark = pytest.mark.filterwarnings("ignore")
_BOTH, _SQUARE = {"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "o_proj"]}
RECIPES: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **_BOTH},
    "BEFT": _BOTH,
    "BOFT": {"boft_block_size": 4, **_BOTH},
    "DEFT": {"r": 3, **_BOTH},
    "DELORA": {"r": 3, **_BOTH},
    "FOURIERFT": {"n_frequency": 20, **_BOTH},
    "FROD": _BOTH,
    "GLORA": {"r": 3, **_BOTH},
    "GRALORA": {"r": 4, "gralora_k": 2, **_BOTH},
    "HIRA": {"r": 3, **_BOTH},
    "HRA": {"r": 4, **_BOTH},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 3, **_BOTH},
    "LOKR": {"r": 3, **_BOTH},
    "LORA": {"r": 3, **_BOTH},
    "MISS": {"r": 4, **_BOTH},
    "OFT": {"r": 0, "oft_block_size": 4, **_BOTH},
    "PEANUT": {"r": 3, **_BOTH},
    "PSOFT": {"r": 4, **_SQUARE},
    "RANDLORA": {"r": 3, **_BOTH},
    "ROAD": {"group_size": 8, **_BOTH},
    "SHIRA": {"r": 3, **_BOTH},
    "SUPERTUNING": _BOTH,
    "TINYLORA": _BOTH,
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5]},
    "UNILORA": {"r": 3, **_BOTH},
    "VBLORA": {"r": 3, "num_vectors": 8, "vector_length": 4, "topk": 2, **_BOTH},
    "VERA": {"r": 4, **_BOTH},
    "WAVEFT": {"n_frequency": 20, **_BOTH},
}
KINDS = sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def test_what_is_taken_is_what_is_tried_here() -> None:
    assert set(RECIPES) == SUPPORTED


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_loaded_as_it_was_trained_or_refused_by_name(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    if kind not in RECIPES:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(UserError, match=f"is of kind {kind}: .*train LoRA, or the whole model$"):
            read_adapter_config(tmp_path, reproducible=True)
        return
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **RECIPES[kind])
    model, path = trained(tmp_path / "checkpoint-3", tiny_run.parent / "policy", config)
    assert diagnose(path).verdict == "yes"
    loaded = load_checkpoint(path, device="cpu")
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.train()(input_ids=ids).logits, expected, msg="random in training mode")
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)
    moments = {name: state.exp_avg for name, state in loaded.optimizer.items()}
    its = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert moments.keys() == its.keys()
    assert any(m.any() for m in moments.values())


def trained(path: Path, policy: Path, config: peft.PeftConfig) -> tuple[nn.Module, Path]:
    """(the policy, its plain checkpoint) after three steps."""
    made: list[nn.Module] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made.append(model)
        return adamw(trainer_groups(model))

    return (plain_checkpoint(path, policy, config, optimizer), made[0])[::-1]


def test_a_kind_of_a_later_peft_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "NEWEST", peft.LoraConfig)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NEWEST", "r": 8}))
    with pytest.raises(UserError, match="is of kind NEWEST: it is not known here to be loaded as it was trained"):
        read_adapter_config(tmp_path, reproducible=True)


def test_every_option_of_lora_is_known_or_refused_by_name(tmp_path: Path) -> None:
    free = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"}
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)} - free
    refused = set()
    for name in sorted(names | {"an_option_of_a_later_peft"}):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", name: {"x": 1}} | {"peft_type": "LORA"})
        )
        try:
            read_adapter_config(tmp_path, reproducible=True)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
            refused.add(name)
    assert refused >= names - LORA_OPTIONS and "an_option_of_a_later_peft" in refused
    assert {"layer_replication", "velora_config", "monteclora_config", "arrow_config", "use_qalora"} <= refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication set: it stacks layers of the base model anew"),
        (
            {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
            "ensure_weight_tying with modules_to_save: PEFT ties",
        ),
        (
            {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
            "velora_config set: its gradients are projected",
        ),
    ],
)
def test_settings_that_change_the_policy_are_named(
    options: dict[str, Any], words: str, tiny_run: Path, tmp_path: Path
) -> None:
    path = trained(tmp_path / "checkpoint-3", tiny_run.parent / "policy", lora(**options))[1]
    row = diagnose(path)
    assert row.verdict == NO and words in row.remedies[0] and "train without" in row.remedies[0]
    with pytest.raises(UserError, match=words):
        load_checkpoint(path, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 4]}, "ensure_weight_tying": True},
        {"kasa_config": peft.tuners.lora.config.KasaConfig()},
        {
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"]),
            "target_modules": ["q_proj"],
        },
        {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}, "layers_to_transform": [1]},
    ],
)
def test_odd_settings_that_are_taken(options: dict[str, Any], tiny_run: Path, tmp_path: Path) -> None:
    model, path = trained(tmp_path / "checkpoint-3", tiny_run.parent / "policy", lora(**options))
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        found = load_checkpoint(path, device="cpu").model(input_ids=ids).logits
        torch.testing.assert_close(found, model.eval()(input_ids=ids).logits)
