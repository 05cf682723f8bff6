"""A tiny policy that trains in seconds: a random Llama over printable characters, with a chat template.

Everything that is not about the size of the model runs on it: TRL, checkpoints, the command line.
"""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl_training.config import TrainConfig
from rl_training.configuration import validate_config

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([Split("", "isolated")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    return fast


def save_tiny_policy(folder: Path, seed: int = 0, scale: float = 5.0) -> Path:
    """A Llama of 2 layers, its weights scaled up so that its distributions are far from uniform."""
    tokenizer = character_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def even_start_reward(prompts: list, completions: list, **columns: list) -> list[float]:
    """1 where the first character has an even code: half of a random policy's completions, and learnable."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(bool(t) and ord(t[0]) % 2 == 0) for t in texts]


def tiny_train_config(policy: Path, run: Path, **sections: dict) -> TrainConfig:
    """A run of a few seconds; `sections` update the sections of the same names."""
    data: dict = {
        "model": {"name": str(policy), "device": "cpu"},
        "lora": {"r": 4, "alpha": 8},
        "task": {
            "name": "chain_sum",
            "arguments": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "size": 24,
            "heldout_size": 16,
            "reward": "tests.tiny_policy:even_start_reward",
        },
        "rollouts": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_length": 8},
        "optimizer": {"learning_rate": 1e-3, "micro_batch_size": 8},
        "training": {"steps": 2, "save_every": 2, "output_dir": str(run), "report_to": []},
        "entropy_probe": {"eval_sequences": 16, "on_error": "raise"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return validate_config(TrainConfig, data)
