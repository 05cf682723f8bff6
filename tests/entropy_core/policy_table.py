"""Architectures of transformers and adapters of peft, built tiny from their configurations: the table of what is predicted.

Everything is random; nothing is downloaded. `python -m tests.entropy_core.policy_table` measures every case and prints the
table of docs/guides/models-and-adapters.md, which tests/entropy_core/test_policy_table.py holds against what happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tests.entropy_core.policy_adapters import ADAPTERS, INSERT_POSITIONS

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
VOCABULARY = 96
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_HEADS = {**_GATED, "head_dim": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_N = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_WINDOW = {"sliding_window": 4}

# name -> (family of classes, or family:configuration:model, arguments of the configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_GATED}),
    "llama_tied": ("Llama", {**_GATED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**_GATED}),
    "qwen3": ("Qwen3", {**_HEADS}),
    "mistral_window": ("Mistral", {**_GATED, **_WINDOW}),
    "gemma": ("Gemma", {**_HEADS}),
    "gemma2": ("Gemma2", {**_HEADS, **_WINDOW}),
    "gemma3": ("Gemma3:Gemma3TextConfig", {**_HEADS, **_WINDOW}),
    "gpt2": ("GPT2:GPT2Config:GPT2LMHeadModel", {**_N}),
    "opt": ("OPT", {**_SHAPE, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "intermediate_size": 48,
        },
    ),
    "gpt_neox": ("GPTNeoX", {**_SHAPE, "intermediate_size": 48, "max_position_embeddings": 64}),
    "gptj": ("GPTJ", {**_N, "rotary_dim": 4, "n_inner": 48}),
    "gpt_bigcode": ("GPTBigCode", {**_N, "multi_query": True}),
    "phi": ("Phi", {**_GATED}),
    "phi3": ("Phi3", {**_GATED}),
    "falcon_multi_query": ("Falcon", {**_SHAPE, "multi_query": True, "new_decoder_architecture": False}),
    "falcon_new": ("Falcon", {**_SHAPE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("Falcon", {**_SHAPE, "alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "bloom": ("Bloom", {**_SHAPE, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "Mpt",
        {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "stablelm": ("StableLm", {**_GATED}),
    "olmo": ("Olmo", {**_GATED}),
    "olmo2": ("Olmo2", {**_GATED}),
    "olmo3": ("Olmo3", {**_GATED, **_WINDOW}),
    "olmoe": ("Olmoe", {**_GATED, "num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {**_GATED, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_GATED, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, **_MOE, "num_experts": 4}),
    "gpt_oss": ("GptOss", {**_HEADS, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **_GATED,
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_GATED,
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "mamba": (
        "Mamba",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    ),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 4,
            "expand": 2,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **_HEADS,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "mamba_n_groups": 1,
        },
    ),
    "bamba": (
        "Bamba",
        {
            **_GATED,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
        },
    ),
    "jamba": (
        "Jamba",
        {
            **_GATED,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_HEADS,
            **_MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "partial_rotary_factor": 0.5,
        },
    ),
    "lfm2": ("Lfm2", {**_GATED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {**_GATED, "lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": (
        "Rwkv",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
        },
    ),
    "granite": ("Granite", {**_GATED, "logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0}),
    "granitemoe": ("GraniteMoe", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **_GATED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "cohere": ("Cohere", {**_GATED}),
    "cohere2": ("Cohere2", {**_GATED, **_WINDOW}),
    "smollm3": ("SmolLM3", {**_GATED}),
    "starcoder2": ("Starcoder2", {**_GATED}),
    "nemotron": ("Nemotron", {**_HEADS}),
    "glm": ("Glm", {**_HEADS}),
    "llama4": (
        "Llama4:Llama4TextConfig",
        {
            **_HEADS,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 4,
            "interleave_moe_layer_step": 1,
        },
    ),
    "persimmon": ("Persimmon", {**_SHAPE, "intermediate_size": 48, "max_position_embeddings": 64}),
    "xglm": (
        "XGLM",
        {
            "vocab_size": 96,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **_GATED,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "adapter_rank": 4,
            "attention_head_dim": 16,
            "use_mem_rope": True,
            "kv_channels": 16,
        },
    ),
    "minimax": (
        "MiniMax",
        {
            **_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "apertus": ("Apertus", {**_GATED}),
    "dbrx": (
        "Dbrx",
        {
            "vocab_size": 96,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "diffllama": ("DiffLlama", {**_GATED}),
    "modernbert_decoder": (
        "ModernBertDecoder",
        {"pad_token_id": 0, **_GATED, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "gemma3n": (
        "Gemma3n:Gemma3nTextConfig",
        {
            **_HEADS,
            **_WINDOW,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phimoe": ("Phimoe", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "nanochat": ("NanoChat", {**_GATED}),
}


def build_architecture(name: str) -> nn.Module:
    family, arguments = ARCHITECTURES[name]
    family, *rest = family.split(":")
    config_name = rest[0] if rest else f"{family}Config"
    model_name = rest[1] if len(rest) > 1 else f"{family}ForCausalLM"
    config = getattr(transformers, config_name)(**{**_SPECIAL, "tie_word_embeddings": False, **arguments})
    model = getattr(transformers, model_name)(config)
    if hasattr(model, "set_experts_implementation"):  # the grouped product of all experts has no float64
        model.set_experts_implementation("eager")
    return model


_WITH_LORA = (
    "llama_tied", "qwen2", "gemma2", "gemma3", "gemma3n", "gpt2", "opt", "falcon_new", "bloom", "mpt", "mixtral", "qwen3_moe",
    "gpt_oss", "deepseek_v3", "jamba", "bamba", "qwen3_next", "granite", "olmo2", "cohere", "smollm3",
)  # fmt: skip
_ON_EXPERTS = ("qwen3_moe", "gpt_oss")


@dataclass(frozen=True)
class PolicyCase:
    """An architecture with an adapter on it."""

    architecture: str
    adapter: str

    @property
    def name(self) -> str:
        return f"{self.architecture}, {self.adapter}"

    def make(self, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """With parameters away from zeros and ones, in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = (ADAPTERS | INSERT_POSITIONS)[self.adapter](build_architecture(self.architecture))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                scale = 0.7 / max(p.shape) ** 0.5 if p.ndim > 1 else 0.1
                p.add_((scale * torch.randn(p.shape, generator=generator)).to(p.dtype))
        return model.to(dtype).eval()


CASES = [
    *(PolicyCase(name, "full") for name in ARCHITECTURES),
    *(PolicyCase(name, "lora") for name in _WITH_LORA),
    *(PolicyCase("llama", name) for name in ADAPTERS if name not in ("full", "target_parameters")),
    *(PolicyCase(name, "target_parameters") for name in _ON_EXPERTS),
    *(PolicyCase("llama_tied", name) for name in ("modules_to_save", "trainable_token_indices")),
    *(PolicyCase("gpt2", name) for name in ("dora", "lora, biases of the model trained")),
]


if __name__ == "__main__":
    from tests.entropy_core.test_policy_table import measured, row

    for one in CASES:
        print(row(one, measured(one)), flush=True)
