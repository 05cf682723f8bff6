"""One tiny training run for all tests of Tier 2; tests that damage a checkpoint work on a copy."""

import shutil

import pytest

from rl_training.train import run_training
from tests.tiny_policy import save_tiny_policy, tiny_train_config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with checkpoint-2 and checkpoint-4 of ours, its policy beside it."""
    root = tmp_path_factory.mktemp("tier2")
    policy = save_tiny_policy(root / "policy")
    config = tiny_train_config(policy, root / "run", training={"steps": 4, "save_every": 2})
    return run_training(config, quiet=True)


@pytest.fixture
def checkpoint_copy(tiny_run, tmp_path):
    """A copy of the last checkpoint, free to be damaged."""
    target = tmp_path / "copied_run" / "checkpoint-4"
    shutil.copytree(tiny_run / "checkpoint-4", target)
    return target
