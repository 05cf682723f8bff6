"""Adapters of peft, tiny, for the table of tests/entropy_core/policy_table.py: name -> puts it onto a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import nn


def _linear(kind: type, **options: Any) -> Callable[[nn.Module], nn.Module]:
    return _adapter(kind, target_modules="all-linear", **options)


def _adapter(kind: type, **options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))


ADAPTERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: model.requires_grad_(True),
    "lora": _linear(peft.LoraConfig, r=3),
    "rslora": _linear(peft.LoraConfig, r=3, use_rslora=True),
    "dora": _linear(peft.LoraConfig, r=3, use_dora=True),
    "pissa": _linear(peft.LoraConfig, r=3, init_lora_weights="pissa"),
    "lora, biases of the model trained": _linear(peft.LoraConfig, r=3, bias="all"),
    "lora with a bias": _linear(peft.LoraConfig, r=3, lora_bias=True),
    "lora on the embedding": _adapter(peft.LoraConfig, r=3, target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save": _linear(peft.LoraConfig, r=3, modules_to_save=["lm_head", "embed_tokens"]),
    "trainable_token_indices": _linear(peft.LoraConfig, r=3, trainable_token_indices=[3, 4, 5, 6, 7, 8]),
    "target_parameters": _adapter(
        peft.LoraConfig, r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    ),
    "ia3": _adapter(
        peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ln tuning": _adapter(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
    "vera": _linear(peft.VeraConfig, r=4),
    "loha": _linear(peft.LoHaConfig, r=3),
    "lokr": _linear(peft.LoKrConfig, r=3),
    "oft": _linear(peft.OFTConfig, r=0, oft_block_size=4),
    "boft": _linear(peft.BOFTConfig, boft_block_size=4),
    "adalora": _linear(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "hra": _linear(peft.HRAConfig, r=4),
    "fourierft": _linear(peft.FourierFTConfig, n_frequency=20),
    "vblora": _linear(peft.VBLoRAConfig, r=3, num_vectors=8, vector_length=4, topk=2),
    "miss": _linear(peft.MissConfig, r=4),
    "c3a": _linear(peft.C3AConfig, block_size=8),
    "randlora": _linear(peft.RandLoraConfig, r=3),
    "shira": _linear(peft.ShiraConfig, r=3),
    "road": _linear(peft.RoadConfig, group_size=8),
    "waveft": _linear(peft.WaveFTConfig, n_frequency=20),
    "delora": _linear(peft.DeloraConfig, r=3),
    "gralora": _linear(peft.GraloraConfig, r=4, gralora_k=2),
    "adaption prompt": _adapter(peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=1),
    "prefix tuning": _adapter(peft.PrefixTuningConfig, num_virtual_tokens=3),
}
INSERT_POSITIONS = {
    "prompt tuning": _adapter(peft.PromptTuningConfig, num_virtual_tokens=3),
    "p-tuning": _adapter(peft.PromptEncoderConfig, num_virtual_tokens=3),
}
