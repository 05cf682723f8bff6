"""`task.reward_process` in a run: a function that ends its process in one step costs that step its rewards and nothing else."""

import logging

import pytest

from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts
from rl_training.train import run_training
from tests.tiny_policy import tiny_train_config

pytestmark = pytest.mark.long

FUNCTION = """
import os
def even(prompts, completions, trainer_state, **columns):
    if trainer_state.global_step == 1:
        os._exit(7)
    texts = [c[0]["content"] for c in completions]
    return [float(bool(t) and ord(t[0]) % 2 == 0) for t in texts]
"""


def settings(tiny_policy, folder, **task):
    (folder / "scorer.py").write_text(FUNCTION)
    return tiny_train_config(
        tiny_policy, folder / "run", training={"steps": 3, "save_every": 3}, entropy_probe={"enabled": False},
        task={"reward": f"{folder / 'scorer.py'}:even", "reward_process": True, **task},
        training_buffer={"max_refill_rounds": 0},
    )  # fmt: skip


def test_it_earns_zero_and_the_next_step_has_another_child(tiny_policy, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_training(settings(tiny_policy, tmp_path, on_reward_error="zero"), quiet=True)
    earned = [{row.reward for row in read_rollouts(tmp_path / "run", step)} for step in (1, 2, 3)]
    assert earned == [{0.0, 1.0}, {0.0}, {0.0, 1.0}]
    assert sum("ended its process (status 7)" in record.message for record in caplog.records) == 1


def test_or_stops_the_run_by_its_name(tiny_policy, tmp_path):
    with pytest.raises(UserError, match=r"scorer.py:even .*ended its process \(status 7\).*on_reward_error=zero"):
        run_training(settings(tiny_policy, tmp_path), quiet=True)
