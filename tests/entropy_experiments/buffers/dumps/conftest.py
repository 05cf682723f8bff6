"""A tiny run whose chat template writes special tokens and whose texts decode as they were, and its two recorded buffers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

import tests.tiny_policy as tiny_policy
from entropy_core.scores import token_statistics
from entropy_experiments.buffers.sampling_plan import SamplingPlan, plan_sampling
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.double_sampling import TrainingBuffer, draw_buffers
from rl_training.sampling import Rollouts
from rl_training.train import run_training
from tests.entropy_experiments.buffers.dumps.files_of_trainers import Sequence
from tests.entropy_experiments.small_analysis import config
from tests.shared_artefacts import made_once

STORED = ("entropy_analysis.sampling.train_prompts=from_run", "entropy_analysis.sampling.eval_prompts=from_run")


def chat_tokenizer():
    tokenizer = _characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    turns = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer.chat_template = turns + "{{ '>' if add_generation_prompt }}"
    return tokenizer


_characters = tiny_policy.character_tokenizer


@dataclass
class Recorded:
    """A checkpoint with what its run stored of the step before it (training) and after it (evaluation)."""

    path: Path
    checkpoint: Checkpoint
    plan: SamplingPlan
    evaluation: Rollouts
    training: TrainingBuffer

    def sequences(self, side: str) -> list[Sequence]:
        rollouts = self.evaluation if side == "eval" else self.training.rollouts
        batch = rollouts.to_batch(self.plan.sampling_config)
        found = token_statistics(self.checkpoint.model, batch)
        rows = []
        for i in range(len(rollouts)):
            advantage = float(self.training.advantages[i]) if side == "train" else 0.0
            logprobs = found.logprobs[i][batch.completion_mask[i]].tolist()
            rows.append(
                Sequence(rollouts.prompt_row[i]["prompt"], rollouts.prompt_ids[i], rollouts.completion_ids[i],
                         float(rollouts.reward[i] or 0.0), advantage, logprobs, rollouts.prompt_index[i])
            )  # fmt: skip
        return rows


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def train(root: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_policy, "character_tokenizer", chat_tokenizer)
            policy = tiny_policy.save_tiny_policy(root / "policy")
        settings = tiny_policy.tiny_train_config(
            policy, root / "run", training={"steps": 3, "save_every": 1}, entropy_probe={"enabled": False},
            rollouts={"prompts_per_step": 6, "completions_per_prompt": 4, "max_completion_length": 8},
        )  # fmt: skip
        return run_training(settings, quiet=True)

    return made_once(tmp_path_factory, "chat_run", train)


@pytest.fixture(scope="module")
def recorded(chat_run: Path) -> Recorded:
    path = chat_run / "checkpoint-2"
    checkpoint = load_checkpoint(path, device="cpu")
    settings = config(*STORED, "entropy_analysis.eval_batch_size=24")
    plan = plan_sampling(checkpoint, settings)
    with torch.no_grad():
        evaluation, training = draw_buffers(checkpoint, plan, settings)
    return Recorded(path, checkpoint, plan, evaluation, training)
