"""The check of the gradient where processes meet their first gradient at different micro-batches of a step."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.gradient_premise import GradientCheck, GradientPremise
from rl_training.probe_config import EntropyProbeConfig
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes

RUN = "PREMISE_RUN"


def train() -> GradientCheck | None:
    """The second process has nothing to learn from in the first step: its gradient comes with the averaging at the step's end."""
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    folder = Path(os.environ[RUN])
    trainer = make_trainer(
        folder / "policy", folder / "run", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    generate, calls = trainer._generate_and_score_completions, []

    def generating(inputs):
        out = generate(inputs)
        if rank == 1 and not calls:
            out["advantages"] = torch.zeros_like(out["advantages"])
        calls.append(None)
        return out

    trainer._generate_and_score_completions = generating
    attach_entropy_probe(trainer, EntropyProbeConfig(on_error="raise", mode="simple", eval_sequences=4), console=False)
    trainer.train()
    return GradientPremise.of(trainer).check


def test_a_process_without_a_gradient_of_its_own_is_not_waited_for(tmp_path, monkeypatch):
    save_tiny_policy(tmp_path / "policy")
    monkeypatch.setenv(RUN, str(tmp_path))
    for check in in_two_processes(train):
        assert check is not None and check.held and check.relative_error < 1e-4
