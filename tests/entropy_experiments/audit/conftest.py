"""Runs of a tiny policy that are audited, each trained once."""

import pytest

from tests.entropy_experiments.audit.planted_log import train_recorded
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import save_tiny_policy

SETTINGS = {
    "lora": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
    "max_completion_length": 20,
    "learning_rate": 1e-3,
    "temperature": 0.7,
}


@pytest.fixture(scope="session")
def audited_policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("audited") / "policy")


@pytest.fixture(scope="session")
def planted(audited_policy, tmp_path_factory):
    """Two micro-batches a step, four completions of a prompt, a KL term, a temperature."""
    settings = {**SETTINGS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "beta": 0.05}
    return train_recorded(make_trainer(audited_policy, tmp_path_factory.mktemp("planted") / "run", **settings))
