"""Trainers over models of a second, for what is said of their sampling."""

from __future__ import annotations

import string
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOConfig, DrGRPOTrainer
from tests.tiny_policy import character_tokenizer, even_start_reward

# One row in two is longer, so that prompts of a batch are padded.
PROMPTS = [f"{a}+{b}=" if b % 2 else f"what is {a} plus {b}?" for a in range(6) for b in range(4)]
LENGTH = 6


def tiny_model(config: Any, scale: float = 5.0, seed: int = 0) -> torch.nn.Module:
    """A random causal model with weights scaled up, so that its distributions are far from uniform."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(scale)
    return model.eval()


def arguments(folder: Any, kind: type = GRPOConfig, **settings: Any) -> Any:
    return kind(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
    )


def make_trainer(
    model: Any,
    folder: Any,
    kind: type = GRPOTrainer,
    prompts: list | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Any:
    """kind: GRPOTrainer or DrGRPOTrainer."""
    config = DrGRPOConfig if issubclass(kind, DrGRPOTrainer) else GRPOConfig
    rows = [{"prompt": prompt, "prompt_index": i} for i, prompt in enumerate(prompts or PROMPTS)]
    return kind(
        model,
        even_start_reward,
        args=arguments(folder, config, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or character_tokenizer(),
    )


def vocabulary() -> int:
    return 3 + len(string.digits + string.ascii_letters + string.punctuation + " \n")
