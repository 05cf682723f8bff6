"""RLOOTrainer has GRPOTrainer's passes, another loss without a name, and no masks of drawn tokens."""

from __future__ import annotations

import pytest
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.step_recorder import record_steps
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import load_model_and_tokenizer
from rl_training.run.step_record import GENERATED, read_step
from tests.rl_training.integrations.test_trl_integration import SMALL_RUN, check_same_tokens, logged
from tests.tiny_policy import even_start_reward


def make_rloo(tiny_policy, folder, **settings):
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    arguments = RLOOConfig(
        **{
            **SMALL_RUN,
            "output_dir": str(folder),
            "max_steps": 3,
            "beta": 0.0,
            **settings,
        }
    )
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    return RLOOTrainer(
        model.requires_grad_(True),
        even_start_reward,
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer,
    )


def test_its_steps_are_predicted_and_measured_and_recorded(tiny_policy, tmp_path):
    trainer = make_rloo(tiny_policy, tmp_path)
    record_steps(trainer)
    attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", preset="accurate", on_error="raise"), console=False)
    trainer.train()
    check_same_tokens(logged(trainer))
    rows = [row for step in (1, 2, 3) for row in read_step(tmp_path, step) if row["part"] == GENERATED]
    assert len(rows) == 48
    assert all(row["mask"] == [True] * len(row["completion_ids"]) for row in rows), "texts were taken for masks"


@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "learning_rate": 1e-3}, {"beta": 0.05}], ids=["plain", "reused", "kl"]
)
def test_shares_add_up(tiny_policy, tmp_path, settings):
    """Ratios of whole sequences, read off the loss itself; KL is in this trainer's rewards, and no term of its loss."""
    trainer = make_rloo(tiny_policy, tmp_path, **settings)
    config = EntropyProbeConfig(mode="attribution", preset="accurate", on_error="raise")
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    for change in callback.history:
        scale = float(change.shares.abs().sum())
        assert scale > 0
        assert abs(float(change.shares.sum()) - change.batch.value) < 1e-3 * max(abs(change.batch.value), 0.1 * scale)
