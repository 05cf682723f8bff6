"""What training holds is said before it is taken, and bounded; with gradient checkpointing the same steps are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rl_training.train
from rl_training.errors import UserError
from rl_training.models.load import load_model_and_tokenizer
from rl_training.run.training_memory import training_memory
from rl_training.train import build_trainer, run_training
from tests.live_tensors import LiveTensors
from tests.tiny_policy import tiny_train_config

SECTIONS: dict[str, Any] = {
    "entropy_probe": {"enabled": False},
    "lora": {"enabled": False},
    "rollouts": {"prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_length": 4},
}


def settings(policy: Path, run: Path, **training: Any):
    return tiny_train_config(policy, run, training={"steps": 2, "save_every": 2, **training}, **SECTIONS)


def test_what_is_said_is_what_the_optimizer_takes(tiny_policy: Path) -> None:
    model = load_model_and_tokenizer(str(tiny_policy), "float32", "cpu")[0].requires_grad_(True)
    memory = training_memory(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with LiveTensors() as counter:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = counter.live
    assert held == pytest.approx(memory.gradients + memory.moments, rel=0.02)  # and a step count each
    assert memory.weights == memory.gradients and memory.total == 4 * memory.weights
    next(model.parameters()).requires_grad_(False)
    assert training_memory(model).trained < memory.trained
    assert f"{memory.trained:,} trained parameters" in memory.describe()


def test_a_limit_is_kept_before_there_is_a_trainer(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_arguments: Any, **_more: Any) -> None:
        raise AssertionError("a trainer was made")

    monkeypatch.setattr(rl_training.train, "DrGRPOTrainer", made)
    with pytest.raises(UserError, match=r"takes .* GiB beside activations, .*memory_limit .*lora.enabled=true"):
        build_trainer(settings(tiny_policy, tmp_path / "run", memory_limit=1000))
    assert not (tmp_path / "run").exists()


def test_with_gradient_checkpointing_the_same_steps_are_taken(
    tiny_policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for name, on in (("kept", False), ("again", True)):
        folder = run_training(settings(tiny_policy, tmp_path / name, gradient_checkpointing=on))
        weights.append(load_file(folder / "checkpoint-2" / "model.safetensors"))
        assert "memory beside activations: " in capfd.readouterr().err
    trainer, _ = build_trainer(settings(tiny_policy, tmp_path / "third", gradient_checkpointing=True))
    assert trainer.args.gradient_checkpointing
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)
