"""What is said of a run's sampling is said once, of what is there, and not of what is not."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from trl import GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.generation.training_noise import silence_training_noise, train_mode_change, training_noise
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary
from tests.rl_training.two_turns import two_turns


def llama(**more: Any) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=1, **more,
    )  # fmt: skip
    return tiny_model(config).requires_grad_(True)


def of_kind(kind: str) -> torch.nn.Module:
    size = {"vocab_size": vocabulary(), "bos_token_id": 1, "eos_token_id": 1}
    if kind == "adapter dropout":
        found = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
        return peft.get_peft_model(llama(), found)
    if kind == "attention dropout":
        return llama(attention_dropout=0.2)
    if kind == "router jitter":
        config = MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3, **size,
        )  # fmt: skip
        return tiny_model(config, 2.0).requires_grad_(True)
    dropped = 0.1 if kind == "GPT-2's dropout" else 0.0
    none = {"resid_pdrop": dropped, "embd_pdrop": dropped, "attn_pdrop": dropped}
    return tiny_model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **none, **size)).requires_grad_(True)


def told_of(model: torch.nn.Module, folder: Any, **settings: Any) -> list[str]:
    trainer = make_trainer(model, folder, router_aux_loss_coef=0.0, max_steps=2, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_entropy_probe(
            trainer, EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate"), console=False
        )
        trainer.train()
    return [str(w.message) for w in caught if str(w.message).startswith("entropy probe:")]


@pytest.mark.parametrize("kind", ["adapter dropout", "attention dropout", "router jitter", "neftune", "positions"])
def test_noise_and_padding_are_told_once(tmp_path, kind):
    """The gradient check finds them a second time, by what they do."""
    if kind == "neftune":
        told = told_of(llama(), tmp_path, neftune_noise_alpha=5.0)
    else:
        told = told_of(of_kind(kind), tmp_path)
    named = {"router jitter": "jitter", "neftune": "neftune_noise_alpha=5", "positions": "left padding"}.get(
        kind, "dropout"
    )
    assert len(told) == 1 and named in told[0], told


def test_the_gradient_check_speaks_where_nothing_was_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr("rl_training.premises.sampling_check.train_mode_finding", lambda trainer: None)
    (told,) = told_of(of_kind("attention dropout"), tmp_path)
    assert "random numbers in training mode" in told


def test_noise_is_named_by_kind_with_the_number_of_modules_and_one_of_them():
    model = of_kind("adapter dropout")
    (found,) = training_noise(model)
    example = "base_model.model.model.layers.0.self_attn.q_proj.lora_dropout.default"
    assert found == f"dropout=0.3 (6 modules, e.g. {example})"
    module = model.get_submodule(example)
    module.p = 0.5
    kinds = training_noise(model)
    assert kinds[0] == f"dropout=0.5 ({example})" and kinds[1].startswith("dropout=0.3 (5 modules")
    assert len(silence_training_noise(model)) == 2 and training_noise(model) == []
    assert training_noise(of_kind("GPT-2's dropout")) == ["dropout=0.1 (7 modules, e.g. transformer.drop)"]


@pytest.mark.parametrize("kind", ["adapter dropout", "attention dropout", "router jitter"])
def test_few_tokens_show_noise_and_none_shows_nothing(kind):
    model = of_kind(kind)
    if kind == "adapter dropout":  # B starts at 0, where dropout of the adapter's input does nothing
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_()
    assert train_mode_change(model, range(3, 13)) > 1e-2
    silence_training_noise(model)
    assert train_mode_change(model, range(3, 13)) == 0


def without_masks(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions of the policy's own, unmarked."""
    found = two_turns(prompts, trainer)
    drawn = [mask.index(0) if 0 in mask else len(mask) for mask in found.pop("env_mask")]
    found["completion_ids"] = [ids[:n] for ids, n in zip(found["completion_ids"], drawn, strict=True)]
    return found


@pytest.mark.parametrize("kind", [GRPOTrainer, DrGRPOTrainer])
@pytest.mark.parametrize("marks", [True, False])
def test_a_rollout_function_is_asked_for_a_mask_only_where_it_returns_none(tmp_path, kind, marks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(llama(), tmp_path, kind, max_completion_length=12, max_steps=2)
        trainer.rollout_func = two_turns if marks else without_masks
        attach_entropy_probe(
            trainer, EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate"), console=False
        )
        trainer.train()
    said = [str(w.message) for w in caught]
    assert sum("returned no env_mask" in text for text in said) == (not marks)
    assert not any("mark what it adds in env_mask" in text for text in said)
