"""One table of models that feeds most tests: real architectures at toy size, fully trained and with LoRA
adapters.

Everything is built from a configuration, with nothing downloaded. All parameters are random and far from
their initialisation: a LoRA `B` of zeros would make every gradient of `A` vanish, and norms of one would hide
a missing norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.oracle.policy import RecurrentPolicy

VOCABULARY = 37
PAD_TOKEN = 0
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_SHAPE, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def _llama(tied: bool) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_GATED, **_SPECIAL, tie_word_embeddings=tied, attention_dropout=0.2))


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**_GATED, **_SPECIAL, tie_word_embeddings=False, attention_dropout=0.2))


def _gpt2() -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**shape, **_SPECIAL, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))


def _with_lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + ε) · w in the precision of its input; the library's own rounds to float32 inside."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised `hidden`, of the same shape and dtype."""
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def _keep_float64(model: nn.Module) -> None:
    """Replace norms that compute in float32 whatever they are given: a float64 reference must be one all the
    way."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm"):
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon))


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices at 1.5/sqrt(longer side), vectors around their old value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / max(parameter.shape) ** 0.5)
            else:
                parameter.add_(0.3 * noise)


@dataclass(frozen=True)
class ModelCase:
    """A way to build one model; `name` says what is special about it."""

    name: str
    build: Callable[[], nn.Module]
    lora: bool = False
    vocabulary: int = VOCABULARY

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The model in `dtype` and evaluation mode, with random parameters: the same numbers in either
        precision."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
        if self.lora:
            model = _with_lora(model)
        model.float()
        randomise(model, seed + 1)
        if dtype == torch.float64:
            _keep_float64(model)
        return model.to(dtype).eval()


CASES = (
    ModelCase("llama_tied", lambda: _llama(tied=True)),
    ModelCase("llama_untied", lambda: _llama(tied=False)),
    ModelCase("llama_tied_lora", lambda: _llama(tied=True), lora=True),
    ModelCase("llama_untied_lora", lambda: _llama(tied=False), lora=True),
    ModelCase("qwen2_biases", _qwen2),
    ModelCase("qwen2_biases_lora", _qwen2, lora=True),
    ModelCase("gpt2_conv1d_tied", _gpt2),
    ModelCase("gpt2_conv1d_tied_lora", _gpt2, lora=True),
    ModelCase("recurrent_policy", RecurrentPolicy, vocabulary=4),
)


@dataclass(frozen=True)
class TokenLists:
    """Prompts and completions as plain lists of token ids, of different lengths; two completions for some
    prompts."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    prompt_index: list[int]


def random_sequences(vocabulary: int, seed: int = 0) -> TokenLists:
    """Seven sequences of five prompts: prompts of one to five tokens, completions of one to six."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    index = [0, 0, 1, 2, 2, 3, 4]
    prompts = [draw(length) for length in (3, 1, 5, 2, 4)]
    return TokenLists([prompts[p] for p in index], [draw(length) for length in (4, 2, 6, 1, 3, 5, 4)], index)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> trainable parameter; tied weights once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
